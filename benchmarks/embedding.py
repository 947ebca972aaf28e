"""Measures what an app pays: loading, the first prediction, our share of each.

    uv run python benchmarks/embedding.py

The model is a ResNet-20 for CIFAR-100 with random weights. Each load runs in a process of its own in which torch cannot
be imported. Predictions and raw ONNX Runtime calls, on one session and one ready array, alternate call by call.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from models import resnet20
from record import Claim, ratio_of_medians, save

LOADS = 11
CALLS = 3000

LOAD = r"""
import json, re, sys, time
sys.modules["torch"] = None
began = time.perf_counter()
import numpy as np
import rkd_deploy
classifier = rkd_deploy.load(sys.argv[1])
classifier.predict(np.zeros((32, 32, 3), np.uint8))
seconds = time.perf_counter() - began
# The peak of this process alone: getrusage would tell that of the parent it was forked from.
kilobytes = int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read()).group(1))
print(json.dumps([[seconds], [kilobytes * 1024 / 1e6]]))
"""

PREDICT = """
import json, sys, time
sys.modules["torch"] = None
import numpy as np
import rkd_deploy
classifier = rkd_deploy.load(sys.argv[1])
session = classifier._backend._session
image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
x = image[None]
ours, raw = [], []
for call in range(int(sys.argv[2]) + 200):
    t0 = time.perf_counter_ns()
    session.run(["logits"], {"input": x})
    t1 = time.perf_counter_ns()
    classifier.predict(image)
    t2 = time.perf_counter_ns()
    if call >= 200:
        raw.append((t1 - t0) / 1e6)
        ours.append((t2 - t1) / 1e6)
print(json.dumps([ours, raw]))
"""


def main() -> None:
    """Measure, and write the record."""
    with tempfile.TemporaryDirectory() as folder:
        bundle = resnet20(Path(folder) / "bundle")
        loads = [_run(LOAD, bundle) for _ in range(LOADS)]
        seconds, megabytes = [row[0][0] for row in loads], [row[1][0] for row in loads]
        ours, raw = _run(PREDICT, bundle, str(CALLS))
    save(
        "embedding",
        [
            Claim("imports, load() and first prediction", median(seconds), "s", 0.5, {"seconds": seconds}),
            Claim("resident memory after it, peak", median(megabytes), "MB", 200, {"megabytes": megabytes}),
            ratio_of_medians("predict() over the raw ONNX Runtime call, batch 1", 1.05, ours, raw),
        ],
    )


def _run(code: str, bundle: Path, *arguments: str) -> list[list[float]]:
    command = [sys.executable, "-c", code, str(bundle), *arguments]
    # Bytecode may be written, as on a user's machine: otherwise every start compiles the package anew.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    result = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    answer: list[list[float]] = json.loads(result.stdout)
    return answer


if __name__ == "__main__":
    main()
