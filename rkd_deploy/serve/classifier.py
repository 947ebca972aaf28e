"""Classifies images with an exported model: what an app embeds.

    classifier = load("bundle/")
    classifier.predict("photo.jpg", top=3)

Letters: N batch, C channels, H height, W width, K classes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from types import TracebackType
from typing import NamedTuple, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from rkd_deploy.backends import Backend, infer_many, load_backend
from rkd_deploy.backends.files import check_files, model_path, read_card
from rkd_deploy.backends.protocol import ModelInfo
from rkd_deploy.card import ModelCard
from rkd_deploy.errors import BackendError, DataError, ModelFileError, UsageError
from rkd_deploy.fields import check_number
from rkd_deploy.images import ImageLike, Pixels, normalise, to_array
from rkd_deploy.serve.early_exit import EarlyExitBackend, load_early_exit

Floats: TypeAlias = npt.NDArray[np.float32]

_FLOAT32 = np.dtype(np.float32)
_SAFE_EXPONENT = 60
"""exp(+-60) is about 1e+-26: a float32 holds that, and the sum of a billion of them, at full accuracy."""
_LONG_ROW = 256
"""Classes from which selecting the largest before sorting them is faster than sorting all; measured at 100 and 1000."""


class Prediction(NamedTuple):
    """One class that an image may be of."""

    label: str
    probability: float
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody calls on this


def load(
    path: str | os.PathLike[str],
    *,
    backend: str = "onnxruntime",
    device: str | None = None,
    threads: int | None = None,
    max_batch: int = 256,
    exit_threshold: float | None = None,
) -> Classifier:
    """Load an exported classifier.

    Of a bundle with model.json, every file that is there is compared with its checksum first (SHA-256, about 1 ms per
    MB); files that an app has left out are not missed, but for the model itself.

    Args:
        path: Bundle folder, or an ONNX file with a model card inside or beside it.
        backend: As for `load_backend`.
        device: "cpu", "cuda" or "cuda:N"; None: the backend's own.
        threads: Threads inside one operator on a CPU; None leaves it to the runtime.
        max_batch: Largest number of images run at once; more are run in chunks.
        exit_threshold: Early exit: run the student's graph alone for images of which it is this confident (the largest
            probability), and the assistants' for the others; `card.early_exit["threshold"]` is the one that was
            reported on. Default: the whole network for every image.

    Raises:
        ModelFileError: The model or its card is missing or corrupt, or the card does not fit the model; or the bundle
            was exported without early exit; or a file of it is not as it was written.
        UsageError: Unknown backend or device, or a negative threshold.
        MissingDependencyError: The backend's library is not installed.
        BackendError: The backend cannot run here, or not on the device asked for.
    """
    check_files(path, complete=False)
    loaded: Backend
    if exit_threshold is None:
        loaded = load_backend(backend, path, device=device, threads=threads)
    else:
        loaded = load_early_exit(path, exit_threshold, backend, device=device, threads=threads)
    try:
        card = read_card(path, loaded.info.metadata)
        if card is None:
            raise ModelFileError(
                f"{model_path(path)} has no model card, neither in its metadata nor in a .json file beside it, so its "
                "labels and pre-processing are unknown. Export it with rkd-deploy export, or run it with load_backend."
            )
        return Classifier(loaded, card, max_batch=max_batch)
    except BaseException:
        loaded.close()
        raise


class Classifier:
    """A loaded model with its labels and its pre-processing. Closing it closes the backend."""

    def __init__(self, backend: Backend, card: ModelCard, *, max_batch: int = 256) -> None:
        """Join a backend and a card, after one run that shows that they belong together.

        Raises:
            ModelFileError: The card describes another input or another number of classes.
            UsageError: `max_batch` is no whole number from 1 on.
        """
        check_number("max_batch =", max_batch, 1, whole=True)
        self.card = card
        self.labels: tuple[str, ...] = card.labels
        self._backend = backend
        self._preprocess = card.preprocess
        self._embedded = card.preprocess.embedded
        self._image_shape = (card.preprocess.height, card.preprocess.width, card.preprocess.channels)
        self._max_batch = max_batch
        self._ones_K = np.ones(len(card.labels), np.float32)
        self._takes_one = backend.info.input_shape[0] in (None, 1)
        _check_fit(backend, card)
        if isinstance(backend, EarlyExitBackend):
            backend.left = [0] * len(backend.left)  # that run was no image of anybody

    @property
    def info(self) -> ModelInfo:
        """What the graph takes and gives, by its file."""
        return self._backend.info

    @property
    def exits(self) -> tuple[int, ...]:
        """Images that have left so far after S, after A_1, ..; empty without early exit."""
        return tuple(self._backend.left) if isinstance(self._backend, EarlyExitBackend) else ()

    def __call__(self, image: ImageLike, top: int = 1) -> list[Prediction]:
        """The most probable classes of one image; `predict` says more."""
        return self.predict(image, top)

    def predict(self, image: ImageLike, top: int = 1) -> list[Prediction]:
        """The most probable classes of one image, best first.

        Args:
            image: Path, PIL image, or uint8 array (see `images.to_array`).
            top: How many; at most all of them.

        Raises:
            DataError: The image cannot be read.
            UsageError: `top` is no whole number from 1 on.
            BackendError: The run failed or gave numbers that are not finite.
        """
        x = to_array(image, self._preprocess)[np.newaxis]
        return self._best(self._run(x)[0], top)

    def predict_batch(self, images: Iterable[ImageLike] | Pixels, top: int = 5) -> list[list[Prediction]]:
        """The most probable classes of many images, decoded and run `max_batch` at a time.

        Args:
            images: Images of any kind that `predict` takes, or one uint8 array [N, H, W, C].
            top: How many classes per image; at most all of them.

        Returns:
            For each image its classes, best first.

        Raises:
            DataError: An image cannot be read.
            UsageError: `top` is no whole number from 1 on, or one path was given for the list of images.
            BackendError: The run failed or gave numbers that are not finite.
        """
        return [self._best(logits_K, top) for logits_NK in self._runs(images) for logits_K in logits_NK]

    def logits(self, images: Iterable[ImageLike] | Pixels) -> Floats:
        """The model's raw answers, float32 [N, K]; images as for `predict_batch`."""
        parts = list(self._runs(images))
        return np.concatenate(parts) if parts else np.empty((0, len(self.labels)), np.float32)

    def probabilities(self, images: Iterable[ImageLike] | Pixels) -> Floats:
        """The softmax of the logits, float32 [N, K], each row summing to 1; images as for `predict_batch`."""
        return softmax(self.logits(images))

    def infer(self, x: npt.NDArray[np.generic]) -> Floats:
        """Logits float32 [N, K] of inputs as the graph takes them, [N, ...] by the card's `input_shape`, `input_dtype`.

        Raises:
            UsageError: `x` is of another type or shape.
            BackendError: The run failed.
        """
        alone = self._takes_one and len(x) == 1
        logits = self._backend.infer(x) if alone else infer_many(self._backend, x, self._max_batch)
        return logits if logits.dtype == _FLOAT32 else logits.astype(np.float32)

    def close(self) -> None:
        """Give the model's memory back; a second call does nothing, a later prediction raises BackendError."""
        self._backend.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, pixels_NHWC: Pixels) -> Floats:
        return self.infer(pixels_NHWC if self._embedded else normalise(pixels_NHWC, self._preprocess))

    def _runs(self, images: Iterable[ImageLike] | Pixels) -> Iterator[Floats]:
        if isinstance(images, str | os.PathLike):
            raise UsageError(f"A batch was given as one path, {os.fspath(images)!r}; give a list of images.")
        if isinstance(images, np.ndarray):
            if images.ndim != 4:  # a single image would be taken for a batch of its rows
                raise DataError(
                    f"A batch was given as an array of shape {list(images.shape)}; it must be [N, H, W, C]. "
                    "Give one image to predict, or image[None] here."
                )
            if images.dtype == np.uint8 and images.shape[1:] == self._image_shape:
                for start in range(0, len(images), self._max_batch):
                    yield self._run(images[start : start + self._max_batch])
                return
        if not isinstance(images, Iterable):
            raise DataError(f"A batch was given as {type(images).__name__}; give a list of images, or [N, H, W, C].")
        waiting = iter(images)
        while chunk := [to_array(image, self._preprocess) for image in islice(waiting, self._max_batch)]:
            yield self._run(np.stack(chunk))

    def _best(self, logits_K: Floats, top: int) -> list[Prediction]:
        # p_i = exp(z_i) / sum_j exp(z_j). A run leaves cold caches behind, where each NumPy call takes 5 to 15 us, 1 %
        # of a small model's run. So the usual case, one label of a few hundred, is a single call and plain floats;
        # and elsewhere the shift by the largest logit is made only where the exponents need it.
        if top == 1 and len(logits_K) <= _LONG_ROW:
            values: list[float] = logits_K.tolist()
            peak = max(values)
            if abs(peak) < _SAFE_EXPONENT and (total := sum(map(math.exp, values))) > 0:  # a NaN among them is not > 0
                best = values.index(peak)
                return [Prediction(self.labels[best], math.exp(peak) / total, best)]
        check_number("top =", top, 1, whole=True)
        best = int(logits_K.argmax())
        peak = logits_K.item(best)
        if abs(peak) < _SAFE_EXPONENT:
            exponentials_K = np.exp(logits_K)
        elif math.isfinite(peak):
            exponentials_K = np.exp(logits_K - peak)
        else:  # argmax finds a NaN wherever it stands
            raise _not_finite(peak)
        total = exponentials_K.dot(self._ones_K).item()
        indices = [best] if top == 1 else _largest(logits_K, min(top, len(logits_K)))
        return [Prediction(self.labels[index], exponentials_K.item(index) / total, index) for index in indices]


