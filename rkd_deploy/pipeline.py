"""Joins training, export and bench: from a run folder to a bundle, and the quickstart.

Everything here is glue; each step is a public function of its own package.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rkd_deploy.backends import Array, describe_model
from rkd_deploy.backends.files import check_files
from rkd_deploy.bench import BenchSettings, Result, bench
from rkd_deploy.bench.reading import read_bench
from rkd_deploy.bench.records import write_record
from rkd_deploy.bench.timing import Progress
from rkd_deploy.card import ModelCard, Preprocess
from rkd_deploy.data.sources import AnySplit, ImageSet, load_images
from rkd_deploy.data.splits import evaluation_batch
from rkd_deploy.errors import DataError, RkdError, UsageError
from rkd_deploy.export.bundle import export_bundle
from rkd_deploy.export.early_exit import EarlyExit
from rkd_deploy.export.levels import Target
from rkd_deploy.export.precision.images import Calibration, PrecisionJob, calibration_from_folder, draw_indices
from rkd_deploy.export.precision.options import QUANTISED, PrecisionOptions
from rkd_deploy.export.proving import TOLERANCE, Proof
from rkd_deploy.recipe import DataRecipe
from rkd_deploy.report.writing import Tables, write_tables
from rkd_deploy.storage import sha256_of
from rkd_deploy.train.embedded import embedded_recipe
from rkd_deploy.train.fitting import fit
from rkd_deploy.train.loop import Display
from rkd_deploy.train.networks import PARTS, load_part, parts_of, phase_of
from rkd_deploy.train.runs import Run

CHUNK = 256
HELD_OUT = 2000
"""Images to judge on, at most: one of them is 0.05 points."""


@dataclass(frozen=True)
class SplitBatches:
    """A split chunk by chunk, as backends take it, as often as it is asked for."""

    split: AnySplit

    def __iter__(self) -> Iterator[tuple[Array, Array]]:
        """Images uint8 [n, H, W, C] and labels [n]."""
        labels_N, done = self.split.labels_N.numpy(), 0
        if not len(labels_N):  # nothing was held out: no batch, where the split would give one without images
            return
        for images_NCHW in self.split.chunks(min(CHUNK, evaluation_batch(self.split.image_size))):
            yield images_NCHW.permute(0, 2, 3, 1).contiguous().numpy(), labels_N[done : done + len(images_NCHW)]
            done += len(images_NCHW)


def precision_job(images: ImageSet, options: PrecisionOptions, preprocess: Preprocess) -> PrecisionJob:
    """Calibrate on a folder or on training images; judge on validation images, or on other training images.

    Args:
        images: The run's data set.
        options: What is asked for.
        preprocess: The model's rule, for a folder.

    Raises:
        DataError: The folder or the data set has too few images.
    """
    train = f"{images.name} training images"
    calibration, taken_N = None, np.empty(0, np.int64)
    if options.precision in QUANTISED and options.calibration is not None:
        calibration = calibration_from_folder(options.calibration, preprocess, options.count, options.seed)
    elif options.precision in QUANTISED:
        taken_N = draw_indices(len(images.train), options.count, options.seed, train)
        pixels_NHWC = np.concatenate([pixels for pixels, _ in SplitBatches(images.train.take(taken_N))])
        calibration = Calibration(pixels_NHWC, train, options.seed)
    if len(images.val):
        pool, left_N, source = images.val, np.arange(len(images.val)), f"{images.name} validation images"
    else:
        pool, left_N = images.train, np.setdiff1d(np.arange(len(images.train)), taken_N)
        source = f"{train} not calibrated on"
    # Another stream than the one that drew the calibration images.
    chosen_N = np.sort(np.random.default_rng(options.seed + 1).permutation(left_N)[:HELD_OUT])
    held_out = SplitBatches(pool.take(chosen_N))
    return PrecisionJob(options=options, held_out=held_out, held_out_source=source, calibration=calibration)


@dataclass(frozen=True)
class Exported:
    """A bundle and the proof that it passed."""

    folder: Path
    proof: Proof


def export_run(
    run: Run,
    *,
    part: str | None = None,
    level: str | None = None,
    outputs: Sequence[str] = ("logits",),
    embedded: bool = True,
    tolerance: float = TOLERANCE,
    with_pytorch: bool = False,
    test_images: bool = True,
    early_exit: bool = False,
    exit_threshold: float | None = None,
    folder: Path | None = None,
    target: Target | None = None,
    progress: Progress | None = None,
    note: Callable[[str], None] | None = None,
    precision: PrecisionOptions | None = None,
) -> Exported:
    """Export one network of a finished run and prove it on the run's test images.

    Args:
        run: From `fit`.
        part: fused (S + A), student, s0 or teacher. Default: what the recipe is for, S + A, or S0 of a baseline.
        level: Fusion level: tail, sum, wide, wide-grouped, or auto. Default: the one that S and A were cut for: wide
            where they lie side by side, else tail.
        outputs: Any of logits, probabilities, features.
        embedded: uint8 [N, H, W, C] in, pre-processing in the graph; else normalised float32 [N, C, H, W].
        tolerance: Largest allowed difference of a logit.
        with_pytorch: Write model.pt2 too.
        test_images: Classify every test image with both; else 64 random images stand in, and nothing is said of
            accuracy.
        early_exit: Write graphs of S and each A too, and report what leaving early saves and costs; the card has it.
        exit_threshold: The confidence at which an image leaves. Default: the lowest that loses nothing on the held-out
            images. Giving one asks for early exit.
        folder: The bundle's. Default: the next free `bundle...` in the run folder.
        target: What level auto measures on.
        progress: Told how far that is.
        note: Called with the name of each stage as it begins.
        precision: Lower than float32: calibrated on a folder or on training images, judged on validation images or,
            where the run has none, on other training images; test images are only reported on.

    Raises:
        GateError: The exported graph does not do what the trained model does, or a lower precision loses too much.
        DataError: The run's images are no longer there, or are now of other classes.
        MissingDependencyError: What converts to the precision, or proves it, is not installed.
    """
    if precision is not None:
        precision.check_installed()
    part, note = part or parts_of(run.recipe)[0], note or (lambda stage: None)
    note(f"rebuilding {PARTS.get(part, part)} with its weights")
    model = load_part(run, part)
    card = _card(run, part, embedded)
    chosen = folder or _free_folder(run, part)
    images, exits = functools.cache(lambda: _images(run)), None
    if test_images:
        note("reading the run's images")
        images()
    if early_exit or exit_threshold is not None:
        reported = SplitBatches(images().test) if test_images else ()
        exits = EarlyExit(threshold=exit_threshold, held_out=SplitBatches(images().val), test=reported)
    proof = export_bundle(
        model,
        card,
        chosen,
        batches=SplitBatches(images().test) if test_images else None,
        level=level or _level(run, part),
        outputs=outputs,
        tolerance=tolerance,
        with_pytorch=with_pytorch,
        early_exit=exits,
        target=target,
        progress=progress,
        note=note,
        job=precision_job(images(), precision, card.preprocess) if precision and precision.is_lower else None,
    )
    return Exported(chosen, proof)


def standing_bundle(run: Run) -> Path | None:
    """The newest bundle in a run's folder that `export_run` would make again by default; None where there is none.

    It is in float32, of the default part and level, takes uint8 images, gives logits alone, was made from the weights
    that the run has now, and its files are as they were written. Graphs for early exit beside it do no harm.
    """
    part = parts_of(run.recipe)[0]
    card, level = _card(run, part, embedded=True), _level(run, part)
    names = {"part", "labels", "preprocess", "precision", "outputs"}
    wanted = {name: getattr(card, name) for name in names} | {
        "fusion": level if part in ("fused", "student") else "none"
    }
    # The newest first: of several that fit, it is the one that people look at.
    for folder in sorted(run.folder.glob("bundle*/"), key=lambda folder: folder.stat().st_mtime, reverse=True):
        try:
            check_files(folder, complete=True)
            standing = describe_model(folder)
        except RkdError:  # whatever is wrong with it, another is made
            continue
        of_weights = standing.source.get("weights_sha256") == card.source["weights_sha256"]
        if of_weights and all(getattr(standing, name) == value for name, value in wanted.items()):
            return folder
    return None


@dataclass(frozen=True)
class Quickstart:
    """The run, bundles, results and tables of the quickstart."""

    run: Run
    bundles: dict[str, Path]
    results: list[Result]
    tables: Tables


def quickstart(root: Path, display: Display, note: Callable[[str], None], min_seconds: float = 1.0) -> Quickstart:
    """Train the embedded example, export and prove its networks, measure and draw them.

    S and A are cut to lie side by side: layers as small as these are too short to pay for a second branch, and S + A
    then have S0's shapes and speed. The recipe itself leaves that open, because `train --set` may choose a method or a
    scheme for which it is refused.

    Args:
        root: Folder of runs.
        display: Shows training.
        note: Called with a line for every step.
        min_seconds: Time each model is measured for.
    """
    recipe = embedded_recipe(["student.layout=side_by_side"])
    note("Training T, S0, S and A on handwritten digits")
    run = fit(recipe, root=root, display=display)
    bundles = {}
    parts = parts_of(recipe)[::-1]
    for part in parts:  # S + A last: it is the newest bundle then, the one that bench takes by itself
        note(f"Exporting {PARTS[part]} and proving it on the test images")
        bundles[part] = export_run(run, part=part).folder
    note("Measuring on ONNX Runtime, batch 1, one model after the other in turn")
    settings = BenchSettings(batches=(1,), min_seconds=min_seconds)
    results = bench([bundles[part] for part in parts], settings)
    record = write_record(results, {"batches": [1], "min_seconds": min_seconds}, run.folder)
    return Quickstart(run, bundles, results, write_tables(read_bench(record), run.folder))


def _card(run: Run, part: str, embedded: bool) -> ModelCard:
    facts, parts, recipe = run.facts, run.metrics.parts, run.recipe
    if part not in parts:
        raise UsageError(f"{run.folder} has no {part}: it has {', '.join(parts)}.")
    results, (height, width) = parts[part], facts.image_size
    weights = run.weights(phase_of(recipe, part))
    return ModelCard(
        name=f"{recipe.name} {PARTS[part]}",
        labels=facts.classes,
        preprocess=Preprocess(
            height=height,
            width=width,
            mean=facts.mean,
            std=facts.std,
            crop_fraction=1.0 if facts.crop_fraction is None else facts.crop_fraction,
            embedded=embedded,
        ),
        part=part,
        macs=results.macs,
        parameters=results.parameters,
        metrics={"accuracy": results.test_top1, "split": facts.test_split, "images": results.test_images},
        source={
            "run": run.folder.name,
            "recipe": recipe.name,
            "weights_sha256": sha256_of(weights),
        },
    )


def _level(run: Run, part: str) -> str:
    """The level of fusion that S and A were cut for; tail for every other part."""
    return run.facts.fusion_level if part == "fused" else "tail"


def _free_folder(run: Run, part: str) -> Path:
    name = "bundle" if part == "fused" else f"bundle-{part}"
    number, folder = 1, run.folder / name
    while folder.exists():
        number += 1
        folder = run.folder / f"{name}-{number}"
    return folder


def _images(run: Run) -> ImageSet:
    data = run.facts.normalised(run.recipe.data)
    if data.of_files:  # each image is read once or twice
        data = dataclasses.replace(data, cache="off", cache_gb=DataRecipe.cache_gb)
    images, trained = load_images(data, run.recipe.train.seed), run.facts.classes
    if images.classes != trained:
        changed = sorted(set(images.classes) ^ set(trained))
        raise DataError(
            f"{run.folder} was trained on {len(trained)} classes, and its data now have {len(images.classes)}; the "
            f"difference is {', '.join(changed[:5]) or 'their order'}. Restore the data, or export on random images "
            "(--random-images), which need none."
        )
    return images
