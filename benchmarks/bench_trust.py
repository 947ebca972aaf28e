"""Holds our bench against other tools, and measures what it adds by itself.

    uv run python benchmarks/bench_trust.py

The model is a ResNet-20 for CIFAR-100 with random weights, batch 8, one thread. Compared with, in turns:
- nothing: a backend that does nothing, for the cost of the timing loop;
- ONNX Runtime called by hand: a session of its own and a loop of four lines;
- OpenVINO's benchmark_app, a process of its own each time, against our device-only figure: it fills its inputs once.
  The median that it prints is of the request's own clock, which stops before OpenVINO's call from Python returns; we
  time the whole call. So that the same is compared, what the call takes is added: its loop's time less its requests'.
  Sessions in which the machine's own pace changed are repeated;
- itself: benches in processes of their own. How often the intervals of two of them do not meet is what neighbours and
  memory do from one process to the next, which no interval within a process can know: it is reported, without a limit.
  bench-compare, which loads both sides afresh in each session, must not find the model slower or faster than itself;
- a process that runs the model by hand, for memory.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from models import resnet20
from record import Claim, save

from rkd_deploy.backends import Array, RunOn, load_backend
from rkd_deploy.bench.compare import measure_ratios
from rkd_deploy.bench.loading import random_input
from rkd_deploy.bench.pace import Pace
from rkd_deploy.bench.timing import measure

BATCH = 8
SESSIONS = 15
STEADY = 1.05
"""What the machine's own pace may change by within a session against benchmark_app; else the session is repeated."""
RUNS = 15
"""Benches that are held against one another: 105 pairs."""

BY_HAND = """
import re, sys
import numpy as np, onnxruntime as ort
options = ort.SessionOptions()
options.intra_op_num_threads = 1
session = ort.InferenceSession(sys.argv[1], options)
x = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
for _ in range(100):
    session.run(None, {session.get_inputs()[0].name: x})
print(int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read()).group(1)) * 1024)
"""

BENCH = """
import json, re, sys
from pathlib import Path
from rkd_deploy.cli import app
model, seconds, folder = sys.argv[1:4]
app(["bench", model, "--threads", "1", "--batch", "8", "--end-to-end", "--seconds", seconds, "--output", folder],
    standalone_mode=False)
(result,) = json.loads((Path(folder) / "bench.json").read_text())["results"]
after = int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read()).group(1)) * 1024
# The bench resets the kernel's peak before it measures: the peak of the whole is the larger of the two.
kept = ("p50_ms", "p50_low_ms", "p50_high_ms", "pace_ms")
print(json.dumps({"peak": max(result["resident_peak_bytes"], after), **{key: result[key] for key in kept}}))
"""


