"""Counts what an ONNX file multiplies, stores and moves at the least, and how much of it is zeros.

One multiply and one add are one MAC. Counted are the operators that are sums of products, ONNX Runtime's own among
them; what else a graph does (activations, pooling, sums) costs bytes and no MACs here. What cannot be counted is named,
never skipped: an operator of a domain that is not known here, too.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rkd_deploy.backends.files import broken_model, model_path
from rkd_deploy.backends.onnx_bytes import DEFAULT_DOMAINS
from rkd_deploy.bench.fused_operators import multiplies_nothing, standardised
from rkd_deploy.card import GraphFacts
from rkd_deploy.errors import UsageError, require

Shape = tuple[int, ...]

# Operators that multiply and add, and the place of their weight (or second factor) among their inputs.
_WEIGHT = {
    "Conv": 1,
    "ConvTranspose": 1,
    "ConvInteger": 1,
    "QLinearConv": 3,
    "Gemm": 1,
    "MatMul": 1,
    "MatMulInteger": 1,
    "QLinearMatMul": 3,
    "Einsum": 1,
    # com.microsoft's
    "FusedConv": 1,
    "FusedGemm": 1,
    "FusedMatMul": 1,
    "FusedMatMulActivation": 1,
    "QGemm": 3,
    "MatMulIntegerToFloat": 1,
    "DynamicQuantizeMatMul": 1,
}
_UNCOUNTED = (
    "Attention",
    "DFT",
    "DeformConv",
    "Det",
    "GRU",
    "If",
    "LSTM",
    "Loop",
    "RNN",
    "STFT",
    "Scan",
    "SequenceMap",
)
_VIEWS = ("Flatten", "Identity", "Reshape", "Shape", "Squeeze", "Unsqueeze")
_QUANTISED = (
    "ConvInteger",
    "DynamicQuantizeMatMul",
    "MatMulInteger",
    "MatMulIntegerToFloat",
    "QGemm",
    "QLinearConv",
    "QLinearMatMul",
)


@dataclass(frozen=True)
class GraphCost:
    """Multiply-adds and bytes of one call with one batch, at the least.

    Attributes:
        macs_in: Multiply-adds by the type they are done in: that of the weights as stored, "int8" where both factors
            are quantised.
        weight_bytes: Bytes of all constants, as stored.
        input_bytes: Bytes of the input.
        output_bytes: Bytes of the outputs.
        unfused_bytes: What all operators together would read and write if none were fused with another: what a runtime
            saves by fusing is part of this.
        uncounted: Operators whose MACs are not among these, by type.
    """

    macs_in: Mapping[str, int]
    weight_bytes: int
    input_bytes: int
    output_bytes: int
    unfused_bytes: int
    uncounted: tuple[str, ...]

    @property
    def macs(self) -> int:
        """Multiply-adds of all types together."""
        return sum(self.macs_in.values())

    @property
    def arithmetic(self) -> str:
        """Type that most multiply-adds are done in."""
        return max(self.macs_in, key=lambda kind: self.macs_in[kind], default="float32")

    @property
    def least_bytes(self) -> int:
        """Bytes of each weight, the input and the outputs moved once: no run can do with fewer, however it fuses."""
        return self.weight_bytes + self.input_bytes + self.output_bytes


def graph_cost(path: str | os.PathLike[str], batch: int, image: Sequence[int] = ()) -> GraphCost:
    """Count the cost of an ONNX file's graph at one batch size.

    Args:
        path: Bundle folder or ONNX file.
        batch: Images in one call.
        image: Shape of one image, for a model that leaves it open.

    Raises:
        MissingDependencyError: onnx is not installed.
        ModelFileError: The file is no ONNX file.
        UsageError: The graph's shapes cannot be told, or it does not take this batch.
    """
    onnx = require("onnx", "export")
    file = model_path(path)
    try:
        model = onnx.load(str(file), load_external_data=False)
        if model.functions:
            model = require("onnx.inliner", "export").inline_local_functions(model)
        _fix_input(model.graph, batch, image, str(file))
        # Only ONNX Runtime's own operators need replacing, and replacing copies the model, weights and all.
        foreign = any(node.domain.encode() not in DEFAULT_DOMAINS for node in model.graph.node)
        readable = standardised(model, onnx) if foreign else model
        inferred = onnx.shape_inference.infer_shapes(readable, data_prop=True)
        for described in (model.graph.value_info, model.graph.output):
            del described[:]
        model.graph.value_info.extend(inferred.graph.value_info)
        model.graph.output.extend(inferred.graph.output)
    except UsageError:
        raise
    except Exception as error:  # protobuf's and onnx's own, which have no common base
        raise broken_model(file, str(error).strip().splitlines()[0]) from error
    return _count(model.graph, onnx)


def _fix_input(graph: Any, batch: int, image: Sequence[int], name: str) -> None:
    constants = {constant.name for constant in graph.initializer}
    inputs = [value for value in graph.input if value.name not in constants]
    if len(inputs) != 1:
        raise UsageError(f"{name} has {len(inputs)} inputs; the cost of a graph is told for models with one.")
    sizes = inputs[0].type.tensor_type.shape.dim
    wanted = [batch, *(image or [size.dim_value for size in sizes[1:]])]
    if len(wanted) != len(sizes) or min(wanted, default=0) < 1:
        raise UsageError(
            f"{name} leaves the size of its images open, and nothing says which is meant: its input is "
            f"{[size.dim_value or size.dim_param or '?' for size in sizes]}. Export it with a fixed image size."
        )
    if sizes[0].dim_value not in (0, batch):
        raise UsageError(f"{name} takes {sizes[0].dim_value} images at a time, and not {batch}.")
    for size, value in zip(sizes, wanted, strict=True):
        size.dim_value = value
    # Shapes that were written down for a free batch would be believed rather than worked out.
    del graph.value_info[:]
    for output in graph.output:
        output.type.tensor_type.ClearField("shape")


def _count(graph: Any, onnx: Any) -> GraphCost:
    constants = [_of_constant(value, value.name, onnx) for value in graph.initializer]
    constants += [
        _of_constant(attribute.t, node.output[0], onnx)
        for node in graph.node
        for attribute in node.attribute
        if node.op_type == "Constant" and attribute.name == "value"
    ]
    names = {constant.name for constant in constants}
    values = [_of_value(value, onnx) for value in (*graph.input, *graph.value_info, *graph.output)]
    known = {tensor.name: tensor for tensor in (*values, *constants)}
    nodes = [node for node in graph.node if node.op_type not in ("Constant", *_VIEWS)]
    makers = {name: node for node in graph.node for name in node.output}
    macs_in, uncounted = dict[str, int](), dict[str, None]()
    for node in nodes:
        macs = _macs_of(node, known, onnx)
        if macs is None:
            uncounted[node.op_type] = None
        elif macs:
            kind = _done_in(node, known, makers)
            macs_in[kind] = macs_in.get(kind, 0) + macs
    return GraphCost(
        macs_in=macs_in,
        weight_bytes=sum(constant.bytes for constant in constants),
        input_bytes=sum(known[value.name].bytes for value in graph.input if value.name not in names),
        output_bytes=sum(known[value.name].bytes for value in graph.output),
        unfused_bytes=sum(known[name].bytes for node in nodes for name in {*node.input, *node.output} if name in known),
        uncounted=tuple(uncounted),
    )


@dataclass(frozen=True)
class _Tensor:
    name: str
    shape: Shape | None
    """Sizes of the dimensions; None where they are not known."""
    dtype: str
    itemsize: int

    @property
    def bytes(self) -> int:
        return 0 if self.shape is None else math.prod(self.shape) * self.itemsize


def _of_constant(value: Any, name: str, onnx: Any) -> _Tensor:
    dtype = onnx.helper.tensor_dtype_to_np_dtype(value.data_type)
    return _Tensor(name, tuple(value.dims), dtype.name, dtype.itemsize)


def _of_value(value: Any, onnx: Any) -> _Tensor:
    kind = value.type.tensor_type
    sizes = [size.dim_value if size.HasField("dim_value") else None for size in kind.shape.dim]
    shape = tuple(size for size in sizes if size is not None)
    whole = kind.HasField("shape") and len(shape) == len(sizes)
    if kind.elem_type == 0:
        return _Tensor(value.name, None, "unknown", 0)
    dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
    return _Tensor(value.name, shape if whole else None, dtype.name, dtype.itemsize)


def _done_in(node: Any, known: Mapping[str, _Tensor], makers: Mapping[str, Any]) -> str:
    """Type that a product is done in: where both factors are dequantised, the stored type, as runtimes do."""
    if node.op_type in _QUANTISED:
        return "int8"
    weight = node.input[_WEIGHT[node.op_type]]
    sources = [makers.get(name) for name in (node.input[0], weight)]
    if all(source is not None and source.op_type == "DequantizeLinear" for source in sources):
        stored = [known[source.input[0]].dtype for source in sources if source is not None]
        return "int8" if set(stored) <= {"int8", "uint8"} else stored[-1]
    return known[weight].dtype


def _macs_of(node: Any, known: Mapping[str, _Tensor], onnx: Any) -> int | None:
    """Multiply-adds of one operator, 0 for one that is no sum of products; None where they cannot be told."""
    if node.op_type in _UNCOUNTED:
        return None
    if node.op_type not in _WEIGHT:
        return 0 if node.domain.encode() in DEFAULT_DOMAINS or multiplies_nothing(node) else None
    if node.op_type == "Einsum" and len(node.input) != 2:
        return 0 if len(node.input) == 1 else None  # of three factors the count hangs on the order they are joined in
    factors = (node.input[0], node.input[_WEIGHT[node.op_type]])
    names = factors if node.op_type == "Einsum" else (*factors, node.output[0])
    shapes = [known[name].shape if name in known else None for name in names]
    if any(shape is None for shape in shapes):
        return None
    attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    x, weight, *y = (shape for shape in shapes if shape is not None)
    if node.op_type == "Einsum":
        return einsum_macs(attributes["equation"].decode(), x, weight)
    return macs(node.op_type, x, weight, *y, transposed=bool(attributes.get("transA")))


def einsum_macs(equation: str, x: Shape, y: Shape) -> int:
    """Multiply-adds of an Einsum of two factors: each combination of all its indices is one product.

    Args:
        equation: ONNX's, as NumPy's: "nchw,wk->nchk"; an ellipsis stands for the dimensions in front that have no name.
        x: Shape of the first factor.
        y: Shape of the second one.
    """
    sizes: dict[str | int, int] = {}
    for term, shape in zip(equation.replace(" ", "").partition("->")[0].split(","), (x, y), strict=True):
        before, _, after = term.partition("...")
        hidden = len(shape) - len(before) - len(after)
        names = [*before, *range(-hidden, 0), *after]  # those of an ellipsis are counted from its right end
        for name, size in zip(names, shape, strict=True):
            sizes[name] = max(sizes.get(name, 1), size)
    return math.prod(sizes.values())


def macs(op: str, x: Shape, weight: Shape, y: Shape, *, transposed: bool = False) -> int:
    """Multiply-adds of a convolution or matrix product.

    Args:
        op: Name of the operator, ONNX's or ONNX Runtime's.
        x: Shape of its input: [N, C, ...] of a convolution, [..., M, K] of a product.
        weight: [C_out, C / groups, kernel...]; of a ConvTranspose [C, C_out / groups, kernel...]; [..., K, N].
        y: Shape of its output.
        transposed: Whether x is [K, M], as Gemm may have it.
    """
    if op == "ConvTranspose":  # each input value meets each weight of its channel once
        return math.prod(x) * math.prod(weight[1:])
    if op.endswith(("Conv", "ConvInteger")):  # each output value is one window of one group
        return math.prod(y) * math.prod(weight[1:])
    return math.prod(y) * (x[0] if transposed else x[-1])


def graph_facts(path: str | os.PathLike[str]) -> GraphFacts | None:
    """Count what one image costs in an exported file, zeros included.

    Layers of S and A that lie side by side are one layer whose weights between the two are zeros: it multiplies and
    stores more than was trained.

    Args:
        path: Bundle folder or ONNX file with one input and images of a fixed size.

    Returns:
        The counts; None where the graph has an operator whose MACs cannot be told, or its shapes cannot.

    Raises:
        MissingDependencyError: onnx is not installed.
        ModelFileError: The file is no ONNX file.
    """
    onnx = require("onnx", "export")
    try:
        cost = graph_cost(path, batch=1)
    except UsageError:
        return None
    if cost.uncounted:
        return None
    graph = onnx.load(str(model_path(path))).graph
    constants = [*graph.initializer]
    constants += [
        attribute.t
        for node in graph.node
        if node.op_type == "Constant"
        for attribute in node.attribute
        if attribute.name == "value"
    ]
    weights = zeros = 0
    for constant in constants:
        values = onnx.numpy_helper.to_array(constant)
        # Whole numbers of 64 bits are shapes, and one number alone is a scale or a setting.
        if values.dtype == np.int64 or values.size == 1:
            continue
        weights += values.size
        zeros += int((values.astype(np.float32) == 0).sum()) if values.dtype.kind == "V" else int((values == 0).sum())
    return GraphFacts(macs=cost.macs, weights=weights, zeros=zeros)
