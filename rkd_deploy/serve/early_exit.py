"""Runs the student's graph for every image, an assistant's for those it leaves unsure.

Letters: N batch, K classes, z_i the logits after step i. An image leaves after the first step whose confidence, the
largest softmax probability of z_i, is at least the threshold; after the last step every image leaves. Where S and its
assistants share a trunk, S's graph runs it and gives its map too, which the assistants' graphs take for their input:
the trunk is run once.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from rkd_deploy.backends import Array, Backend, infer_many, load_backend
from rkd_deploy.backends.files import model_path, read_card
from rkd_deploy.backends.protocol import ModelInfo, infer_all_many
from rkd_deploy.decoding import DecodingError, decode
from rkd_deploy.errors import ModelFileError, UsageError
from rkd_deploy.fields import check_number

TRUNK_MAP = "trunk_map"
"""Output of S's graph that the assistants' graphs take as their input, where there is a trunk."""


def confidence(z_NK: Array) -> npt.NDArray[np.float64]:
    """The largest softmax probability of each row, [N]."""
    z_NK = z_NK.astype(np.float64)
    peak_N: npt.NDArray[np.float64] = 1 / np.exp(z_NK - z_NK.max(axis=1, keepdims=True)).sum(axis=1)
    return peak_N


def exit_steps(z_kNK: Sequence[Array], threshold: float) -> npt.NDArray[np.int64]:
    """The step after which each image leaves, [N], from the logits after every step."""
    sure_kN = np.stack([confidence(z_NK) >= threshold for z_NK in z_kNK])
    sure_kN[-1] = True
    steps_N: npt.NDArray[np.int64] = sure_kN.argmax(axis=0)
    return steps_N


def first_step(student: Backend, x: Array) -> tuple[Array, Array]:
    """What S's graph answers.

    Args:
        student: S's graph.
        x: Any number of inputs.

    Returns:
        z_0 [N, K], and what the assistants' graphs take: the trunk's map, or, without a trunk, the same inputs.
    """
    if TRUNK_MAP not in student.info.outputs:
        return infer_many(student, x), x
    z_NK, map_NCHW = infer_all_many(student, x)
    return z_NK, map_NCHW


def every_step(steps: Sequence[Backend], x: Array) -> Array:
    """The logits after every step, z_0 .. z_k, [k + 1, N, K], where no image leaves."""
    z_NK, carried = first_step(steps[0], x)
    z_kNK: Array = np.cumsum([z_NK, *(infer_many(step, carried) for step in steps[1:])], axis=0)
    return z_kNK


class EarlyExitBackend(Backend):
    """Several backends as one: each adds to the logits of the images that are still there.

    Args:
        steps: The student's, then each assistant's; closing this one closes them.
        threshold: Confidence at which an image leaves: 0 is the student alone, above 1 is everything for every image.

    Attributes:
        left: How many images have left after each step so far.
    """

    def __init__(self, steps: Sequence[Backend], threshold: float) -> None:
        self._steps, self.threshold = list(steps), threshold
        first = self._steps[0]
        self.name, self.device, self.precision = first.name, first.device, first.precision
        self._info = replace(first.info, outputs=("logits",))
        self.left = [0] * len(self._steps)
        self._counting = threading.Lock()

    @property
    def info(self) -> ModelInfo:
        """What the student's graph takes, and what its file says."""
        return self._info

    def infer(self, x: Array) -> Array:
        """Logits [N, K] after the step at which each image left."""
        z_NK, carried = first_step(self._steps[0], x)
        left, count = [0] * len(self._steps), len(z_NK)
        there: Any = slice(None)
        # Of one image all arrays are small, and each call of NumPy costs a share of a small network's own time: where
        # none leaves, or all do, nothing is gathered.
        for number, step in enumerate(self._steps[1:]):
            stays = confidence(z_NK[there]) < self.threshold
            staying = int(np.count_nonzero(stays))
            left[number] = count - staying
            if staying < count:
                there, carried = np.arange(len(z_NK))[there][stays], carried[stays]
            count = staying
            if not count:
                break
            if number == 0:
                z_NK = z_NK.copy()  # what a backend answers is its own, and the assistants' logits are added to it
            z_NK[there] += infer_many(step, carried)
        left[-1] = count
        with self._counting:  # threads may share this backend
            self.left = [total + more for total, more in zip(self.left, left, strict=True)]
        return z_NK

    def prepare(self, x: Array) -> Callable[[], None]:
        """Refused: which graphs run depends on what they answer, so nothing can be enqueued ahead."""
        raise UsageError("Early exit decides image by image, from host to host: measure it without --resident.")

    def synchronize(self) -> None:
        """Nothing waits: every run is host to host."""

    def close(self) -> None:
        """Close the backends of all steps."""
        for step in self._steps:
            step.close()


def check_threshold(threshold: float) -> None:
    """Refuse what is no confidence.

    Raises:
        UsageError: The threshold is no number from 0 on.
    """
    check_number("exit_threshold =", threshold, 0)


def load_early_exit(path: str | os.PathLike[str], threshold: float, backend: str, **options: Any) -> EarlyExitBackend:
    """Load the graphs of a bundle that was exported with early exit.

    Args:
        path: The bundle.
        threshold: See `EarlyExitBackend`.
        backend: As for `load_backend`.
        **options: As for `load_backend`.

    Raises:
        UsageError: The threshold is no number from 0 on.
        ModelFileError: The bundle has no such graphs, or one of them is missing.
    """
    check_threshold(threshold)
    folder, card = model_path(path).parent, read_card(path, {})
    if card is None or not card.early_exit:
        raise ModelFileError(
            f"{path} has no graphs for early exit. Export the run again with: rkd-deploy export RUN --early-exit"
        )
    try:
        files = decode(list[str], card.early_exit.get("files", []), "early_exit.files")
    except DecodingError as error:
        raise ModelFileError(
            f"The model card in {path} has a wrong field ({error}). Export it again with rkd-deploy export."
        ) from error
    if not files or any(os.path.basename(file) != file for file in files):
        raise ModelFileError(
            f"The card of {path} lists the graphs {files} for early exit, which must be files beside it: a bundle is "
            "one folder. Export it again with rkd-deploy export."
        )
    with contextlib.ExitStack() as opened:
        steps = [opened.enter_context(load_backend(backend, folder / file, **options)) for file in files]
        opened.pop_all()  # all are there: from here on they are closed with the whole
    loaded = EarlyExitBackend(steps, threshold)
    loaded.precision = card.precision  # the graphs have no card of their own
    return loaded
