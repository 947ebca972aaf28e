"""Times cutting S and A from an S0 that is pruned, and S + A beside that S0.

    uv run python benchmarks/separation.py

torchvision's ResNet-50 at 224 px, by MACs within 30 s and by latency within 3 minutes; ResNet-20, resnet8x4 and
ResNet-18 by latency on ONNX Runtime and on OpenVINO, all cores: for an idle machine. The ratios are those of the
measurement that confirmed what was found; 1.00 to two decimals is asked for, at every batch size.
"""

from __future__ import annotations

import time
from typing import Any

from record import Claim, save

from rkd_deploy.backends import RunOn
from rkd_deploy.errors import BudgetError
from rkd_deploy.export.stopwatch import ExportStopwatch
from rkd_deploy.models import zoo
from rkd_deploy.models.separation.latency import ROUNDING
from rkd_deploy.models.separation.separate import separate

SMALL = (("resnet20", 32, 100), ("resnet8x4", 32, 100), ("tv:resnet18", 224, 1000))
"""Network, side of an image, classes."""
BACKENDS, BATCHES = ("onnxruntime", "openvino"), (1, 8, 32)
TIMED = ("tv:resnet50", 224, 1000)


def main() -> None:
    """Measure, and write the record."""
    name, side, classes = TIMED
    s0 = zoo.create(name, classes, input_size=(side, side))
    began = time.perf_counter()
    separate(s0, num_classes=classes, input_size=side)
    claims = [Claim(f"{name} cut by MACs", time.perf_counter() - began, "s", 30.0)]
    for backend in BACKENDS:
        for network in SMALL:
            claims += _by_latency(*network, backend, BATCHES)
    claims += _by_latency(*TIMED, "onnxruntime", BATCHES[:2])  # 32 of its images take seconds
    save("separation", claims)


def _by_latency(name: str, side: int, classes: int, backend: str, batches: tuple[int, ...]) -> list[Claim]:
    s0 = zoo.create(name, classes, input_size=(side, side))
    began = time.perf_counter()
    with ExportStopwatch(RunOn(backend), batches, input_size=(side, side), note=print) as stopwatch:
        try:
            separation = separate(s0, num_classes=classes, input_size=side, budget="latency", stopwatch=stopwatch)
        except BudgetError as error:
            print(error)
            return [Claim(f"{name} cut by latency on {backend}: failures", 1.0, "failures", 0.0)]
    seconds = time.perf_counter() - began
    assert separation.latency is not None
    fused = separation.latency["fused"]
    levels = {fused["level"]: fused} | fused["other_levels"]
    confirmed: list[dict[str, Any]] = [
        row for row in fused["readings"] if row["confirm"] and row["fraction"] == fused["fraction_of_macs"]
    ]
    tried = {"readings": {level: record["readings"] for level, record in levels.items()}, "refused": fused["refused"]}
    share = f"{separation.cost / separation.budget:.2f} of its MACs"
    what = f"S + A over {name} on {backend}, level {fused['level']}, {share}"
    ratios = [
        Claim(f"{what}, batch {batch}", ratio, "ratio", 1 + ROUNDING)
        for batch, ratio in confirmed[-1]["ratios"].items()
    ]
    return [
        Claim(f"{name} cut by latency on {backend}", seconds, "s", 180.0 if name == TIMED[0] else None, tried),
        *ratios,
    ]


if __name__ == "__main__":
    main()
