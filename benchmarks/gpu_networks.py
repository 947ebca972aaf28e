"""Builds the networks of gpu.py: T, S0, and S + A in each layout and level, at random."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from fusion import CASES, CLASSES, ROUND_TO
from torch import nn

from rkd_deploy.backends import Array
from rkd_deploy.card import Preprocess
from rkd_deploy.export.fusion import fuse
from rkd_deploy.export.graph import ExportGraph, to_onnx
from rkd_deploy.export.precision.convert import to_half
from rkd_deploy.export.precision.int8 import Int8Quantiser
from rkd_deploy.models import zoo
from rkd_deploy.models.residual import ResidualStudent
from rkd_deploy.models.separation.separate import separate
from rkd_deploy.models.trunk import parted

TEACHERS: Mapping[str, Callable[[], nn.Module]] = {
    "ResNet-20": lambda: zoo.create("resnet56", CLASSES),
    "ResNet-18": lambda: torchvision.models.resnet34(num_classes=CLASSES),
}
LEVELS = {
    "S0": ("S0", "tail"),
    "branches, tail": ("branches", "tail"),
    "side_by_side, wide": ("side_by_side", "wide"),
    "trunk, wide": ("trunk", "wide"),
    "branches, wide": ("branches", "wide"),
    "trunk, tail": ("trunk", "tail"),
    "T": ("T", "tail"),
    "branches, sum": ("branches", "sum"),
}
"""What is measured, by name: the network that it is cut as, and its level of fusion."""
TINY = tuple(LEVELS)[:4]
IMAGES = 8
"""Images of the parity check."""


@dataclass(frozen=True)
class Measured:
    """One network as it is run.

    Attributes:
        graph: Pre-processing and fused network, on the CPU in float32.
        size: Height and width of its images in pixels.
        logits_NK: Its answers there, to the `IMAGES` that `pixels` gives.
    """

    graph: ExportGraph
    size: int
    logits_NK: Array


def preprocess_of(size: int) -> Preprocess:
    """How images of a benchmark come in: uint8, normalised within the graph."""
    return Preprocess(height=size, width=size, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


def pixels(batch: int, size: int, seed: int = 0) -> Array:
    """Random images, uint8 [N, H, W, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (batch, size, size, 3), dtype=np.uint8)


class Networks:
    """The networks of a case, and their ONNX files, which several processes write when a precision is asked for.

    A context manager: it ends the processes.

    Args:
        case: Of `fusion.CASES`.
        names: Of `LEVELS`.
        folder: Where files go.
    """

    def __init__(self, case: str, names: Sequence[str], folder: Path) -> None:
        self._case, self._folder, self.names = case, folder, tuple(names)
        self.size, _ = CASES[case]
        cut: dict[str, nn.Module] = {}
        for layout in dict.fromkeys(LEVELS[name][0] for name in names):
            cut[layout] = _with_statistics(_network(case, layout), self.size)
            torch.save(cut[layout], folder / f"{layout}.pt")
        preprocess, x = preprocess_of(self.size), torch.from_numpy(pixels(IMAGES, self.size))
        self.measured: dict[str, Measured] = {}
        for name in names:
            layout, level = LEVELS[name]
            graph = ExportGraph(fuse(cut[layout], level), preprocess).eval()
            with torch.inference_mode():
                logits = graph(x)
            assert isinstance(logits, torch.Tensor)
            self.measured[name] = Measured(graph, self.size, logits.numpy())
        workers = max(1, min(len(names), len(os.sched_getaffinity(0)) - 1))
        self._pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))

    def __enter__(self) -> Networks:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def export(self, *precisions: str) -> None:
        """Write the files of these precisions that are not there; one that cannot be written is said, and left out."""
        jobs = [(name, self.size, precision, self._folder) for precision in precisions for name in self.names]
        missing = [job for job in jobs if not self.file(job[0], job[2]).exists()]
        for line in filter(None, self._pool.map(_export, missing)):
            print(line, flush=True)

    def file(self, name: str, precision: str) -> Path:
        """The ONNX file of a network."""
        return _file(name, precision, self._folder)


def _network(case: str, layout: str) -> nn.Module:
    torch.manual_seed(0)
    size, make = CASES[case]
    if layout == "T":
        return TEACHERS[case]()
    S0 = make()
    if layout == "S0":
        return S0
    round_to = ROUND_TO[case] if layout == "branches" else 8
    cut = separate(S0, num_classes=CLASSES, input_size=size, layout=layout, round_to=round_to)
    if layout == "trunk":
        return parted(cut.student, cut.assistants, cut.shared_stages, S0.channels, CLASSES)
    return ResidualStudent(cut.student, cut.assistants, S0.channels, CLASSES)


@torch.no_grad()
def _with_statistics(network: nn.Module, size: int) -> nn.Module:
    """In eval mode, with batch statistics of random images and no branch that is silent.

    Fresh statistics let logits grow with the depth, beyond what 16 bits hold.
    """
    if isinstance(network, ResidualStudent):
        for parameter in network.assistant_adapters.parameters():
            if parameter.ndim > 1:
                nn.init.kaiming_normal_(parameter)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None  # the plain mean of what is shown
    x = torch.from_numpy(pixels(IMAGES, size, seed=1)).float().permute(0, 3, 1, 2)
    network.train()(x / 63.75 - 2)
    return network.eval()


def _file(name: str, precision: str, folder: Path) -> Path:
    return folder / f"{name} {precision}.onnx"


def _export(job: tuple[str, int, str, Path]) -> str | None:
    """Write one file, in a process of the pool; gives why there is none."""
    name, size, precision, folder = job
    torch.set_num_threads(1)
    layout, level = LEVELS[name]
    preprocess = preprocess_of(size)
    try:
        network = torch.load(folder / f"{layout}.pt", weights_only=False)
        proto = _proto(ExportGraph(fuse(network, level), preprocess), preprocess, precision, size)
    except Exception as error:
        return f"{name}, {precision}: not exported, {type(error).__name__}: {error}"
    _file(name, precision, folder).write_bytes(proto.SerializeToString())
    return None


def _proto(graph: ExportGraph, preprocess: Preprocess, precision: str, size: int) -> Any:
    if precision in ("fp16", "bf16"):
        return to_half(graph, preprocess, precision)
    proto = to_onnx(graph, preprocess)
    if precision == "int8":
        with Int8Quantiser(proto, pixels(IMAGES, size), "tensorrt") as quantiser:
            return quantiser.quantised()
    return proto
