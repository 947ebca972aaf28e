"""The partial sums z_0 .. z_k that the graphs for early exit give, and what leaving with them saves and costs.

Letters of `early_exit.py`; N images, K classes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from rkd_deploy.card import Preprocess
from rkd_deploy.export.proving import Array, Batches
from rkd_deploy.models.residual import ResidualStudent
from rkd_deploy.models.staged import pool
from rkd_deploy.serve.backends import infer_many, load_backend
from rkd_deploy.serve.bench.accuracy import top1
from rkd_deploy.serve.bench.parity import compare, gate
from rkd_deploy.serve.early_exit import exit_steps
from rkd_deploy.serve.images import normalise

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
    return np.stack([UpTo(model, step)(x_NCHW).numpy() for step in range(len(model.assistants) + 1)])
