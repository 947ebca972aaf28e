"""Early exit: S first, an assistant only for images that S is not sure of (after ResKD, arXiv 2006.04719).

The tail is linear (`fusion.py`), so logits are a sum of what each branch adds:

    z_0 = W U_S GAP(s) + b + W c_S                 S alone
    z_i = z_{i-1} + W U_i GAP(a_i) + W c_i         and its assistants, one by one

Each branch is thus a graph of its own, from images to what it adds to the logits, and z_k is the value of the fused
network: whoever runs them all pays what the fused graph costs, and who stops earlier saves the rest. An image leaves
after step i when its confidence, the largest softmax probability of z_i, reaches the threshold: 0 is S alone, anything
above 1 is S + A for every image. The threshold is given or chosen on held-out images, the lowest that loses nothing
there; what it saves and costs is then measured once on the test images.

The graphs may be of lower precision. Each z_i is then another network's than PyTorch's, so each is held to the limits
of the precision, on held-out images and against PyTorch's own z_i: with any of them an image may leave. The threshold
is chosen by the confidences of the graphs that ship.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from rkd_deploy.backends import infer_many, load_backend
from rkd_deploy.bench.accuracy import top1
from rkd_deploy.bench.parity import compare, gate
from rkd_deploy.card import ModelCard, Preprocess
from rkd_deploy.errors import UsageError
from rkd_deploy.export.fusion import fuse_branch
from rkd_deploy.export.graph import ExportGraph, to_onnx
from rkd_deploy.export.precision.convert import Exportable, Lowered, lower_sum
from rkd_deploy.export.precision.gate import HeldOut
from rkd_deploy.export.precision.images import Lowering
from rkd_deploy.export.proving import Array, Batches, reference_of
from rkd_deploy.images import normalise
from rkd_deploy.models.adapters import Adapter
from rkd_deploy.models.cost import count
from rkd_deploy.models.residual import ResidualStudent
from rkd_deploy.models.staged import FeatureNetwork, pool
from rkd_deploy.serve.early_exit import check_threshold, exit_steps
from rkd_deploy.storage import write_bytes

THRESHOLDS = (0.0, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.01)
"""Those of the table; the first is S alone, the last S + A for every image."""


class UpTo(nn.Module):
    """z_i of PyTorch, unfused: images to logits with the first i = `step` assistants."""

    def __init__(self, model: ResidualStudent, step: int) -> None:
        super().__init__()
        self.model, self.step = model, step

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Logits [N, K]."""
        return cast(Tensor, self.model.head(pool(self.model.summed_map(x_NCHW, self.step))))


class Sums:
    """What the exported graphs answer to a set of images: z_0 .. z_k of each.

    Args:
        files: Of the graphs.
        backend: That runs them.
        preprocess: Of their input.
        batches: uint8 images [n, H, W, C] with labels [n].
        expected: Where given, a model and a tolerance: every z_i is held against the model's.
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
                z = np.cumsum([infer_many(graph, x) for graph in graphs], axis=0)
                if expected is not None:
                    model, tolerance = expected
                    parity = compare(_rows(_reference(model, images_NHWC, preprocess)), _rows(z), tolerance)
                    gate(parity, "the sums of the graphs for early exit against PyTorch")
                z_parts.append(z)
                labels.append(labels_n)
        if z_parts:
            self.z_kNK, self.labels_N = list(np.concatenate(z_parts, axis=1)), np.concatenate(labels)
        self.images = len(self.labels_N)

    def row(self, threshold: float, macs: Sequence[int], whole: int) -> dict[str, Any]:
        """Of one threshold: share of images that leave after each step, mean MACs, and top-1 in %.

        Args:
            threshold: Confidence at which an image leaves.
            macs: Of each graph.
            whole: Of the fused graph: behind a trunk less than of all graphs, each of which runs the trunk again.
        """
        step_N = exit_steps(self.z_kNK, threshold)
        shares = [float((step_N == step).mean()) for step in range(len(macs))]
        mean = sum(share * total for share, total in zip(shares, np.cumsum(macs).tolist(), strict=True))
        return {
            "threshold": threshold,
            "shares": shares,
            "macs": mean,
            "saved": 1 - mean / whole,
            "top1": self._top1(threshold),
        }

    def lowest_without_loss(self) -> float:
        """The lowest threshold, to 0.01, at which no fewer images are right than with all assistants."""
        whole = self._top1(THRESHOLDS[-1])
        return next((t for t in np.linspace(0, 1, 101).round(2).tolist() if self._top1(t) >= whole), THRESHOLDS[-1])

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
    return np.stack([UpTo(model, step)(x_NCHW).numpy() for step in range(len(model.assistants) + 1)])


@dataclass(frozen=True, kw_only=True)
class EarlyExit:
    """What is asked for.

    Attributes:
        threshold: Confidence at which an image leaves. None: the lowest that loses nothing on `held_out`.
        held_out: Batches to choose it on, as those of `export_bundle`, anew at each pass; no test images.
        test: Batches to report on.
    """

    threshold: float | None = None
    held_out: Batches = ()
    test: Batches = ()


def check(model: nn.Module, asked: EarlyExit) -> ResidualStudent:
    """The model, if its branches can be run one after the other; a threshold is given, or can be chosen.

    Raises:
        UsageError: One of these is not so.
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
    if asked.threshold is not None:
        check_threshold(asked.threshold)
    elif next(iter(asked.held_out), None) is None:
        raise UsageError(
            "Early exit needs a threshold: this run held out no images to choose it on (data.val_fraction = 0); "
            "test images are not for choosing. Give one, e.g. --exit-threshold 0.9."
        )
    return model


