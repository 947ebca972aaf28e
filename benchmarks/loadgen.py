"""Our SingleStream figure beside MLPerf LoadGen's: the same loaded model, in turns.

    uv run python benchmarks/loadgen.py

The model is a ResNet-20 for CIFAR-100 with random weights, on ONNX Runtime with one thread. LoadGen is the judge: its
clock and its percentiles are its own. Each round measures half a second each way, and the order turns round; what is
told is the median over the rounds of the ratio within a round, which a neighbour on the same core for some of the
rounds does not move. "LoadGen, unofficial".
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from statistics import median

from models import resnet20
from record import Claim, save

from rkd_deploy.backends import Backend, load_backend
from rkd_deploy.bench.mlperf import Load, library, run_scenario
from rkd_deploy.bench.timing import measure

ROUNDS = 41
SECONDS = 0.5


def main() -> None:
    """Measure, and write the record."""
    with tempfile.TemporaryDirectory() as folder:
        bundle = resnet20(Path(folder) / "bundle")
        with load_backend("onnxruntime", bundle, threads=1) as backend:
            ours, theirs = _rounds(backend, Path(folder) / "logs")
    ratio = median(our_p90 / their_p90 for our_p90, their_p90 in zip(ours, theirs, strict=True))
    print(f"p90 of SingleStream: ours {median(ours):.4f} ms, LoadGen's {median(theirs):.4f} ms, ratio {ratio:.4f}")
    samples = {"ours_p90_ms": ours, "loadgen_p90_ms": theirs}
    save(
        "loadgen",
        [Claim("p90 of SingleStream, ours over LoadGen's (unofficial), off 1", abs(ratio - 1), "ratio", 0.05, samples)],
    )


def _rounds(backend: Backend, logs: Path) -> tuple[list[float], list[float]]:
    inputs = library(backend, None, seed=0)
    load = Load(min_seconds=SECONDS, min_queries=100)
    ours: list[float] = []
    theirs: list[float] = []
    for number in range(ROUNDS):
        for ours_now in (True, False) if number % 2 else (False, True):
            if ours_now:
                ours.append(measure(backend, inputs[0], min_seconds=SECONDS, warmup_seconds=0.2).percentile(90))
            else:
                theirs.append(run_scenario(backend, inputs, "SingleStream", logs, load)["p90_ms"])
    return ours, theirs


if __name__ == "__main__":
    main()