def _largest(values_K: Floats, count: int) -> list[int]:
    """Indices of the largest values, largest first; of equal values the first comes first."""
    if len(values_K) <= _LONG_ROW or count == len(values_K):
        order = (-values_K).argsort(kind="stable")
    else:
        place = len(values_K) - count
        candidates = np.flatnonzero(values_K >= np.partition(values_K, place)[place])
        order = candidates[(-values_K[candidates]).argsort(kind="stable")]
    indices: list[int] = order[:count].tolist()
    return indices


def softmax(logits_NK: Floats) -> Floats:
    """Probabilities [N, K] of logits [N, K], each row summing to 1.

    Raises:
        BackendError: The largest logit of a row is not finite.
    """
    peaks_N1 = logits_NK.max(axis=1, keepdims=True)
    broken = peaks_N1[~np.isfinite(peaks_N1)]
    if broken.size:
        raise _not_finite(float(broken[0]))
    exponentials_NK = np.exp(logits_NK - peaks_N1)
    probabilities_NK: Floats = exponentials_NK / exponentials_NK.sum(axis=1, keepdims=True)
    return probabilities_NK


def check_finite(logits_NK: Floats) -> Floats:
    """The logits, all of which are finite.

    Raises:
        BackendError: One is not.
    """
    finite_NK = np.isfinite(logits_NK)
    if not finite_NK.all():
        raise _not_finite(float(logits_NK[~finite_NK][0]))
    return logits_NK


