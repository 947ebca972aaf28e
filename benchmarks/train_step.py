"""What a training step costs beyond its bare forward and backward passes.

    uv run python benchmarks/train_step.py

ResNet-56 teaches S and A cut from ResNet-20, batch 64 at 32x32, on random images. A step is all of it: loader with crop
and flip, losses, backward, optimiser, sums for the log, progress. The bare passes are the same networks' forward and
backward passes alone, on a batch that is there already. The two alternate. On CUDA the step
as it is recorded (`train.cuda_graphs`; benchmarks/recorded_step.py has its parts) is compared with the eager one. Peak
memory is compared the same way, each side in a process of its own: by PyTorch's allocator on CUDA, elsewhere resident
memory, without code and data set.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import torch
from record import Claim, ratio_of_medians, save
from torch import Tensor

from rkd_deploy.bench.machine import reset_peak, resident_bytes, resident_peak_bytes
from rkd_deploy.data.loader import DeviceLoader, Normaliser
from rkd_deploy.data.sources import Split
from rkd_deploy.models import zoo
from rkd_deploy.models.residual import ResidualStudent
from rkd_deploy.models.separation.separate import separate
from rkd_deploy.recipe import TrainRecipe
from rkd_deploy.train.display import Silent
from rkd_deploy.train.methods.base import Method
from rkd_deploy.train.methods.baseline import CrossEntropy
from rkd_deploy.train.methods.residual import AssistantStep, StudentStep
from rkd_deploy.train.recording import EagerSteps, RecordedSteps
from rkd_deploy.train.state import EpochSums
from rkd_deploy.train.stepping import Stepper

STEPS = 25
BATCH = 64
CLASSES = 100
CASES = ("cross-entropy step, S0", "student step", "assistant step")


def main() -> None:
    """Measure and record; with a case and a side as arguments, print the peak memory of that alone."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if len(sys.argv) == 3:
        print(_own_peak(sys.argv[1], sys.argv[2], device))
        return
    claims = []
    for case in CASES:
        method, bare = build_case(case, device)
        claims.append(_time(case, method, bare, device))
        if device.type == "cuda":
            claims.append(_time_recorded(case, device))
    save("train_step", claims + [_memory(case) for case in CASES])


def build_case(name: str, device: torch.device) -> tuple[Method, Callable[[], None]]:
    """One of `CASES`: a method, and the bare passes of its networks."""
    torch.manual_seed(0)
    x = torch.randn(BATCH, 3, 32, 32, device=device)

    def both(forward: Callable[[Tensor], Tensor]) -> None:
        out = forward(x)
        out.backward(torch.ones_like(out))  # type: ignore[no-untyped-call]

    if name == "cross-entropy step, S0":
        S0 = zoo.create("resnet20", CLASSES).to(device)
        return CrossEntropy(S0), lambda: both(S0)
    separation = separate("resnet20", num_classes=CLASSES, input_size=32)
    T = zoo.create("resnet56", CLASSES).to(device).eval()
    model = ResidualStudent(separation.student, separation.assistants, 64, CLASSES).to(device)

    def student_bare() -> None:
        with torch.no_grad():
            T.features(x)
        both(model.student_map)

    def assistant_bare() -> None:
        with torch.no_grad():
            T.features(x)
            model.student_map(x)
        both(model.assistant_map)

    if name == "student step":
        return StudentStep(T, model, 1.0), student_bare
    return AssistantStep(T, model, 1.0), assistant_bare


def _time(name: str, method: Method, bare: Callable[[], None], device: torch.device) -> Claim:
    method.train()
    step = _steps(method, _loader(device))
    full_s, bare_s = [], []
    for number in range(STEPS + 3):
        times = (_seconds(bare, device), _seconds(lambda: next(step), device))
        if number >= 3:
            bare_s.append(times[0])
            full_s.append(times[1])
    return ratio_of_medians(f"{name} over its bare passes", 1.10, full_s, bare_s)


def _time_recorded(name: str, device: torch.device) -> Claim:
    eager, recorded = (_steps(build_case(name, device)[0], _loader(device), recorded=how) for how in (False, True))
    eager_s, recorded_s = [], []
    for number in range(STEPS + 3):
        times = (_seconds(lambda: next(eager), device), _seconds(lambda: next(recorded), device))
        if number >= 3:
            eager_s.append(times[0])
            recorded_s.append(times[1])
    return ratio_of_medians(f"{name}, recorded, over the eager one", 1.0, recorded_s, eager_s)


def _memory(name: str) -> Claim:
    """Peaks of fresh processes, beyond the images; each tensor is mapped alone, so that the allocator keeps none."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    peaks: dict[str, list[float]] = {"full": [], "bare": []}
    for _ in range(3):
        for side, megabytes in peaks.items():
            command = [sys.executable, __file__, name, side]
            run = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            megabytes.append(float(run.stdout))
    return ratio_of_medians(f"peak memory of {name} over its bare passes", 1.2, peaks["full"], peaks["bare"])


def _own_peak(name: str, side: str, device: torch.device) -> float:
    loader = _loader(device)
    _run(name, side, loader, device)  # loads code and what is imported on first use: no memory of the passes
    gc.collect()
    reset_peak()
    before = (resident_bytes() or 0) / 1e6
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device) / 1e6
    _run(name, side, loader, device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6 - before
    return (resident_peak_bytes() or 0) / 1e6 - before


def _run(name: str, side: str, loader: DeviceLoader, device: torch.device) -> None:
    method, bare = build_case(name, device)
    method.train()
    step = _steps(method, loader)
    for _ in range(6):
        if side == "full":
            next(step)
        else:
            bare()


def _loader(device: torch.device) -> DeviceLoader:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (BATCH * (STEPS + 3), 3, 32, 32), dtype=torch.uint8, generator=generator).to(device)
    labels = torch.randint(0, CLASSES, (len(images),), generator=generator).to(device)
    split = Split(images_NCHW=images, labels_N=labels)
    normalise = Normaliser((0.5, 0.5, 0.5), (0.25, 0.25, 0.25), device)
    return DeviceLoader(split, normalise, batch_size=BATCH, augmentations=("crop", "flip"), crop_padding=4, seed=0)


def _steps(method: Method, loader: DeviceLoader, *, recorded: bool = False) -> Iterator[None]:
    recipe, display = TrainRecipe(), Silent()
    stepper = Stepper(method, recipe)
    steps: EagerSteps | RecordedSteps = EagerSteps(stepper, loader)
    if recorded:
        steps = RecordedSteps(method, stepper.optimizer, recipe, loader)
    stepper.start_epoch(1)
    for _ in steps.epoch(0, 0, EpochSums(), [1e-4] * len(loader)):
        display.step()
        yield


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