def main() -> None:
    """Measure, and write the record."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = resnet20(folder / "bundle") / "model.onnx"
        claims = [loop_cost(), by_hand(model), *benchmark_app(model), *itself(model, folder / "out")]
    save("bench_trust", claims)


def loop_cost() -> Claim:
    """Time of a measurement of nothing, over its calls."""

    class Nothing:
        name = "nothing"

        def infer(self, x: Array) -> None:
            return None

    costs = []
    for _ in range(9):
        calls = 200_000
        started = time.perf_counter_ns()
        measure(Nothing(), np.zeros(1), min_seconds=0, min_runs=calls, warmup_seconds=0, warmup_runs=0)  # type: ignore[arg-type]
        costs.append((time.perf_counter_ns() - started) / calls / 1000)
    return Claim("our timing loop, a call, the empty call in it", median(costs), "us", 2.0, {"us": costs})


def by_hand(model: Path) -> Claim:
    """ONNX Runtime through our backend over ONNX Runtime by hand, both loaded afresh in each session."""
    ours, theirs = [], []
    for number in range(SESSIONS):
        with load_backend("onnxruntime", model, threads=1) as backend:
            x = random_input(backend, None, BATCH, seed=number)
            run = _session_by_hand(model, x)
            medians: dict[bool, list[float]] = {True: [], False: []}
            for turn in range(4):
                for is_ours in (True, False) if (turn + number) % 2 else (False, True):
                    if is_ours:
                        medians[True].append(measure(backend, x, min_seconds=0.3, warmup_seconds=0.05).p50)
                    else:
                        medians[False].append(_loop_by_hand(run))
        ours.append(median(medians[True]))
        theirs.append(median(medians[False]))
    return _off_one("ONNX Runtime through our backend over by hand, off 1", ours, theirs)


def _session_by_hand(model: Path, x: Array) -> Callable[[], object]:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(model), options)
    return lambda: session.run(["logits"], {"input": x})


def _loop_by_hand(run: Callable[[], object]) -> float:
    samples, end = [], time.perf_counter() + 0.35
    while (start := time.perf_counter()) < end:
        run()
        samples.append(1000 * (time.perf_counter() - start))
    return median(samples)


def benchmark_app(model: Path) -> list[Claim]:
    """OpenVINO through our backend over its own tool, in turns."""
    ours, printed, calls = [], [], []
    pace = Pace(1)
    for number in range(6 * SESSIONS):
        turns, paces = {}, [_pace_now(pace)]
        for turn in (_ours, _benchmark_app) if number % 2 else (_benchmark_app, _ours):
            turns[turn] = turn(model)
            paces.append(_pace_now(pace))
        # A neighbour that comes or goes between two turns of a second would be all that is measured.
        if max(paces) > STEADY * min(paces):
            continue
        request, call = turns[_benchmark_app]
        ours.append(turns[_ours][0])
        printed.append(request)
        calls.append(request + call)
        if len(ours) == SESSIONS:
            break
    pace.close()
    print(f"{len(ours)} of {number + 1} sessions at a steady pace")
    if not ours:
        raise SystemExit("The pace of this machine changed in every session: measure when it has less else to do.")
    what = "OpenVINO through our backend over benchmark_app"
    return [
        _off_one(f"{what}, off 1", ours, calls),
        _off_one(f"{what}'s requests without the call from Python, off 1", ours, printed, limit=None),
    ]


def _pace_now(pace: Pace) -> float:
    return median(pace() for _ in range(25))


def _ours(model: Path) -> tuple[float, float]:
    with load_backend("openvino", model, threads=1) as backend:
        x = random_input(backend, None, BATCH, seed=0)
        return measure(backend, x, min_seconds=1.0, warmup_seconds=0.3, transfers=False).p50, 0.0


def _benchmark_app(model: Path) -> tuple[float, float]:
    """The median of its requests, and what the call adds to a request, in ms."""
    tool = Path(sys.executable).with_name("benchmark_app")
    options = [
        "-d",
        "CPU",
        "-api",
        "sync",
        "-hint",
        "none",
        "-nstreams",
        "1",
        "-nthreads",
        "1",
        "-infer_precision",
        "f32",
        "-t",
        "1",
    ]
    options += ["-inference_only", "true"]  # else it fills its inputs anew in every iteration
    shape = ["-data_shape", f"[{BATCH},32,32,3]"]
    done = subprocess.run([str(tool), "-m", str(model), *options, *shape], check=True, capture_output=True, text=True)
    printed = {
        key: float(value) for key, value in re.findall(r"(Count|Duration|Median|Average):\s+([\d.]+)", done.stdout)
    }
    return printed["Median"], printed["Duration"] / printed["Count"] - printed["Average"]


def itself(model: Path, folder: Path) -> list[Claim]:
    """Benches of the same model, each in its own process: do they agree, and what do they hold."""
    benches = [_bench(model, "2.5", folder) for _ in range(RUNS)]
    pairs = list(combinations(benches, 2))
    apart = [a["p50_low_ms"] > b["p50_high_ms"] or b["p50_low_ms"] > a["p50_high_ms"] for a, b in pairs]
    ends: dict[str, Any] = {
        key: [bench[key] for bench in benches] for key in ("p50_ms", "p50_low_ms", "p50_high_ms", "pace_ms")
    }
    hand = [float(_answer(BY_HAND, model)) / 1e6 for _ in range(3)]
    peaks = [bench["peak"] / 1e6 for bench in benches]
    ratios = [measure_ratios(model, model, RunOn(threads=1), batches=(BATCH,))[0] for _ in range(RUNS)]
    wrong = [ratio for ratio in ratios if ratio.verdict != "not shown"]
    sides = {
        "ratio": [ratio.ratio for ratio in ratios],
        "low": [ratio.low for ratio in ratios],
        "high": [ratio.high for ratio in ratios],
    }
    apart_claim = "pairs of benches in 100 whose intervals do not meet"
    return [
        Claim(apart_claim, 100 * sum(apart) / len(pairs), "pairs", None, ends),
        Claim(
            "bench-compare of a model with itself that finds a difference, in 100",
            100 * len(wrong) / RUNS,
            "",
            10,
            sides,
        ),
        Claim(
            "peak memory of a bench over the model's by hand",
            median(peaks) - median(hand),
            "MB",
            150,
            {"bench": peaks, "by_hand": hand},
        ),
    ]


def _bench(model: Path, seconds: str, folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(_answer(BENCH, model, seconds, str(folder)))
    return result


def _answer(code: str, model: Path, *arguments: str) -> str:
    command = [sys.executable, "-c", code, str(model), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]


def _off_one(what: str, ours: list[float], theirs: list[float], limit: float | None = 0.02) -> Claim:
    ratios = [our_ms / their_ms for our_ms, their_ms in zip(ours, theirs, strict=True)]
    print(f"{what}: ratio {median(ratios):.4f}, of sessions {min(ratios):.4f} to {max(ratios):.4f}")
    samples = {"ours_ms": ours, "theirs_ms": theirs}
    return Claim(what, abs(median(ratios) - 1), "ratio", limit, samples)


if __name__ == "__main__":
    main()
