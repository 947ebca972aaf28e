"""Tiny real models whose answers are known exactly.

The model of the zoo adds up pixels: logits[n, c] = scale * sum over h, w of x[n, h, w, c] + bias[c], for uint8
[N, 4, 4, 3]. With a scale that is a power of two every value is exact in float32.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import simulated_building
import simulated_cuda
import simulated_graphs
import simulated_onnxrt
import simulated_running
from onnx import TensorProto, helper

from rkd_deploy.backends.files import with_checksums
from rkd_deploy.backends.tensorrt.settings import load_library
from rkd_deploy.card import METADATA_KEY, ModelCard, Preprocess

SCALE = 2.0**-8


def build(
    path: Path,
    *,
    batch: int | str = "batch",
    dtype: int = TensorProto.UINT8,
    scale: float = SCALE,
    bias: tuple[float, ...] = (0.0, 0.0, 0.0),
    output: str = "logits",
    extra: bool = False,
    card: ModelCard | None = None,
    layout: str = "NHWC",
    result: int = TensorProto.FLOAT,
) -> Path:
    """Write the summing model; `extra` puts a second output, the raw sums, before the logits."""
    shape, axes = ([4, 4, 3], [1, 2]) if layout == "NHWC" else ([3, 4, 4], [2, 3])
    nodes = [
        helper.make_node("Cast", ["input"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("ReduceSum", ["floats", "axes"], ["sums"], keepdims=0),
        helper.make_node("Mul", ["sums", "scale"], ["scaled"]),
        helper.make_node("Add", ["scaled", "bias"], ["shifted"]),
        helper.make_node("Cast", ["shifted"], [output], to=result),
    ]
    outputs = [helper.make_tensor_value_info(output, result, [batch, 3])]
    if extra:
        outputs.insert(0, helper.make_tensor_value_info("sums", TensorProto.FLOAT, [batch, 3]))
    constants = [
        helper.make_tensor("axes", TensorProto.INT64, [2], axes),
        helper.make_tensor("scale", TensorProto.FLOAT, [], [scale]),
        helper.make_tensor("bias", TensorProto.FLOAT, [3], bias),
    ]
    inputs = [helper.make_tensor_value_info("input", dtype, [batch, *shape])]
    save(path, helper.make_graph(nodes, "sums", inputs, outputs, constants), card)
    return path


def save(path: Path, graph: onnx.GraphProto, card: ModelCard | None = None, opset: int = 18) -> None:
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    if card is not None:
        helper.set_model_props(model, {METADATA_KEY: card.to_json()})
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)


def make_card(**changes: object) -> ModelCard:
    preprocess = Preprocess(height=4, width=4, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    facts: dict = {
        "name": "sums",
        "labels": ("red", "green", "blue"),
        "preprocess": preprocess,
        "precision": "fp32",
        "macs": 48,
        "parameters": 4,
        "metrics": {"accuracy": 71.5},
    }
    return ModelCard(**(facts | changes))


def answer(x: np.ndarray) -> np.ndarray:
    """The logits of the summing model, computed apart."""
    return (x.astype(np.float64).sum(axis=(1, 2)) * SCALE).astype(np.float32)


def pixels(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)


@pytest.fixture(scope="session")
def zoo() -> SimpleNamespace:
    """The builders above."""
    return SimpleNamespace(build=build, save=save, seal=seal, card=make_card, answer=answer, pixels=pixels, scale=SCALE)


def seal(folder: Path, card: ModelCard | None = None) -> None:
    """Write the model.json of a bundle: a card, with the checksum of every file that lies there."""
    (folder / "model.json").write_text(with_checksums(card or make_card(), folder))


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole bundle: model.onnx with its card inside, model.json, golden.npz and the exported program model.pt2."""
    import torch

    class Sums(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.float().sum((1, 2)) * SCALE

    folder = tmp_path_factory.mktemp("bundles") / "sums"
    card = make_card()
    build(folder / "model.onnx", card=card)
    x = pixels(5, seed=1)
    np.savez(folder / "golden.npz", inputs=x, logits=answer(x), tolerance=1e-5)
    program = torch.export.export(
        Sums().eval(),
        (torch.zeros(2, 4, 4, 3, dtype=torch.uint8),),
        dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},),
    )
    torch.export.save(program, folder / "model.pt2")
    seal(folder, card)
    return folder


@pytest.fixture(scope="session")
def simulated() -> SimpleNamespace:
    """A simulated device, and CUDA and TensorRT over it; see there."""

    def tensorrt(device: Any, version: str = "11.4.0", rtx: bool = False) -> ModuleType:
        module = simulated_building.tensorrt(version, rtx)
        simulated_building.add_building(module, device)
        simulated_running.add_running(module, device, rtx)
        return module

    return SimpleNamespace(Device=simulated_cuda.Device, cuda_runtime=simulated_cuda.cuda_runtime, tensorrt=tensorrt)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list:
    """The CUDA graphs that PyTorch records on a simulated device."""
    return simulated_graphs.install(monkeypatch)


@pytest.fixture
def ort_gpu(monkeypatch: pytest.MonkeyPatch) -> list:
    """The sessions that ONNX Runtime opens on a simulated device."""
    monkeypatch.setattr("rkd_deploy.backends.onnxrt_cuda.preload", lambda: None)
    return simulated_onnxrt.install(monkeypatch)


@pytest.fixture
def gpu(simulated: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[SimpleNamespace]:
    """A simulated GPU with TensorRT and TensorRT-RTX on it, and a cache folder of the test's own.

    Whatever was taken from the device has to be given back by the end of the test.
    """
    device = simulated.Device()
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", simulated.cuda_runtime(device))
    monkeypatch.setenv("RKD_DEPLOY_CACHE", str(tmp_path / "cache"))

    def install(version: str = "11.4.0", rtx_version: str = "1.7.1") -> None:
        monkeypatch.setitem(sys.modules, "tensorrt", simulated.tensorrt(device, version))
        monkeypatch.setitem(sys.modules, "tensorrt_rtx", simulated.tensorrt(device, rtx_version, rtx=True))
        load_library.cache_clear()

    install()
    yield SimpleNamespace(device=device, install=install)
    load_library.cache_clear()
    assert not device.memory, "device or pinned memory was not given back"
    assert not device.live, "streams or graphs were not given back"
