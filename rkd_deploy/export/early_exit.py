"""Exports each branch as a graph of its own, for early exit, and reports what that saves.

S runs first, an assistant only for images that S is not sure of (after ResKD, arXiv 2006.04719).

The tail is linear (`fusion`), so that logits are a sum of what each branch adds:

    z_0 = W U_S GAP(s) + b + W c_S                 S alone
    z_i = z_{i-1} + W U_i GAP(a_i) + W c_i         and its assistants, one by one

Each branch is thus a graph of its own, from images to what it adds to the logits, and z_k is the value of the fused
network: whoever runs them all pays what the fused graph costs, and who stops earlier saves the rest. Behind a trunk S's
graph gives the trunk's map beside its logits, and the assistants' graphs take that map, so that this holds there too.

An image leaves after step i when its confidence, the largest softmax probability of z_i, reaches the threshold: 0 is S
alone, anything above 1 is S + A for every image. The threshold is given or chosen on held-out images, the lowest that
loses nothing there; what it saves and costs is then measured once on the test images.

The graphs may be of lower precision. Each z_i is then another network's than PyTorch's, so each is held to the limits
of the precision, on held-out images and against PyTorch's own z_i: with any of them an image may leave. The threshold
is chosen by the confidences of the graphs that ship.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from rkd_deploy.backends import Array, load_backend
from rkd_deploy.bench.accuracy import top1
from rkd_deploy.bench.parity import compare_logits, gate
from rkd_deploy.card import ModelCard, Preprocess
from rkd_deploy.errors import UsageError
from rkd_deploy.export.fusion import fuse_branch
from rkd_deploy.export.graph import ExportGraph, MapInput, to_onnx
from rkd_deploy.export.precision.convert import Converted, Exportable, PrecisionRecord, convert_sum
from rkd_deploy.export.precision.gate import HeldOut
from rkd_deploy.export.precision.images import PrecisionJob
from rkd_deploy.export.proving import Batches, reference_of
from rkd_deploy.images import normalise
from rkd_deploy.models.cost import count, count_end
from rkd_deploy.models.residual import ResidualStudent
from rkd_deploy.models.staged import pool, stage_shapes
from rkd_deploy.serve.early_exit import TRUNK_MAP, check_threshold, every_step, exit_steps, first_step
from rkd_deploy.storage import write_bytes

# The last is above 1, because the softmax of a sure network rounds to exactly 1.
THRESHOLDS = (0.0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.01)
"""Thresholds of the table; the first is S alone, the last S + A for every image."""


class FirstBranches(nn.Module):
    """z_i as PyTorch computes it, unfused: images to logits with S and the first i = `step` assistants."""

    def __init__(self, model: ResidualStudent, step: int) -> None:
        super().__init__()
        self.model, self.step = model, step

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Map normalised images [N, C, H, W] to z_i, logits [N, K]."""
        return cast(Tensor, self.model.head(pool(self.model.summed_map(x_NCHW, self.step))))


@dataclass(frozen=True)
class ExitRow:
    """What a threshold saves and costs on a set of images.

    Attributes:
        threshold: Confidence at which an image leaves.
        shares: Share of the images that leaves after each branch.
        macs: Mean MACs of an image.
        saved: Share of the MACs of all branches that is saved.
        top1: Accuracy in %.
    """

    threshold: float
    shares: tuple[float, ...]
    macs: float
    saved: float
    top1: float

    def to_record(self) -> dict[str, Any]:
        """The fields as JSON has them."""
        return {**vars(self), "shares": list(self.shares)}


@dataclass(frozen=True, kw_only=True)
class ExitReport:
    """What leaving early saves and costs with the graphs of a bundle: the card's `early_exit`.

    Attributes:
        files: The graphs, S first.
        macs: MACs of each.
        threshold: Confidence at which an image leaves.
        chosen_on: Where the threshold comes from, in words.
        held_out: Rows for `THRESHOLDS` and the threshold, in rising order, on held-out images; empty without any.
        test: The same on the test images; empty without any.
        conversion: How the graphs got a lower precision; None for float32.
    """

    files: tuple[str, ...]
    macs: tuple[int, ...]
    threshold: float
    chosen_on: str
    held_out: tuple[ExitRow, ...] = ()
    test: tuple[ExitRow, ...] = ()
    conversion: PrecisionRecord | None = None

    def to_record(self) -> dict[str, Any]:
        """The fields as the card has them, without those that are empty."""
        record: dict[str, Any] = {"files": list(self.files), "macs": list(self.macs)}
        record |= {"threshold": self.threshold, "chosen_on": self.chosen_on}
        if self.held_out:
            record["held_out"] = [row.to_record() for row in self.held_out]
        if self.test:
            record["test"] = [row.to_record() for row in self.test]
        return record if self.conversion is None else record | {"lowering": self.conversion.to_record()}


