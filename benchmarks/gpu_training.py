"""Part `training` of gpu.py: time of a training step, phase by phase, beside its floor.

ResNet-56 teaches S0 (KD) and S + A of ResNet-20 on random images of CIFAR's size. A step is an epoch's seconds over its
batches, as the log of the run has them: loading, augmenting, update and sums for the log.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from floors import Work, forward_work
from gpu_rows import Rows, check_time

from rkd_deploy.data.splits import ImageSet, Split
from rkd_deploy.models import zoo
from rkd_deploy.models.separation.separate import separate
from rkd_deploy.recipe import read_recipe
from rkd_deploy.train import fitting
from rkd_deploy.train.log import read_log

FAST = ("train.amp=true", "train.channels_last=true", "train.cuda_graphs=true")
SETTINGS: Mapping[str, tuple[str, ...]] = {
    "graphs, amp, channels_last": FAST,
    "graphs, amp": ("train.amp=true", "train.cuda_graphs=true"),
    "graphs": ("train.cuda_graphs=true",),
    "eager": (),
}
BATCHES = (64, 512)
CLASSES = 100
METHODS = {"kd": ("method.name=kd",), "sequential": ()}


def run(rows: Rows) -> None:
    """Train on random images under each setting, by worth."""
    for precision, work in _work(rows.tiny).items():
        if f"work, {precision}" not in rows:
            rows.add(f"work, {precision}", precision=precision, work=work)
    settings = SETTINGS if rows.device == "cuda" else {"eager": ()}
    for name, more in settings.items():
        for batch in (16,) if rows.tiny else BATCHES:
            for method, how in METHODS.items():
                key = f"{method}, {name}, batch {batch}"
                if key not in rows:
                    check_time(rows, 5.0)
                    with rows.attempt(key):
                        steps = 2 if rows.tiny else 60 if name == "eager" else 25_600 // batch
                        phases = _trained((*how, *more), batch, steps, rows)
                        precision = "bf16" if "train.amp=true" in more else "fp32"
                        rows.add(key, batch=batch, precision=precision, steps=steps, ms_per_step=phases)


def _trained(settings: tuple[str, ...], batch: int, steps: int, rows: Rows) -> dict[str, float]:
    """Milliseconds of a step by phase, of its last epoch."""
    teacher, student = ("resnet14", "resnet8") if rows.tiny else ("resnet56", "resnet20")
    recipe = read_recipe(
        None,
        (
            "name=gpu",
            "data.name=cifar100",
            "data.val_fraction=0",
            f"teacher.name={teacher}",
            "teacher.epochs=2",
            f"student.name={student}",
            "student.control=false",
            "train.epochs=2",
            f"train.batch_size={batch}",
            "train.lr=0.001",
            "train.curves=false",
            "train.tensorboard=false",
            f"train.device={rows.device}",
            *settings,
        ),
    )
    images = _images(batch * steps)
    with (
        tempfile.TemporaryDirectory(prefix="rkd-gpu-") as folder,
        mock.patch.object(fitting, "load_images", return_value=images),
    ):
        run = fitting.fit(recipe, root=Path(folder))
        log = read_log(run.folder / "log.jsonl")
    return {row["phase"]: 1000 * row["seconds"] / steps for row in log}


def _images(count: int) -> ImageSet:
    generator = torch.Generator().manual_seed(0)

    def split(size: int) -> Split:
        images = torch.randint(0, 256, (size, 3, 32, 32), dtype=torch.uint8, generator=generator)
        return Split(images_NCHW=images, labels_N=torch.arange(size) % CLASSES)

    names = tuple(map(str, range(CLASSES)))
    third = (1 / 3,) * 3
    return ImageSet(
        name="cifar100", classes=names, mean=third, std=third, train=split(count), val=split(0), test=split(CLASSES)
    )


def _work(tiny: bool) -> dict[str, Any]:
    """By phase and precision, the work of a step of one image."""
    teacher, s0 = ("resnet14", "resnet8") if tiny else ("resnet56", "resnet20")
    x = torch.zeros(1, 3, 32, 32)
    cut = separate(s0, num_classes=CLASSES, input_size=32)
    networks = {
        "T": zoo.create(teacher, CLASSES),
        "S0": zoo.create(s0, CLASSES),
        "S": cut.student,
        "A": cut.assistant,
    }
    by_precision = {}
    for precision in ("fp32", "bf16"):
        forward = {name: forward_work(network.eval(), x, precision) for name, network in networks.items()}
        phases: dict[str, Work] = {
            "teacher": forward["T"].trained(),
            "s0": forward["T"] + forward["S0"].trained(),
            "student": forward["T"] + forward["S"].trained(),
            "assistant": forward["T"] + forward["S"] + forward["A"].trained(),
        }
        by_precision[precision] = {phase: work.to_dict() for phase, work in phases.items()}
    return by_precision