class Exits:
    """A graph for each branch, student.onnx, assistant_1.onnx, ..: written, proven, on request lowered, reported on.

    Args:
        folder: Receives them.
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
        self._lowered: dict[str, Any] = {}
        self._macs: list[int] = []
        self.branches = [self._branch(*pair, number) for number, pair in enumerate(model.branches())]
        self._write([branch.proto for branch in self.branches])
        self._sums(images, tolerance)

    def lower(self, lowering: Lowering, inputs: Array | None) -> Lowered:
        """Lower every graph, and judge every partial sum on held-out images.

        Args:
            lowering: What is asked for, and the images to judge on.
            inputs: Calibration images as the graphs take them.

        Returns:
            The graphs, which were written in place of the float32 ones, whether or not they passed.
        """
        held_out = [
            HeldOut(reference_of(UpTo(self._model, step), self._card), lowering.held_out, self._card)
            for step in range(len(self.branches))
        ]
        lowered = lower_sum(self.branches, self._card.preprocess, inputs, held_out, lowering.options)
        self._prover, self._lowered = lowering.options.prover, lowered.account(lowering)
        self._write(lowered.protos)
        return lowered

    def report(self, asked: EarlyExit) -> dict[str, Any]:
        """The card's `early_exit`: what leaving early saves and costs with these graphs."""
        held_out = self._sums(asked.held_out)
        threshold = held_out.lowest_without_loss() if asked.threshold is None else asked.threshold
        test, macs = self._sums(asked.test), self._macs
        whole = sum(macs)
        if (trunk := self._model.trunk) is not None:
            preprocess = self._card.preprocess
            whole -= (len(macs) - 1) * count(trunk, (preprocess.height, preprocess.width)).macs
        report: dict[str, Any] = {"files": self._files, "macs": macs, "threshold": threshold}
        report["chosen_on"] = "given" if asked.threshold is not None else f"{held_out.images} held-out images"
        if held_out.images:
            report["held_out"] = [held_out.row(one, macs, whole) for one in THRESHOLDS]
        if test.images:
            report["test"] = [test.row(one, macs, whole) for one in (THRESHOLDS[0], threshold, THRESHOLDS[-1])]
        return report | ({"lowering": self._lowered} if self._lowered else {})

    def _branch(self, backbone: FeatureNetwork, adapter: Adapter, number: int) -> Exportable:
        """As it runs: adapter and head folded."""
        preprocess, head = self._card.preprocess, cast(nn.Linear, copy.deepcopy(self._model.head))
        if number:
            nn.init.zeros_(head.bias)  # b is S's
        network = fuse_branch(backbone, adapter, head, self._model.trunk)
        self._macs.append(count(network, (preprocess.height, preprocess.width)).macs)
        graph = ExportGraph(network, preprocess).eval()
        return Exportable(graph, to_onnx(graph, preprocess))

    def _write(self, protos: Iterable[Any]) -> None:
        for file, proto in zip(self._files, protos, strict=True):
            write_bytes(self._folder / file, proto.SerializeToString(deterministic=True))

    def _sums(self, batches: Batches, tolerance: float | None = None) -> Sums:
        files, preprocess = [self._folder / file for file in self._files], self._card.preprocess
        return Sums(files, self._prover, preprocess, batches, None if tolerance is None else (self._model, tolerance))
