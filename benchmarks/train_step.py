"""What a training step costs beyond its bare forward and backward passes.

    uv run python benchmarks/train_step.py

ResNet-56 teaches S and A cut from ResNet-20, batch 64 at 32x32, on random images. A step is all of it: loader with crop
and flip, losses, backward, optimiser, sums for the log, progress. The bare passes are the same networks' forward and
backward passes alone, on a batch that is there already. The two alternate.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch
from record import Claim, ratio_of_medians, save
from torch import Tensor

from rkd_deploy.data.loader import DeviceLoader, Normaliser
from rkd_deploy.data.sources import Split
from rkd_deploy.models import zoo
from rkd_deploy.models.residual import ResidualStudent
from rkd_deploy.models.separation import separate
from rkd_deploy.recipe import TrainRecipe
from rkd_deploy.train.methods.base import Method
from rkd_deploy.train.methods.cross_entropy import CrossEntropy
from rkd_deploy.train.methods.residual import AssistantStep, StudentStep
from rkd_deploy.train.progress import Silent
from rkd_deploy.train.stepping import Stepper
from rkd_deploy.train.sums import EpochSums

STEPS = 25
BATCH = 64
CLASSES = 100


def main() -> None:
    """Measure and record."""
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    separation = separate("resnet20", num_classes=CLASSES, input_size=32)
    T = zoo.create("resnet56", CLASSES).to(device).eval()
    S0 = zoo.create("resnet20", CLASSES).to(device)
    model = ResidualStudent(separation.student, separation.assistants, 64, CLASSES).to(device)
    x = torch.randn(BATCH, 3, 32, 32, device=device)

    def teacher() -> None:
        with torch.no_grad():
            T.features(x)

    def student_frozen() -> None:
        with torch.no_grad():
            model.student_map(x)

    def both(forward: Callable[[Tensor], Tensor]) -> None:
        out = forward(x)
        out.backward(torch.ones_like(out))  # type: ignore[no-untyped-call]

    def student_bare() -> None:
        teacher()
        both(model.student_map)

    def assistant_bare() -> None:
        teacher()
        student_frozen()
        both(model.assistant_map)

    claims: list[Claim] = []
    methods: list[tuple[str, Method, Callable[[], None]]] = [
        ("cross-entropy step, S0", CrossEntropy(S0), lambda: both(S0)),
        ("student step", StudentStep(T, model, 1.0), student_bare),
        ("assistant step", AssistantStep(T, model, 1.0), assistant_bare),
    ]
    for name, method, bare in methods:
        _unfreeze(method, model)
        claims.append(_measure(name, method, bare, device))
    save("train_step", claims)


def _unfreeze(method: Method, model: ResidualStudent) -> None:
    """Building the methods one after the other leaves the marks of the last: set those of this one again."""
    if isinstance(method, StudentStep | AssistantStep):
        learner = "student" if isinstance(method, StudentStep) else "assistant"
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(learner))


def _measure(name: str, method: Method, bare: Callable[[], None], device: torch.device) -> Claim:
    method.train()
    step = _steps(method, device)
    full_s, bare_s = [], []
    for number in range(STEPS + 3):
        times = (_seconds(bare, device), _seconds(lambda: next(step), device))
        if number >= 3:
            bare_s.append(times[0])
            full_s.append(times[1])
    return ratio_of_medians(f"{name} over its bare passes", 1.15, full_s, bare_s)


def _steps(method: Method, device: torch.device) -> Iterator[None]:
    recipe = TrainRecipe()
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (BATCH * (STEPS + 3), 3, 32, 32), dtype=torch.uint8, generator=generator).to(device)
    labels = torch.randint(0, CLASSES, (len(images),), generator=generator).to(device)
    normalise = Normaliser((0.5, 0.5, 0.5), (0.25, 0.25, 0.25), device)
    split = Split(images_NCHW=images, labels_N=labels)
    loader = DeviceLoader(split, normalise, batch_size=BATCH, augmentations=("crop", "flip"), crop_padding=4, seed=0)
    stepper, sums, display = Stepper(method, recipe), EpochSums(), Silent()
    for number, (x, y) in enumerate(loader.epoch(0), 1):
        sums.add(stepper.step(x, y, 1e-4), y, number)
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
