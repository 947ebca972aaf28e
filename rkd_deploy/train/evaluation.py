"""Judges networks on a split: what they answer, whether they guess, and a run's final results."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import resource
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rkd_deploy.bench.accuracy import top1
from rkd_deploy.data.loader import Normaliser
from rkd_deploy.data.splits import AnySplit, evaluation_batch
from rkd_deploy.errors import DataError
from rkd_deploy.models.cost import count
from rkd_deploy.models.foreign import check_logits
from rkd_deploy.recipe import Recipe
from rkd_deploy.train import networks
from rkd_deploy.train.facts import PartMetrics, PhaseMetrics, RunFacts, RunMetrics
from rkd_deploy.train.log import EpochRow, read_epochs
from rkd_deploy.train.loop import Display
from rkd_deploy.train.runs import Run
from rkd_deploy.train.verdict import CONTROLS, pairs_of


@torch.inference_mode()
def predictions(
    module: nn.Module,
    split: AnySplit,
    normalise: Normaliser,
    step: Callable[[Tensor], object] | None = None,
    name: str | None = None,
) -> Tensor:
    """The most likely class of every image, [N] int64 on the CPU; the module is left in the mode it was in.

    Args:
        module: Images to logits.
        split: The images.
        normalise: uint8 to the network's input.
        step: Called with the images of each batch, uint8 [n, 3, H, W], once it is done.
        name: What messages call the network. Default: its class.

    Raises:
        DivergenceError: The logits are not finite: every class would be as likely, and the first one be counted.
        UsageError: It gives probabilities in place of logits.
    """
    was_training = module.training
    module.eval()
    classes = []
    for images_NCHW in split.chunks(evaluation_batch(split.image_size)):
        logits_NK = module(normalise(images_NCHW))
        check_logits(logits_NK, name or f"the network {type(module).__name__}")
        classes.append(logits_NK.argmax(1).cpu())
        if step is not None:
            step(images_NCHW)
    module.train(was_training)
    return torch.cat(classes)


def split_top1(module: nn.Module, split: AnySplit, normalise: Normaliser, name: str | None = None) -> float:
    """Top-1 accuracy of a network on a split, in %; arguments and errors as for `predictions`."""
    return top1(predictions(module, split, normalise, name=name).numpy(), split.labels_N.cpu().numpy())


class SplitHash:
    """SHA-256 of a split as a network is judged on it: height and width, decoded pixels in order, labels.

    Args:
        image_size: Height and width in pixels.
    """

    def __init__(self, image_size: tuple[int, int]) -> None:
        self._sum = hashlib.sha256(str(tuple(image_size)).encode())

    def add(self, images_NCHW: Tensor) -> None:
        """Hash the next images, uint8 [n, 3, H, W]; how many at once makes no difference."""
        self._sum.update(images_NCHW.cpu().contiguous().numpy().data)

    def finish(self, labels_N: Tensor) -> str:
        """The hash in hexadecimal, with the labels of all images, int64 [N]."""
        self._sum.update(labels_N.cpu().contiguous().numpy().data)
        return self._sum.hexdigest()


def batches(split: AnySplit) -> int:
    """How many batches `predictions` makes of these images."""
    return math.ceil(len(split) / evaluation_batch(split.image_size))


def evaluate(run: Run, test: AnySplit, normalise: Normaliser, device: torch.device, display: Display) -> RunMetrics:
    """Judge every network of a run, all phases of which are done, on the test images.

    Args:
        run: The run.
        test: The test images.
        normalise: uint8 to the networks' input.
        device: Where the networks run.
        display: Shows progress.

    Raises:
        RkdError: As `predictions` raises it; or a file of the run is damaged.
    """
    recipe = run.recipe
    began, names = time.perf_counter(), networks.parts_of(recipe)
    display.phase("test", 1, len(names) * batches(test), 0)
    labels = test.labels_N.cpu().numpy()
    judged = SplitHash(test.image_size)
    parts: dict[str, PartMetrics] = {}
    right: dict[str, list[bool]] = {}

    def step(images_NCHW: Tensor) -> None:
        # All parts are judged on the same images, which are decoded anew for each: hashed along with the first.
        if not parts:
            judged.add(images_NCHW)
        display.step()

    for part in names:
        module = networks.load_part(run, part).to(device)
        predicted = predictions(module, test, normalise, step, networks.PARTS[part]).numpy()
        right[part] = (predicted == labels).tolist()
        cost = count(module, run.facts.image_size)
        metrics = PartMetrics(
            test_top1=top1(predicted, labels),
            test_images=len(test),
            parameters=cost.parameters,
            macs=cost.macs,
            unsupported_operators=tuple(cost.unsupported),
        )
        other = networks.other_weights(recipe)
        if other is not None and run.weights(f"{networks.phase_of(recipe, part)}_{other}").exists():
            module = networks.load_part(run, part, other).to(device)
            accuracy = split_top1(module, test, normalise, networks.PARTS[part])
            if other == "ema":
                metrics = dataclasses.replace(metrics, test_top1_ema=accuracy)
            else:
                metrics = dataclasses.replace(metrics, test_top1_last=accuracy)
        parts[part] = metrics
    phases = _phases(run)
    controls = [part for part in CONTROLS if part in right] if "fused" in right else []
    return RunMetrics(
        parts=parts,
        pairs={part: pairs_of(right["fused"], right[part]) for part in controls},
        phases=phases,
        training_seconds=sum(phase.seconds for phase in phases.values()),
        evaluation_seconds=time.perf_counter() - began,
        peak_memory_mb=_peak_memory_mb(device),
        test_sha256=judged.finish(test.labels_N),
        files=run.sealed_files(),
    )


def _phases(run: Run) -> dict[str, PhaseMetrics]:
    """Results of every phase, from the log: its last epoch, which ships, and its best on the held-out images."""
    phases: dict[str, PhaseMetrics] = {}
    for row in read_epochs(run.log.path):
        phase = phases.get(row.phase, PhaseMetrics(epochs=0, seconds=0.0))
        val_top1 = row.val_top1
        phase = dataclasses.replace(
            phase,
            epochs=row.epoch,
            seconds=phase.seconds + row.seconds,
            val_top1_last=val_top1,
            val_top1_ema_last=row.val_top1_ema,
        )
        if val_top1 is not None and val_top1 > (-1.0 if phase.val_top1_best is None else phase.val_top1_best):
            phase = dataclasses.replace(phase, val_top1_best=val_top1, best_epoch=row.epoch)
        phases[row.phase] = phase
    return phases


def _peak_memory_mb(device: torch.device) -> float:
    """Largest memory used on the GPU, or by this process on a CPU, in 10^6 bytes; of a resumed run, since then."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