def _not_finite(logit: float) -> BackendError:
    return BackendError(
        f"A logit of the model is {logit}; it must be finite. A reduced precision has probably overflowed: "
        "check the model with rkd-deploy verify, and export it in fp32 or bf16."
    )


def _check_fit(backend: Backend, card: ModelCard) -> None:
    wanted = card.preprocess.input_shape
    taken: Sequence[int | None] = backend.info.input_shape[1:]
    fits = len(taken) == len(wanted) and all(size in (None, want) for size, want in zip(taken, wanted, strict=True))
    if not fits or backend.info.input_dtype != card.preprocess.input_dtype:
        sizes = ["any" if size is None else size for size in taken]
        raise ModelFileError(
            f"The card of {card.name!r} describes an input {card.preprocess.input_dtype} {list(wanted)}, and the model "
            f"takes {backend.info.input_dtype} {sizes}: they do not belong together. Export with rkd-deploy export."
        )
    probe = np.zeros((backend.info.input_shape[0] or 1, *wanted), backend.info.input_dtype)
    logits = backend.infer(probe)
    if logits.ndim != 2 or logits.shape[1] != len(card.labels):
        raise ModelFileError(
            f"The card of {card.name!r} has {len(card.labels)} labels, and the model gives logits of shape "
            f"{list(logits.shape)} for {len(probe)} images: they do not belong together. Export with rkd-deploy export."
        )
