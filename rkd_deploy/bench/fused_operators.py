"""Replaces ONNX Runtime's own operators by standard ones, so that shapes can be inferred.

A file that ONNX Runtime optimised or quantised holds operators of its domains, of which onnx knows no shapes: without
this everything behind the first one would have no known size. What stands in computes the same shape, and need not
compute the same values.

Reference: docs/ContribOperators.md and core/optimizer/nchwc_transformer.cc of https://github.com/microsoft/onnxruntime
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_MICROSOFT, _NCHWC = "com.microsoft", "com.microsoft.nchwc"

_STANDS_IN: dict[tuple[str, str], tuple[str, tuple[int, ...]]] = {
    (_MICROSOFT, "FusedConv"): ("Conv", (0, 1)),
    (_MICROSOFT, "FusedGemm"): ("Gemm", (0, 1)),
    (_MICROSOFT, "FusedMatMul"): ("MatMul", (0, 1)),
    (_MICROSOFT, "FusedMatMulActivation"): ("MatMul", (0, 1)),
    (_MICROSOFT, "QGemm"): ("Gemm", (0, 3)),
    (_MICROSOFT, "MatMulIntegerToFloat"): ("MatMul", (0, 1)),
    (_MICROSOFT, "DynamicQuantizeMatMul"): ("MatMul", (0, 1)),
    (_MICROSOFT, "QLinearAdd"): ("Add", (0, 3)),
    (_MICROSOFT, "QLinearMul"): ("Add", (0, 3)),
    (_MICROSOFT, "QLinearGlobalAveragePool"): ("GlobalAveragePool", (0,)),
    (_MICROSOFT, "QLinearAveragePool"): ("AveragePool", (0,)),
    (_MICROSOFT, "QuantizeLinear"): ("QuantizeLinear", (0, 1, 2)),
    (_MICROSOFT, "DequantizeLinear"): ("DequantizeLinear", (0, 1, 2)),
    (_NCHWC, "Conv"): ("Conv", (0, 1)),
    (_NCHWC, "MaxPool"): ("MaxPool", (0,)),
    (_NCHWC, "AveragePool"): ("AveragePool", (0,)),
    (_NCHWC, "GlobalAveragePool"): ("GlobalAveragePool", (0,)),
    (_NCHWC, "GlobalMaxPool"): ("GlobalMaxPool", (0,)),
    **{
        (_MICROSOFT, op): ("Identity", (0,))
        for op in ("Gelu", "FastGelu", "QuickGelu", "BiasGelu", "QLinearSigmoid", "QLinearLeakyRelu", "QLinearSoftmax")
    },
}
"""Standard operator of the same output shape, and which inputs it takes over, by domain and type of an operator."""

_FLOAT_RESULT = ("MatMulIntegerToFloat", "QGemm")
"""Operators of integer factors whose result is float32; QGemm's is where it is given no scale for the result."""
_RESHAPED = ((_MICROSOFT, "QLinearConcat"), (_NCHWC, "ReorderInput"), (_NCHWC, "ReorderOutput"))
_TRANSPOSED = ("transA", "transB", "transBatchA", "transBatchB")


def multiplies_nothing(node: Any) -> bool:
    """Whether an operator of ONNX Runtime's domains is known to be no sum of products."""
    stands_in = _STANDS_IN.get((node.domain, node.op_type))
    if stands_in is not None:
        return stands_in[0] not in ("Conv", "Gemm", "MatMul")
    return (node.domain, node.op_type) in (
        (_MICROSOFT, "QLinearConcat"),
        (_NCHWC, "ReorderInput"),
        (_NCHWC, "ReorderOutput"),
    )


def standardised(model: Any, onnx: Any) -> Any:
    """A copy of a ModelProto whose operators are onnx's own, as far as a standard one of the same shape is known."""
    copy = type(model)()
    copy.CopyFrom(model)
    del copy.graph.node[:]
    for number, node in enumerate(model.graph.node):
        copy.graph.node.extend(_standard(node, number, copy.graph, onnx))
    return copy


def _standard(node: Any, number: int, graph: Any, onnx: Any) -> Sequence[Any]:
    attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    make = onnx.helper.make_node
    if (node.domain, node.op_type) == (_MICROSOFT, "QLinearConcat"):  # y_scale, y_zero, then x, scale, zero of each
        return [make("Concat", node.input[2::3], node.output[:1], axis=attributes["axis"])]
    if (node.domain, node.op_type) == (_NCHWC, "ReorderInput") and not attributes.get("channels_last"):
        return [make("Identity", node.input[:1], node.output[:1])]
    if (node.domain, node.op_type) == (_NCHWC, "ReorderOutput") and not attributes.get("channels_last"):
        # Blocks of channels are filled up to 8 or 16: behind them are as many channels again as there were.
        bounds = {name: f"{name} of node {number}" for name in ("starts", "ends", "axes")}
        values = {"starts": 0, "ends": attributes["channels"], "axes": 1}
        graph.initializer.extend(
            onnx.helper.make_tensor(bounds[name], onnx.TensorProto.INT64, [1], [value])
            for name, value in values.items()
        )
        return [make("Slice", [node.input[0], *bounds.values()], node.output[:1])]
    stands_in = _STANDS_IN.get((node.domain, node.op_type))
    if stands_in is None or attributes.get("channels_last"):
        return [node]
    op, places = stands_in
    if op == "MatMul" and any(attributes.get(name) for name in _TRANSPOSED):
        return [node]
    known = {name: value for name, value in attributes.items() if name in _ATTRIBUTES.get(op, ())}
    inputs = [node.input[place] for place in places if place < len(node.input)]
    as_float = node.op_type in _FLOAT_RESULT and not (node.op_type == "QGemm" and len(node.input) > 7 and node.input[7])
    if not as_float:
        return [make(op, inputs, node.output[:1], **known)]
    product = f"product of node {number}"
    return [
        make(op, inputs, [product], **known),
        make("Cast", [product], node.output[:1], to=onnx.TensorProto.FLOAT),
    ]


_WINDOW = ("auto_pad", "dilations", "kernel_shape", "pads", "strides")
_ATTRIBUTES = {
    "Conv": (*_WINDOW, "group"),
    "Gemm": ("transA", "transB"),
    "MaxPool": (*_WINDOW, "ceil_mode"),
    "AveragePool": (*_WINDOW, "ceil_mode"),
    "QuantizeLinear": ("axis",),
    "DequantizeLinear": ("axis",),
}
"""Attributes that an operator's output shape depends on, by standard operator."""
