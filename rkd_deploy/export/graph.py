"""Writes a network as an ONNX graph: pre-processing inside, free batch, opset 18.

Opset 18 is the newest that every runtime we target has all kernels for. The weights are inside the file: files with
external data break ONNX Runtime's own tools and cannot be embedded as one artefact.
"""

from __future__ import annotations

import copy
import functools
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from rkd_deploy.card import METADATA_KEY, ModelCard, Preprocess
from rkd_deploy.errors import UsageError, require, unknown_name
from rkd_deploy.export.fusion import SummedBranches, TrunkAndStudent
from rkd_deploy.export.unsupported import unsupported
from rkd_deploy.models.staged import pool
from rkd_deploy.serve.early_exit import TRUNK_MAP
from rkd_deploy.storage import append_bytes

OPSET = 18
OUTPUTS = ("logits", "probabilities", "features")
MAX_BATCH = 4096


@dataclass(frozen=True)
class MapInput:
    """The input of a graph that takes a map in place of images: the end of a network behind its trunk.

    Attributes:
        input_shape: (C, H, W) of the map.
        input_dtype: NumPy name of its type.
    """

    input_shape: tuple[int, int, int]
    input_dtype: str = "float32"


class ExportGraph(nn.Module):
    """What is exported: (x / 255 - mean) / std, the network, and the outputs asked for.

    Args:
        network: Normalised float images [N, C, H, W] to logits [N, K]; the result of `fuse`.
        preprocess: Whether the graph normalises uint8 [N, H, W, C] itself. A map is taken as it is.
        outputs: Any of `OUTPUTS`, logits among them. Of a trunk with S behind it: the logits and `TRUNK_MAP`.

    Raises:
        UsageError: Unknown outputs, or features of a network that has no summed map.
    """

    def __init__(
        self, network: nn.Module, preprocess: Preprocess | MapInput, outputs: Sequence[str] = ("logits",)
    ) -> None:
        super().__init__()
        for name in outputs:
            if name not in OUTPUTS and not isinstance(network, TrunkAndStudent):
                raise UsageError(unknown_name("output", name, OUTPUTS))
        if "logits" not in outputs or len(set(outputs)) != len(outputs):
            raise UsageError(f"outputs = {list(outputs)} must hold logits, and each name once.")
        if "features" in outputs and not isinstance(network, SummedBranches):
            raise UsageError(
                "The summed features f_S + f_A do not exist in this graph: fusion level tail folds them away, and a "
                "network without adapters has none. Export S + A with --fuse sum."
            )
        self.network, self.outputs = network, tuple(outputs)
        self.dtype = torch.float32
        self.embedded = isinstance(preprocess, Preprocess) and preprocess.embedded
        if not isinstance(preprocess, Preprocess):
            return
        # (x / 255 - mean) / std as one multiplication and one addition, whose factors are rounded once, from float64.
        mean = torch.tensor(preprocess.mean, dtype=torch.float64)
        std = torch.tensor(preprocess.std, dtype=torch.float64)
        self.register_buffer("scale", (1 / (255 * std)).float().view(-1, 1, 1))
        self.register_buffer("shift", (-mean / std).float().view(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The outputs in the order asked for; a single one as a tensor."""
        if self.embedded:
            # TensorRT transposes no uint8: cast first.
            x = x.float().permute(0, 3, 1, 2) * cast(Tensor, self.scale) + cast(Tensor, self.shift)
        x = x.to(self.dtype)
        results: dict[str, Tensor] = {}
        if "features" in self.outputs:
            network = cast(SummedBranches, self.network)
            results["features"] = network.summed_map(x)
            results["logits"] = network.head(pool(results["features"]))
        elif TRUNK_MAP in self.outputs:
            results["logits"], results[TRUNK_MAP] = self.network(x)
        else:
            results["logits"] = self.network(x)
        # Whatever the network computes in: runtimes and NumPy do not agree on 16-bit outputs.
        results = {name: value.float() for name, value in results.items()}
        if "probabilities" in self.outputs:
            results["probabilities"] = results["logits"].softmax(dim=1)
        ordered = tuple(results[name] for name in self.outputs)
        return ordered[0] if len(ordered) == 1 else ordered

    def in_dtype(self, dtype: torch.dtype) -> ExportGraph:
        """A copy whose network computes in another type, between float32 pre-processing and float32 outputs."""
        converted = copy.deepcopy(self)
        # The network alone: scale times pixel plus shift cancels, and 8 bits of mantissa would lose dark and light
        # pixels.
        converted.network.to(dtype)
        converted.dtype = dtype
        return converted


def example_input(preprocess: Preprocess | MapInput, batch: int = 2) -> Tensor:
    """Zeros of the graph's input type and shape; a batch of 2, because torch.export specialises 0 and 1."""
    return torch.zeros(batch, *preprocess.input_shape, dtype=getattr(torch, preprocess.input_dtype))


def to_program(graph: ExportGraph, preprocess: Preprocess | MapInput) -> torch.export.ExportedProgram:
    """The graph as a PyTorch program with a dynamic batch, which torch.export.load reads without this package."""
    with torch.no_grad():
        return torch.export.export(graph.eval(), (example_input(preprocess),), dynamic_shapes=_dynamic_batch())


def to_onnx(
    graph: ExportGraph, preprocess: Preprocess | MapInput, opset: int = OPSET, *, unfused: nn.Module | None = None
) -> Any:
    """Convert to an ONNX model in memory and check it.

    Args:
        graph: Pre-processing, network and outputs.
        preprocess: For the type and shape of the input.
        opset: Version of ONNX's operators.
        unfused: The network before `fuse`, whose module paths people know, for messages.

    Returns:
        An onnx.ModelProto.

    Raises:
        ExportError: ONNX has no operator for something in the network; the message names it and its module.
        MissingDependencyError: onnx or onnxscript is not installed.
    """
    onnx = require("onnx", "export")
    require("onnxscript", "export")
    x = example_input(preprocess)
    with fast_exporter(graph.eval(), x):
        try:
            converted = torch.onnx.export(
                graph,
                (x,),
                dynamo=True,
                dynamic_shapes=_dynamic_batch(),
                opset_version=opset,
                external_data=False,
                input_names=["input"],
                output_names=list(graph.outputs),
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            named = graph if unfused is None else ExportGraph(unfused, preprocess)
            raise unsupported(named.network, lambda: to_program(named, preprocess)) from error
    assert converted is not None
    model = converted.model_proto
    # The exporter notes the source line of every node: paths of the machine it ran on, and bytes for nothing.
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for value in (*model.graph.value_info, *model.graph.input, *model.graph.output):
        del value.metadata_props[:]
    for tensor in model.graph.initializer:
        del tensor.metadata_props[:]
    del model.graph.metadata_props[:]
    model.doc_string = ""
    onnx.checker.check_model(model, full_check=True)
    return model


@contextmanager
def fast_exporter(graph: nn.Module, x: Tensor) -> Iterator[None]:
    """Let torch.onnx.export convert a graph inside the block without its messages and without doing work twice.

    Args:
        graph: In eval mode.
        x: The example of its input, of which type and shape count.
    """
    with _quiet(), _out_of_place(graph, _random(x)), _operators_read_once():
        yield


@contextmanager
def _out_of_place(graph: nn.Module, x: Tensor) -> Iterator[None]:
    """Let activations leave their input alone where nobody reads it afterwards: each that overwrites it costs 0.1 s."""
    overwriting: list[Any] = [module for module in graph.modules() if getattr(module, "inplace", False) is True]
    try:
        with torch.no_grad():
            overwritten = graph(x) if overwriting else None
            for module in overwriting:
                module.inplace = False
            if overwriting and not _same(overwritten, graph(x)):  # a shortcut, say, that means what was overwritten
                for module in overwriting:
                    module.inplace = True
        yield
    finally:
        for module in overwriting:
            module.inplace = True


def _random(x: Tensor) -> Tensor:
    """An input like x whose values reach both sides of an activation."""
    generator = torch.Generator().manual_seed(0)
    if x.dtype.is_floating_point:
        return torch.randn(x.shape, generator=generator, dtype=x.dtype)
    return torch.randint(256, x.shape, generator=generator, dtype=x.dtype)


def _same(left: Any, right: Any) -> bool:
    pairs = zip(left, right, strict=True) if isinstance(left, tuple) else [(left, right)]
    return all(torch.equal(a, b) for a, b in pairs)


@contextmanager
def _operators_read_once() -> Iterator[None]:
    """Keep the exporter's table of operators: it would parse 500 functions from their source for every file, in 1 s.

    These names are torch's own business. Where another version has others, it takes its second.
    """
    try:
        from torch.onnx._internal.exporter import _registration

        registration: Any = _registration
        library = registration.onnxscript_apis
        original = library.get_torchlib_ops
    except (ImportError, AttributeError):
        yield
        return
    library.get_torchlib_ops = functools.partial(_read_once, original)
    try:
        yield
    finally:
        library.get_torchlib_ops = original


@functools.cache
def _read_once(read: Any) -> Any:
    return read()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's own progress and deprecation notes away from people who can do nothing about them."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logger.setLevel(level)


def stamp(model: Any, card: ModelCard) -> None:
    """Write the card into the model's metadata, in place of what is there."""
    del model.metadata_props[:]
    entry = model.metadata_props.add()
    entry.key, entry.value = METADATA_KEY, card.to_json()


def append_card(file: Path, card: ModelCard) -> None:
    """Add the card to an ONNX file without metadata, and without reading it, which takes three times its size.

    A protobuf message may be continued by another: entries of repeated fields are joined (Protocol Buffers, Encoding,
    "Last One Wins"). The bytes that are there stay as they are.

    Raises:
        StorageError: The disk is full.
    """
    addition = require("onnx", "export").ModelProto()
    stamp(addition, card)
    append_bytes(file, addition.SerializeToString(deterministic=True))


def _dynamic_batch() -> tuple[dict[int, Any]]:
    return ({0: torch.export.Dim("batch", min=1, max=MAX_BATCH)},)
