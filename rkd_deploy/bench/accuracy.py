"""Top-1 accuracy of a model file on a backend, or as its card states it.

Letters: N images.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import numpy.typing as npt

from rkd_deploy.backends import Array, Backend, infer_many
from rkd_deploy.bench.timing import Progress
from rkd_deploy.card import ModelCard
from rkd_deploy.errors import DataError, UsageError
from rkd_deploy.image_folders import SUFFIXES, Visited, images_below, left_out_in_words, splits_below, subfolders
from rkd_deploy.serve.classifier import Classifier

_AT_ONCE = 64


def predicted_classes(backend: Backend, batches: Iterable[Array]) -> npt.NDArray[np.int64]:
    """The class with the largest logit for each image.

    Args:
        backend: The model.
        batches: Arrays [n, ...] as the model takes them; n may differ from batch to batch.

    Returns:
        [N], in the order of the images.

    Raises:
        UsageError: A batch does not fit the model.
    """
    parts = [infer_many(backend, batch).argmax(axis=1).astype(np.int64) for batch in batches]
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


def top1(predicted: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """Share of right predictions, in %.

    Raises:
        DataError: There are none, or their numbers differ.
    """
    predicted_N, labels_N = np.asarray(predicted), np.asarray(labels)
    if predicted_N.shape != labels_N.shape or predicted_N.size == 0:
        raise DataError(
            f"Accuracy was asked for {predicted_N.size} predictions and {labels_N.size} labels; "
            "it needs one label for each, and at least one. Check that both come from the same split."
        )
    return 100 * float(np.mean(predicted_N == labels_N))


@dataclass(frozen=True)
class Accuracy:
    """Top-1 accuracy of one model file.

    Attributes:
        top1: Share of right predictions, in %.
        images: Number of labelled images; None where an old card does not say.
        source: ``"measured"``: by this bench, on the backend that is timed. ``"card"``: by the export of this file.
    """

    top1: float
    images: int | None
    source: str


def card_accuracy(card: ModelCard | None, file: Path, sha256: str) -> Accuracy | None:
    """The accuracy that a card states for a file; None where what was judged was another file.

    A card is of the file that was exported and proven. An engine that was built from it, or a file that was changed
    since, was never judged: its accuracy is unknown until it is measured.

    Args:
        card: The card beside the file, or inside it.
        file: What the backend runs.
        sha256: Checksum of `file`.
    """
    if card is None or file.suffix not in (".onnx", ".pt2") or card.checksums.get(file.name, sha256) != sha256:
        return None
    if card.lowering:  # a lower precision was judged itself; the metrics are those of the trained network
        top1, images = card.lowering.get("test_top1"), card.parity.get("n")
    elif card.precision not in ("fp32", "unknown"):
        return None
    else:
        top1, images = card.metrics.get("accuracy"), card.metrics.get("images")
    if not _is_number(top1):
        return None
    return Accuracy(float(top1), images if isinstance(images, int) else None, "card")


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def labelled_images(folder: Path, labels: Iterable[str]) -> tuple[list[Path], npt.NDArray[np.int64]]:
    """The images of a folder of class folders, and the index of each one's class.

    Args:
        folder: Holds a folder for each class, named as in `labels`; classes may be missing.
        labels: The model's classes, in its order.

    Returns:
        Paths, sorted within each class, and [N] class indices.

    Raises:
        DataError: No such folder, a folder of no class, no image at all, or two classes of one name.
    """
    names = list(labels)
    index = {label: number for number, label in enumerate(names)}
    if len(index) < len(names):
        raise DataError("The model's card gives two classes the same label: folder names cannot tell them apart.")
    classes = subfolders(folder) if os.path.isdir(folder) else []
    if splits := [path.name for paths in splits_below(folder).values() for path in paths] if classes else []:
        raise DataError(
            f"{folder} was given for the model's accuracy, and holds splits: {', '.join(splits)}. Name one of them, "
            f"e.g. {folder / splits[-1]}."
        )
    foreign = [path.name for path in classes if path.name not in index]
    if foreign or not classes:
        holds = f"the folders {', '.join(foreign[:5])} are none of its {len(names)} classes" if foreign else "no folder"
        raise DataError(
            f"{folder} was given for the model's accuracy: {holds}. It must hold one folder for each class, named by "
            f"the card's labels ({', '.join(names[:5])}, ..: rkd-deploy info MODEL shows them)."
        )
    visited = Visited()
    below = {path.name: images_below(path, visited) for path in classes}
    visited.check_links()
    files = [(Path(file), index[name]) for name, images in below.items() for file in images.paths]
    if not files:
        left_out = left_out_in_words(sum((images.left_out for images in below.values()), Counter[str]()))
        raise DataError(
            f"{folder} holds no image{f', only {left_out}' if left_out else ''}: files that end in "
            f"{', '.join(SUFFIXES)} are looked for."
        )
    return [file for file, _ in files], np.array([number for _, number in files], np.int64)


def folder_top1(backend: Backend, card: ModelCard | None, folder: Path, progress: Progress | None = None) -> Accuracy:
    """Top-1 accuracy of a loaded model on a folder of class folders.

    Args:
        backend: The model, which stays open.
        card: Card of the model, for its labels and pre-processing.
        folder: As for `labelled_images`.
        progress: Called with "accuracy", and the share of the images that is done.

    Raises:
        UsageError: There is no card.
        DataError: The folder does not fit, or an image is broken.
        ModelFileError: The card does not belong to the model.
    """
    if card is None:
        raise UsageError(
            "Accuracy was asked for, and the model has no card: which output is which class, and how images are "
            "prepared, is unknown. Leave --data out, or export the model with rkd-deploy export."
        )
    files, labels_N = labelled_images(folder, card.labels)
    # Through the classifier that apps embed, so that its decoding and resizing are judged along with the model.
    classifier = Classifier(backend, card, max_batch=min(_AT_ONCE, backend.info.max_batch or _AT_ONCE))
    right = 0
    for start in range(0, len(files), _AT_ONCE):
        chunk = slice(start, start + _AT_ONCE)
        right += int(np.sum(classifier.logits(files[chunk]).argmax(axis=1) == labels_N[chunk]))
        if progress is not None:
            progress("accuracy", min(1.0, (start + _AT_ONCE) / len(files)))
    return Accuracy(100 * right / len(files), len(files), "measured")
