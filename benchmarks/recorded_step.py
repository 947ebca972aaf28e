"""Times each speedup of a recorded training step on a GPU, beside the step's floor.

    uv run python benchmarks/recorded_step.py [--seconds 60] [--out recorded_step.json]

The cases of train_step.py at batch 64 and 512, with bfloat16: the eager step; the whole recorded step, host included;
its replay with all speedups, and without one at a time; its kernels by time. What fails is a line in the record and
ends nothing. The floor is the larger of the step's arithmetic at 400 TFLOP/s and its maps' traffic at 3.35 TB/s, each
map read and written by no more kernels than a fused network needs. Written after every line.
"""

from __future__ import annotations

import argparse
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from train_step import BATCH, CASES, CLASSES, build_case

from rkd_deploy.bench.machine import provenance
from rkd_deploy.data.loader import DeviceLoader, Normaliser
from rkd_deploy.data.sources import Split
from rkd_deploy.recipe import TrainRecipe
from rkd_deploy.storage import write_json
from rkd_deploy.train.passes import Speedups
from rkd_deploy.train.recording import RecordedSteps
from rkd_deploy.train.state import EpochSums
from rkd_deploy.train.stepping import Stepper

FLOPS, BYTES = 400e12, 3.35e12
TRAINED_PASSES, FROZEN_PASSES = 14, 2
"""Kernels that read or write a layer's map: of a trained layer forward 5 and backward 9, of a frozen one each once."""
RECIPE = TrainRecipe(batch_size=BATCH, amp=True)
SWITCHES = ("folded", "fused", "meanwhile", "cast_once", "counted_once", "cudnn_benchmark")
REPLAYS = 12  # of `RecordedSteps.timed`, its warm-ups among them
VARIANTS = {
    **{f"without {name}": {name: False} for name in SWITCHES},
    "contiguous": {"channels_last": False},
    "recorded alone": {**dict.fromkeys(SWITCHES, False), "channels_last": False},
}
ORDER = [(case, batch) for case in (CASES[1], CASES[2], CASES[0]) for batch in (64, 512)]


def main() -> None:
    """Measure until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--out", type=Path, default=Path("recorded_step.json"))
    parser.add_argument("--only", nargs="*", metavar="LINE", help="these lines alone, e.g. recorded compiled")
    options = parser.parse_args()
    end = time.perf_counter() + options.seconds
    device = torch.device("cuda")
    record: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "cases": []}
    record["provenance"] = {"time_utc": provenance().time_utc}
    for case, batch in ORDER:
        row: dict[str, Any] = {"case": case, "batch": batch}
        record["cases"].append(row)
        tasks: dict[str, Callable[[], Any]] = {
            "floor": partial(_floor, case, batch, device),
            "eager": partial(_eager, case, batch, device),
            "recorded": partial(_recorded, case, batch, device, Speedups()),
            "compiled": partial(_recorded, case, batch, device, Speedups(channels_last=True, compiled=True)),
        }
        if case == CASES[1]:
            for name, switches in VARIANTS.items():
                speedups = replace(Speedups(channels_last=True), **switches)
                tasks[name] = partial(_recorded, case, batch, device, speedups, whole=False)
        for name, task in tasks.items():
            if options.only and name not in options.only:
                continue
            if time.perf_counter() > end:
                row[name] = "no time"
                continue
            began = time.perf_counter()
            try:
                row[name] = task()
            except Exception:
                row[name] = {"error": traceback.format_exc()[-6000:]}
            print(case, batch, name, f"({time.perf_counter() - began:.1f} s)", _brief(row[name]), flush=True)
            write_json(options.out, record)


def _brief(value: Any) -> Any:
    return {key: entry for key, entry in value.items() if key != "kernels"} if isinstance(value, dict) else value


def _loader(batch: int, device: torch.device) -> DeviceLoader:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (batch * 60, 3, 32, 32), dtype=torch.uint8, generator=generator).to(device)
    labels = torch.randint(0, CLASSES, (len(images),), generator=generator).to(device)
    normalise = Normaliser((0.5, 0.5, 0.5), (0.25, 0.25, 0.25), device)
    split = Split(images_NCHW=images, labels_N=labels)
    return DeviceLoader(split, normalise, batch_size=batch, augmentations=("crop", "flip"), crop_padding=4, seed=0)


def _floor(case: str, batch: int, device: torch.device) -> dict[str, float]:
    """Milliseconds that arithmetic and the maps' traffic take at least."""
    method, _ = build_case(case, device)
    method.train()
    values = 0

    def count(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        nonlocal values
        trained = module.get_parameter("weight").requires_grad
        values += output.numel() * (TRAINED_PASSES if trained else FROZEN_PASSES)

    handles = [m.register_forward_hook(count) for m in method.modules() if isinstance(m, nn.Conv2d)]
    x_NCHW, y_N = next(_loader(batch, device).epoch(0))
    with FlopCounterMode(display=False) as counter:
        method(x_NCHW, y_N).total.backward()
    for handle in handles:
        handle.remove()
    arithmetic, traffic = 1e3 * counter.get_total_flops() / FLOPS, 1e3 * 2 * values / BYTES
    return {"arithmetic_ms": arithmetic, "traffic_ms": traffic, "floor_ms": max(arithmetic, traffic)}


def _eager(case: str, batch: int, device: torch.device) -> dict[str, float]:
    method, _ = build_case(case, device)
    stepper, sums, loader = Stepper(method, RECIPE), EpochSums(), _loader(batch, device)
    stepper.start_epoch(1)
    began = 0.0
    for number, (x, y) in enumerate(loader.epoch(0)):
        if number == 10:
            began = _now()
        sums.add(stepper.step(x, y, 1e-3), y, number + 1)
        if number == 29:
            break
    return {"step_ms": 1e3 * (_now() - began) / 20, **sums.means()}


def _recorded(case: str, batch: int, device: torch.device, speedups: Speedups, *, whole: bool = True) -> dict[str, Any]:
    method, _ = build_case(case, device)
    stepper, loader = Stepper(method, RECIPE), _loader(batch, device)
    steps = RecordedSteps(method, stepper.optimizer, RECIPE, loader, speedups)
    stepper.start_epoch(1)
    rates = [1e-3] * len(loader)
    began = _now()
    sums = EpochSums()
    for number, _ in enumerate(steps.epoch(0, 0, sums, rates), 1):
        if number == 30:
            break
    row: dict[str, Any] = {"recording_s": _now() - began, **sums.means(), "replay_ms": steps.timed()}
    row |= {
        "layouts": steps.replay_ms,
        "channels_last": steps.channels_last,
        "copies": steps.passes.copies,
    }
    if whole:
        seconds = []
        for epoch in range(1, 4):
            began = _now()
            sums = EpochSums()
            list(steps.epoch(epoch, 0, sums, rates))
            sums.means()
            seconds.append(_now() - began)
        row["whole_ms"] = 1e3 * min(seconds) / len(loader)
        row["kernels"] = _kernels(steps)
        row["launches"] = sum(kernel["count"] for kernel in row["kernels"])
        row["busy_ms"] = sum(kernel["us"] for kernel in row["kernels"]) / 1e3
    return row


def _kernels(steps: RecordedSteps) -> list[dict[str, Any]]:
    """Kernels of one replay by their time on the device."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        steps.timed()
    rows = [
        {"name": event.key[:160], "us": event.self_device_time_total / REPLAYS, "count": event.count / REPLAYS}
        for event in profile.key_averages()
        if event.self_device_time_total > 0
    ]
    return sorted(rows, key=lambda row: -row["us"])


def _now() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
