"""How long it takes to cut S and A from an S0 that has to be pruned, and how fast they are beside it.

    uv run python benchmarks/separation.py

torchvision's ResNet-50 at 224 px, by MACs and by latency on ONNX Runtime; then ResNet-20, resnet8x4 and ResNet-18 by
latency, batch 1 and 8, all cores: for an idle machine. The ratios are those of the measurement that confirmed what was
found; 1.00 to two decimals is asked for.
"""

from __future__ import annotations

import time
from typing import Any

from record import Claim, save

from rkd_deploy.errors import BudgetError
from rkd_deploy.export.latency import ExportStopwatch
from rkd_deploy.models import zoo
from rkd_deploy.models.latency import ROUNDING
from rkd_deploy.models.separation import separate

LATENCY = (("resnet20", 32, 100), ("resnet8x4", 32, 100), ("tv:resnet18", 224, 1000), ("tv:resnet50", 224, 1000))
TIMED = "tv:resnet50"


def main() -> None:
    """Measure and record."""
    given = zoo.create(TIMED, 1000, input_size=(224, 224))
    began = time.perf_counter()
    separate(given, num_classes=1000, input_size=224)
    claims = [Claim(f"{TIMED} cut by MACs", time.perf_counter() - began, "s", 30.0)]
    for name, side, classes in LATENCY:
        claims += _by_latency(name, side, classes)
    save("separation", claims)


def _by_latency(name: str, side: int, classes: int) -> list[Claim]:
    given = zoo.create(name, classes, input_size=(side, side))
    began = time.perf_counter()
    with ExportStopwatch("onnxruntime", (1, 8), input_size=(side, side), note=print) as stopwatch:
        try:
            made = separate(given, num_classes=classes, input_size=side, budget="latency", stopwatch=stopwatch)
        except BudgetError as error:
            print(f"{name}: {error}")
            return []
    seconds = time.perf_counter() - began
    assert made.latency is not None
    fused = made.latency["fused"]
    levels = {fused["level"]: fused} | fused["other_levels"]
    found: list[dict[str, Any]] = [
        row for row in fused["readings"] if row["confirm"] and row["fraction"] == fused["fraction_of_macs"]
    ]
    tried = {"readings": {level: record["readings"] for level, record in levels.items()}, "refused": fused["refused"]}
    what = f"S + A over {name}, level {fused['level']}, {made.cost / made.budget:.2f} of its MACs"
    ratios = [
        Claim(f"{what}, batch {batch}", ratio, "ratio", 1 + ROUNDING) for batch, ratio in found[-1]["ratios"].items()
    ]
    return [Claim(f"{name} cut by latency", seconds, "s", 180.0, tried), *ratios]


if __name__ == "__main__":
    main()
