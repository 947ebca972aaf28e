"""INT8 with ONNX Runtime's own quantiser: ranges from calibration images, Q/DQ pairs in the graph.

Ranges are minima and maxima: percentile and entropy ranges brought nothing on CIFAR-100 and hold every activation of
every image in memory. Weights are quantised per output channel. Logits are left in float32: to round them costs as many
classes as a whole layer does, and nothing is won.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy.typing as npt

from rkd_deploy.errors import require
from rkd_deploy.export.layers import WEIGHTED, preprocessing, quantisable

BATCH = 32
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
        self._inputs, self._strict = inputs, target == "tensorrt"
        self._input_name, self._preprocessing = proto.graph.input[0].name, preprocessing(proto)
        kept = WEIGHTED if self._strict else (*WEIGHTED, *_ARITHMETIC)
        self._kinds = kept if self._strict else (*kept, *_PASSING, *_SHAPING)
        self.nodes = quantisable(proto, kept)
        """What can be kept in float32: name for people to name of the node."""
        self._folder = tempfile.TemporaryDirectory(prefix="rkd-deploy-int8-")
        self._source = Path(self._folder.name) / "float32.onnx"
        self._source.write_bytes(_prepared(proto).SerializeToString())

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
        folder = Path(self._folder.name)
        ranges = folder / "ranges.json"
        quantization.quantize_static(
            self._source,
            folder / "quantised.onnx",
            None if ranges.exists() else _reader(quantization, self._input_name, self._inputs),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=list(self._kinds),
            per_channel=True,
            activation_type=quantization.QuantType.QInt8 if self._strict else quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            nodes_to_quantize=list(only),
            nodes_to_exclude=[*self._preprocessing, *without],
            extra_options=self._extra_options(),
            calibration_cache_path=ranges,
        )
        return onnx.load(folder / "quantised.onnx")

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


def _reader(quantization: Any, name: str, inputs: npt.NDArray[Any]) -> Any:
    """The images as ONNX Runtime's calibrator reads them."""

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]  # a class of an untyped package
        def __init__(self) -> None:
            self._batches = iter([{name: inputs[start : start + BATCH]} for start in range(0, len(inputs), BATCH)])

        def get_next(self) -> dict[str, npt.NDArray[Any]] | None:
            return next(self._batches, None)

    return Reader()