class ExitLogits:
    """The logits at every exit, z_0 .. z_k, of the exported graphs for a set of images.

    Args:
        files: The graphs, S first.
        backend: The backend that runs them.
        preprocess: How they take images.
        batches: uint8 images [n, H, W, C] with labels [n].
        expected: A model and a tolerance: every z_i is held against the model's. None: nothing is.

    Attributes:
        z_kNK: Logits [N, K] for each exit.
        labels_N: Labels.
        images: N.

    Raises:
        GateError: A z_i is not the model's.
    """

    def __init__(
        self,
        files: Sequence[Path],
        backend: str,
        preprocess: Preprocess,
        batches: Batches,
        expected: tuple[ResidualStudent, float] | None = None,
    ) -> None:
        self.z_kNK: list[Array] = []
        self.labels_N = np.empty(0, np.int64)
        z_parts, labels = [], []
        with contextlib.ExitStack() as opened:
            graphs = [opened.enter_context(load_backend(backend, file)) for file in files]
            for images_NHWC, labels_n in batches:
                x = images_NHWC if preprocess.embedded else normalise(images_NHWC, preprocess)
                z = every_step(graphs, x)
                if expected is not None:
                    model, tolerance = expected
                    parity = compare_logits(_rows(_reference(model, images_NHWC, preprocess)), _rows(z), tolerance)
                    gate(parity, "the sums of the graphs for early exit against PyTorch")
                z_parts.append(z)
                labels.append(labels_n)
        if z_parts:
            self.z_kNK, self.labels_N = list(np.concatenate(z_parts, axis=1)), np.concatenate(labels)
        self.images = len(self.labels_N)

    def row(self, threshold: float, macs: Sequence[int]) -> ExitRow:
        """What a threshold saves and costs.

        Args:
            threshold: Confidence at which an image leaves.
            macs: MACs of each graph.
        """
        step_N = exit_steps(self.z_kNK, threshold)
        shares = [float((step_N == step).mean()) for step in range(len(macs))]
        # Who leaves after step i has paid for the graphs 0 .. i: hence the running sum.
        mean = sum(share * total for share, total in zip(shares, np.cumsum(macs).tolist(), strict=True))
        return ExitRow(threshold, tuple(shares), mean, 1 - mean / sum(macs), self._top1(threshold))

    def lowest_without_loss(self) -> float:
        """The lowest threshold, to 0.01, at which no fewer images are right than with all assistants."""
        # Every threshold is tried, from below: accuracy does not rise with the threshold throughout, since an assistant
        # may also spoil what S had right, and bisection could end beyond the lowest.
        all_top1 = self._top1(THRESHOLDS[-1])
        return next((t for t in np.linspace(0, 1, 101).round(2).tolist() if self._top1(t) >= all_top1), THRESHOLDS[-1])

    def _top1(self, threshold: float) -> float:
        step_N = exit_steps(self.z_kNK, threshold)
        z_NK = np.stack(self.z_kNK)[step_N, np.arange(len(step_N))]
        return top1(z_NK.argmax(1), self.labels_N)


def _rows(z_kNK: Array) -> Array:
    rows: Array = z_kNK.reshape(-1, z_kNK.shape[-1])
    return rows


@torch.inference_mode()
def _reference(model: ResidualStudent, images_NHWC: Array, preprocess: Preprocess) -> Array:
    """z_0 .. z_k by PyTorch, unfused."""
    x_NCHW = torch.from_numpy(normalise(images_NHWC, preprocess))
    return np.stack([FirstBranches(model, step)(x_NCHW).numpy() for step in range(len(model.assistants) + 1)])


@dataclass(frozen=True, kw_only=True)
class EarlyExit:
    """A request for early exit, with the images that it needs.

    Attributes:
        threshold: Confidence at which an image leaves. None: the lowest that loses nothing on `held_out`.
        held_out: Batches to choose it on, as those of `export_bundle`, anew at each pass; no test images.
        test: Batches to report on.
    """

    threshold: float | None = None
    held_out: Batches = ()
    test: Batches = ()


def require_branches(model: nn.Module, request: EarlyExit) -> ResidualStudent:
    """Refuse a network whose branches cannot be run one after the other, and a threshold that cannot be had.

    Returns:
        The same model.

    Raises:
        UsageError: The model has no branches or no linear head; no threshold is given and no image is held out.
    """
    if not isinstance(model, ResidualStudent):
        raise UsageError(
            f"Early exit needs S + A whose branches run one after the other, and this network is a "
            f"{type(model).__name__}: S alone, S0 and T have no second step, and under scheme progressive S needs A's "
            "maps at every stage. Export part fused of a sequential or end_to_end run, or leave --early-exit out."
        )
    if type(model.head) is not nn.Linear:
        raise UsageError(
            "Early exit adds up the logits of S and of each assistant, which a head that is not linear does not allow. "
            'Train with method.head = "trained", or export without it.'
        )
    if request.threshold is not None:
        check_threshold(request.threshold)
    elif next(iter(request.held_out), None) is None:
        raise UsageError(
            "Early exit needs a threshold: this run held out no images to choose it on (data.val_fraction = 0); "
            "test images are not for choosing. Give one, e.g. --exit-threshold 0.9."
        )
    return model


