"""INT8 with ONNX Runtime's own quantiser: ranges from calibration images, Q/DQ pairs in the graph.

Ranges are those of least squared error (`ranges.py`). Weights are quantised per output channel. Logits are left in
float32: to round them costs as many classes as a whole layer does, and nothing is won.

For TensorRT, whose zero points are all 0, ReLU's values have 127 steps. What convolutions and matrix products read is
rounded to them; what an addition reads is not, so that a chain of residual blocks carries no rounding from one to the
next. On ResNet-56 that halves the squared error of the logits.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from rkd_deploy.errors import require
from rkd_deploy.export.layers import WEIGHTED, preprocessing, quantisable
from rkd_deploy.export.ranges import best_ranges

_ARITHMETIC = ("Add", "Mul", "Concat")
# Passed through as integers where what they read is quantised; softmax and other functions stay in float32.
_PASSING = ("Relu", "Clip", "MaxPool", "AveragePool", "GlobalAveragePool")
_SHAPING = ("Reshape", "Flatten", "Transpose", "Slice", "Split", "Squeeze", "Unsqueeze")


class Int8Quantiser:
    """Quantises one graph as often as asked; ranges are measured once.

    A context manager: ranges and files lie in a temporary folder.

    Args:
        proto: An exported float32 graph.
        inputs: Calibration images as the graph takes them.
        target: cpu, openvino or tensorrt.
    """

    def __init__(self, proto: Any, inputs: npt.NDArray[Any], target: str) -> None:
        self._strict, self._preprocessing = target == "tensorrt", preprocessing(proto)
        kept = WEIGHTED if self._strict else (*WEIGHTED, *_ARITHMETIC)
        self._kinds = kept if self._strict else (*kept, *_PASSING, *_SHAPING)
        self.nodes = quantisable(proto, kept)
        """What can be kept in float32: name for people to name of the node."""
        self._folder = tempfile.TemporaryDirectory(prefix="rkd-deploy-int8-")
        self._source = Path(self._folder.name) / "float32.onnx"
        self._source.write_bytes(_prepared(proto).SerializeToString())
        self._ranges = self._source.with_name("ranges.json")
        self._measure(proto, inputs)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._folder.cleanup()

    def quantised(self, *, without: Sequence[str] = (), only: Sequence[str] = ()) -> Any:
        """A quantised copy of the graph.

        Args:
            without: Nodes to leave in float32.
            only: Quantise these nodes and no others; all, where none is named.

        Returns:
            An onnx.ModelProto.
        """
        quantization = require("onnxruntime.quantization", "cpu")
        onnx = require("onnx", "export")
        quantised = self._source.with_name("quantised.onnx")
        quantization.quantize_static(
            self._source,
            quantised,
            None,  # no images: the ranges are there
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=list(self._kinds),
            per_channel=True,
            activation_type=quantization.QuantType.QInt8 if self._strict else quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            nodes_to_quantize=list(only),
            nodes_to_exclude=[*self._preprocessing, *without],
            extra_options=self._extra_options(),
            calibration_cache_path=self._ranges,
        )
        proto = onnx.load(quantised)
        if self._strict:
            _give_others_float(proto)
        return proto

    def _measure(self, proto: Any, inputs: npt.NDArray[Any]) -> None:
        """Write the ranges of everything that may be quantised, as ONNX Runtime's quantiser reads them."""
        calibrate = require("onnxruntime.quantization.calibrate", "cpu")
        constants = {tensor.name for tensor in proto.graph.initializer}
        nodes = [node for node in proto.graph.node if node.op_type in self._kinds]
        tensors = dict.fromkeys(name for node in nodes for name in (*node.input, *node.output))
        activations = [name for name in tensors if name not in constants]
        found = best_ranges(proto, activations, inputs, symmetric=self._strict)
        ranges = {name: (np.float32(lo), np.float32(hi)) for name, (lo, hi) in found.items()}
        data = calibrate.TensorsData(calibrate.CalibrationMethod.MinMax, ranges)
        calibrate.save_tensors_data(data, self._ranges)

    def _extra_options(self) -> dict[str, Any]:
        if not self._strict:
            return {"OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"]}
        # TensorRT takes no zero point and no int32 bias. Outputs stay in float, so that it can fuse a convolution with
        # the addition and the activation behind it: a Q/DQ pair in between would forbid that and round twice.
        return {
            "ActivationSymmetric": True,
            "WeightSymmetric": True,
            "QuantizeBias": False,
            "OpTypesToExcludeOutputQuantization": list(WEIGHTED),
        }


def _prepared(proto: Any) -> Any:
    """A copy marked as folded, with shapes known: it is, and the quantiser warns where nothing says so."""
    marked = type(proto)()
    marked.CopyFrom(proto)
    del marked.metadata_props[:]
    entry = marked.metadata_props.add()
    entry.key, entry.value = "onnx.quant.pre_process", "onnxruntime.quant"
    return marked


def _give_others_float(proto: Any) -> None:
    """Let every node but layers read the activation itself, not what the quantiser rounded for a layer beside it."""
    produced = {name: node for node in proto.graph.node for name in node.output}
    for node in proto.graph.node:
        if node.op_type in (*WEIGHTED, "QuantizeLinear", "DequantizeLinear"):
            continue
        for number, name in enumerate(node.input):
            dequantise = produced.get(name)
            if dequantise is not None and dequantise.op_type == "DequantizeLinear":
                node.input[number] = produced[dequantise.input[0]].input[0]
