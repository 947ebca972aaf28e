"""Early exit: S first, an assistant only for images that S is not sure of (after ResKD, arXiv 2006.04719).

The tail is linear (`fusion.py`), so logits are a sum of what each branch adds:

    z_0 = W U_S GAP(s) + b + W c_S                 S alone
    z_i = z_{i-1} + W U_i GAP(a_i) + W c_i         and its assistants, one by one

Each branch is thus a graph of its own, from images to what it adds to the logits, and z_k is the value of the fused
network: whoever runs them all pays what the fused graph costs, and who stops earlier saves the rest. An image leaves
after step i when its confidence, the largest softmax probability of z_i, reaches the threshold: 0 is S alone, anything
above 1 is S + A for every image. The threshold is given or chosen on held-out images, the lowest that loses nothing
there; what it saves and costs is then measured once on the test images.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from rkd_deploy.card import ModelCard, Preprocess
from rkd_deploy.errors import UsageError
from rkd_deploy.export.fusion import fuse_branch
from rkd_deploy.export.graph import ExportGraph, to_onnx
from rkd_deploy.models.cost import count
from rkd_deploy.models.residual import ResidualStudent
from rkd_deploy.models.staged import pool
from rkd_deploy.serve.backends import infer_many, load_backend
from rkd_deploy.serve.bench.accuracy import top1
from rkd_deploy.serve.bench.parity import compare, gate
from rkd_deploy.serve.early_exit import exit_steps
from rkd_deploy.serve.images import normalise
from rkd_deploy.storage import write_bytes

Array = npt.NDArray[Any]
Batches = Iterable[tuple[Array, Array]]

THRESHOLDS = (0.0, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.01)
"""Those of the table; the first is S alone, the last S + A for every image."""


@dataclass(frozen=True, kw_only=True)
class EarlyExit:
    """What is asked for.

    Attributes:
        threshold: Confidence at which an image leaves. None: the lowest that loses nothing on `held_out`.
        held_out: Batches to choose it on, as those of `export_bundle`; no test images.
        test: Batches to report on.
    """

    threshold: float | None = None
    held_out: Batches = ()
    test: Batches = ()


def check(model: nn.Module) -> ResidualStudent:
    """The model, if its branches can be run one after the other.

    Raises:
        UsageError: They cannot.
    """
    if isinstance(model, ResidualStudent):
        return model
    raise UsageError(
        f"Early exit needs S + A whose branches run one after the other, and this network is a {type(model).__name__}: "
        "S alone, S0 and T have no second step, and under scheme progressive S needs A's maps at every stage. Export "
        "part fused of a sequential or end_to_end run, or leave --early-exit out."
    )


def write_exits(folder: Path, model: ResidualStudent, card: ModelCard, asked: EarlyExit, tolerance: float) -> Any:
    """Write a graph for each branch, prove their sums, and report.

    Args:
        folder: Receives student.onnx, assistant_1.onnx, ...
        model: S with its assistants.
        card: For the pre-processing.
        asked: Threshold and images.
        tolerance: Largest allowed difference of a logit from PyTorch's, at every exit.

    Returns:
        The card's `early_exit`.

    Raises:
        GateError: A partial sum is not PyTorch's.
        UsageError: Neither a threshold nor images to choose it on.
    """
    if type(model.head) is not nn.Linear:
        raise UsageError(
            "Early exit adds up the logits of S and of each assistant, which a head that is not linear does not allow. "
            'Train with method.head = "trained", or export without it.'
        )
    files, macs = _write_graphs(folder, model, card.preprocess)
    held_out = _Seen(folder, files, card.preprocess, asked.held_out)
    if asked.threshold is None and not held_out.images:
        raise UsageError(
            "Early exit needs a threshold: this run held out no images to choose it on (data.val_fraction = 0); test "
            "images are not for choosing. Give one, e.g. --exit-threshold 0.9."
        )
    threshold = held_out.lowest_without_loss() if asked.threshold is None else asked.threshold
    test = _Seen(folder, files, card.preprocess, asked.test, model, tolerance)
    report: dict[str, Any] = {"files": files, "macs": macs, "threshold": threshold}
    report["chosen_on"] = "given" if asked.threshold is not None else f"{held_out.images} held-out images"
    if held_out.images:
        report["held_out"] = [held_out.row(one, macs) for one in THRESHOLDS]
    if test.images:
        report["test"] = [test.row(one, macs) for one in (THRESHOLDS[0], threshold, THRESHOLDS[-1])]
    return report


def _write_graphs(folder: Path, model: ResidualStudent, preprocess: Preprocess) -> tuple[list[str], list[int]]:
    """File names and MACs, as they run: adapters and head folded."""
    files, macs = [], []
    for number, (backbone, adapter) in enumerate(model.branches()):
        head = cast(nn.Linear, copy.deepcopy(model.head))
        if number:
            nn.init.zeros_(head.bias)  # b is S's
        network = fuse_branch(backbone, adapter, head)
        files.append("student.onnx" if number == 0 else f"assistant_{number}.onnx")
        macs.append(count(network, (preprocess.height, preprocess.width)).macs)
        proto = to_onnx(ExportGraph(network, preprocess), preprocess)
        write_bytes(folder / files[-1], proto.SerializeToString(deterministic=True))
    return files, macs


class _Seen:
    """What the exported graphs answer to a set of images: z_0 .. z_k of each.

    Args:
        folder: Of the graphs.
        files: Their names.
        preprocess: Of their input.
        batches: uint8 images [n, H, W, C] with labels [n].
        model: Where given, every z_i is held against it.
        tolerance: For that.
    """

    def __init__(
        self,
        folder: Path,
        files: Sequence[str],
        preprocess: Preprocess,
        batches: Batches,
        model: ResidualStudent | None = None,
        tolerance: float = 0.0,
    ) -> None:
        self.z_kNK: list[Array] = []
        self.labels_N = np.empty(0, np.int64)
        backends = [load_backend("onnxruntime", folder / file) for file in files]
        z_parts, labels = [], []
        for images_NHWC, labels_n in batches:
            x = images_NHWC if preprocess.embedded else normalise(images_NHWC, preprocess)
            z = np.cumsum([infer_many(backend, x) for backend in backends], axis=0)
            if model is not None:
                parity = compare(_rows(_reference(model, images_NHWC, preprocess)), _rows(z), tolerance)
                gate(parity, "the sums of the graphs for early exit against PyTorch")
            z_parts.append(z)
            labels.append(labels_n)
        for backend in backends:
            backend.close()
        if z_parts:
            self.z_kNK, self.labels_N = list(np.concatenate(z_parts, axis=1)), np.concatenate(labels)
        self.images = len(self.labels_N)

    def row(self, threshold: float, macs: Sequence[int]) -> dict[str, Any]:
        """Of one threshold: share of images that leave after each step, mean MACs, and top-1 in %."""
        step_N = exit_steps(self.z_kNK, threshold)
        shares = [float((step_N == step).mean()) for step in range(len(macs))]
        mean = sum(share * total for share, total in zip(shares, np.cumsum(macs).tolist(), strict=True))
        return {
            "threshold": threshold,
            "shares": shares,
            "macs": mean,
            "saved": 1 - mean / sum(macs),
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
    steps = range(len(model.assistants) + 1)
    return np.stack([model.head(pool(model.summed_map(x_NCHW, step))).numpy() for step in steps])