class ExitGraphs:
    """A graph for each branch, student.onnx, assistant_1.onnx, ..: written and proven as float32, then converted.

    Args:
        folder: Receives the graphs.
        model: S with its assistants.
        card: For the pre-processing.
        images: Batches to prove the sums of the float32 graphs on.
        tolerance: Largest allowed difference of a logit from PyTorch's, at every exit.

    Attributes:
        branches: The float32 graphs, S first.

    Raises:
        GateError: A partial sum is not PyTorch's.
    """

    def __init__(
        self, folder: Path, model: ResidualStudent, card: ModelCard, images: Batches, tolerance: float
    ) -> None:
        self._folder, self._model, self._card = folder, model, card
        self._files = ["student.onnx", *(f"assistant_{i}.onnx" for i in range(1, len(model.assistants) + 1))]
        self._prover = "onnxruntime"
        self._conversion: PrecisionRecord | None = None
        self._macs: list[int] = []
        self.branches = [self._branch(number) for number in range(len(self._files))]
        self._write([branch.proto for branch in self.branches])
        self._logits(images, tolerance)

    def convert(self, job: PrecisionJob, inputs: Array | None) -> Converted:
        """Convert every graph to a lower precision, and judge every partial sum on held-out images.

        Args:
            job: Options, and the images to judge on.
            inputs: Calibration images as the graphs take them.

        Returns:
            The graphs, which were written in place of the float32 ones, whether or not they passed.
        """
        held_out = [
            HeldOut(reference_of(FirstBranches(self._model, step), self._card), job.held_out, self._card)
            for step in range(len(self.branches))
        ]
        branches = self.branches if inputs is None else self._calibrated(inputs)
        converted = convert_sum(branches, held_out, job.options)
        self._prover, self._conversion = job.options.prover, converted.record(job)
        self._write(converted.protos)
        return converted

    def report(self, request: EarlyExit) -> ExitReport:
        """Measure what leaving early saves and costs with these graphs; the threshold is chosen on held-out images."""
        held_out = self._logits(request.held_out)
        requested = request.threshold
        threshold = held_out.lowest_without_loss() if requested is None else requested
        test, macs = self._logits(request.test), self._macs
        rows = sorted({*THRESHOLDS, threshold})
        return ExitReport(
            files=tuple(self._files),
            macs=tuple(macs),
            threshold=threshold,
            chosen_on=f"{held_out.images} held-out images" if requested is None else "given",
            held_out=tuple(held_out.row(value, macs) for value in rows) if held_out.images else (),
            test=tuple(test.row(value, macs) for value in rows) if test.images else (),
            conversion=self._conversion,
        )

    def _branch(self, number: int) -> Exportable:
        """A branch as it runs: its adapter and the head are one matrix."""
        preprocess, head = self._card.preprocess, cast(nn.Linear, copy.deepcopy(self._model.head))
        if number:
            nn.init.zeros_(head.bias)  # z_0 has b already
        network, image_size = fuse_branch(self._model, number, head), (preprocess.height, preprocess.width)
        if self._model.trunk is None or number == 0:
            outputs = ("logits",) if self._model.trunk is None else ("logits", TRUNK_MAP)
            self._macs.append(count(network, image_size).macs)
            graph = ExportGraph(network, preprocess, outputs).eval()
            return Exportable(graph, to_onnx(graph, preprocess), preprocess)
        map_shape = stage_shapes(self._model.trunk, image_size)[-1]
        self._macs.append(count_end(network, map_shape).macs)
        graph = ExportGraph(network, takes := MapInput(map_shape)).eval()
        return Exportable(graph, to_onnx(graph, takes), takes)

    def _calibrated(self, inputs: Array) -> list[Exportable]:
        """The graphs with what each is calibrated on: the images, or the trunk's maps of them by its float32 graph."""
        with load_backend("onnxruntime", self._folder / self._files[0]) as graph:
            _, carried = first_step(graph, inputs)
        student, *assistants = self.branches
        return [replace(student, inputs=inputs), *(replace(assistant, inputs=carried) for assistant in assistants)]

    def _write(self, protos: Iterable[Any]) -> None:
        for file, proto in zip(self._files, protos, strict=True):
            write_bytes(self._folder / file, proto.SerializeToString(deterministic=True))

    def _logits(self, batches: Batches, tolerance: float | None = None) -> ExitLogits:
        files, preprocess = [self._folder / file for file in self._files], self._card.preprocess
        return ExitLogits(
            files, self._prover, preprocess, batches, None if tolerance is None else (self._model, tolerance)
        )
