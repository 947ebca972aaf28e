"""Times the student's step with channels_last and with compile, over the step without.

    uv run python benchmarks/train_settings.py

The step of train_step.py: ResNet-56 teaches S cut from ResNet-20, batch 64 at 32x32. The sides alternate; compilation
and the other side's warm-up are not counted.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from record import Claim, ratio_of_medians, save
from train_step import BATCH, CLASSES, build_case

from rkd_deploy.recipe import TrainRecipe
from rkd_deploy.train.stepping import Stepper

STEPS, WARM_UPS = 15, 3
SETTINGS: tuple[dict[str, Any], ...] = ({"channels_last": True}, {"compile": True})


def main() -> None:
    """Measure, and write the record."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    save("train_settings", [_over_plain(setting, device) for setting in SETTINGS])


def _over_plain(setting: dict[str, Any], device: torch.device) -> Claim:
    x_NCHW = torch.randn(BATCH, 3, 32, 32, device=device)
    y_N = torch.randint(0, CLASSES, (BATCH,), device=device)
    steppers = [_stepper(how, device) for how in (setting, {})]
    samples: list[list[float]] = [[], []]
    for number in range(WARM_UPS + STEPS):
        for stepper, seconds in zip(steppers, samples, strict=True):
            began = time.perf_counter()
            stepper.step(x_NCHW, y_N, 1e-4)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if number >= WARM_UPS:
                seconds.append(time.perf_counter() - began)
    (name,) = setting
    return ratio_of_medians(f"student step with {name} over plain", 1.0, *samples)


def _stepper(how: dict[str, Any], device: torch.device) -> Stepper:
    method, _ = build_case("student step", device)
    stepper = Stepper(method, TrainRecipe(**how))
    stepper.start_epoch(1)
    return stepper


if __name__ == "__main__":
    main()