_FEW = 20  # held-out images: of fewer, a good network too may get hardly any right


def near_chance(top1: float, classes: int) -> bool:
    """Whether an accuracy is hardly better than guessing.

    That is below three times chance; where classes are few and chance is high, below a fifth of the way from chance to
    100 %.

    Args:
        top1: In %.
        classes: K; chance is 100 / K %.
    """
    chance = 100 / classes
    return top1 < min(3 * chance, chance + (100 - chance) / 5)


def refuse_guessing(what: str, top1: float, images: int, facts: RunFacts, known: bool) -> None:
    """Refuse a loaded network that guesses on the data: it is fed wrongly, and hours of imitating it would be lost.

    Args:
        what: Which network, from where, for the message.
        top1: Accuracy of the network in %.
        images: How many images that was measured on.
        facts: Classes and normalisation of the data.
        known: Whether the normalisation it expects is known.

    Raises:
        DataError: The accuracy is near chance.
    """
    if not near_chance(top1, len(facts.classes)):
        return
    normalisation = "" if known else f"; its normalisation is not recorded, the data's is mean {list(facts.mean)}"
    raise DataError(
        f"{what} classifies {top1:.1f} % of {images} training images right, chance is "
        f"{100 / len(facts.classes):.1f} %: it was trained on other classes, another order of them, or another "
        f"normalisation{normalisation}. State the right ones in [data] (mean, std, name), or the order of the "
        "checkpoint's classes: timm sorts folder 2 before 10, and a file with its class names, one a line, is "
        "teacher.labels or student.labels."
    )


def teacher_warning(row: EpochRow, images: int, classes: Sequence[str], recipe: Recipe) -> dict[str, Any]:
    """The warning of log and terminal about a teacher that was trained here and guesses; empty where it does not.

    Args:
        row: The teacher's last epoch, a line of the log.
        images: How many are held out; with a few or none, nothing can be said.
        classes: Names of the classes.
        recipe: What the teacher was trained by.
    """
    top1 = row.val_top1_ema if recipe.train.ship == "ema" else row.val_top1
    if top1 is None or images < _FEW or not near_chance(top1, len(classes)):
        return {}
    chance = 100 / len(classes)
    text = (
        f"The teacher classifies {top1:.1f} % of {images:,} held-out images right, and chance is {chance:.1f} %: what "
        "S and A imitate is no better than noise. Train it for longer or at another rate (--set "
        f"teacher.epochs={2 * row.epoch}, teacher.lr), or give one that is trained (--set teacher.checkpoint=FILE)."
    )
    return {"phase": row.phase, "text": text, "val_top1": top1, "chance": chance}
