"""Quantises a graph to INT8 by ONNX Runtime's quantiser, with ranges measured here.

An activation's range is [a lo, a hi]: its extremes, shrunk by the a of least squared rounding error E(a), because one
outlier would cost all other values their steps. Weights are quantised per output channel. Logits are left in float32:
to round them costs as many classes as a whole layer does, and nothing is won.

For TensorRT, whose zero points are all 0, ReLU's values have 127 steps. What convolutions and matrix products read is
rounded to them; what an addition reads is not, so that a chain of residual blocks carries no rounding from one to the
next. On ResNet-56 that halves the squared error of the logits.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from rkd_deploy.backends import Array
from rkd_deploy.errors import require
from rkd_deploy.export.precision.gate import logits_of
from rkd_deploy.export.precision.layers import WEIGHTED, preprocessing, quantisable

CALIBRATION_BATCH = 8
"""Images at a time: every activation of them is held in memory."""
VALUES_PER_IMAGE = 256
"""Values drawn from each tensor for each image."""
SHRINKAGES = np.linspace(0.2, 1.0, 41)
"""Values of a that are tried: shares of the extremes."""
INT8_STEPS = 255
"""Steps between the 256 values of 8 bits; symmetric int8 leaves -128 out, and has one step less."""

Range = tuple[float, float]


def best_ranges(proto: Any, tensors: Iterable[str], inputs: Array, *, symmetric: bool) -> dict[str, Range]:
    """Ranges of activations, measured on the float32 graph.

    Args:
        proto: The exported float32 graph.
        tensors: Names of activations; those that are not float32 are left out.
        inputs: Calibration images as the graph takes them.
        symmetric: Whether 0 must lie in the middle of each range, as TensorRT wants it.
    """
    values: dict[str, list[Array]] = {}
    extremes: dict[str, Range] = {}
    random = np.random.default_rng(0)
    for name, activation in _activations(proto, tensors, inputs):
        flat = activation.ravel()
        # Extremes of every value, since a sample would miss the outliers; a sample of the rest, since all activations
        # of 256 images would be gigabytes, and E(a) is a mean.
        lo, hi = extremes.get(name, (0.0, 0.0))  # 0 must be in the range: it is what convolutions pad with
        extremes[name] = (min(lo, float(flat.min())), max(hi, float(flat.max())))
        values.setdefault(name, []).append(random.choice(flat, VALUES_PER_IMAGE * len(activation)))
    return {name: best_range(np.concatenate(values[name]), extremes[name], symmetric=symmetric) for name in extremes}


def best_range(x: Array, extremes: Range, *, symmetric: bool) -> Range:
    """[a lo, a hi] of least E(a) for values x of one tensor; lo <= 0 <= hi."""
    lo, hi = extremes
    if symmetric:
        hi = max(-lo, hi)
        lo = -hi
    if lo == hi:
        return lo, hi
    x = x.astype(np.float32)
    # A grid, not a descent: E(a) falls while rounding gets finer and rises once values are cut off, with small dents.
    # Of equal errors the narrowest range wins, whose steps are finest.
    errors = [_error(x, a * lo, a * hi, INT8_STEPS - 1 if symmetric else INT8_STEPS) for a in SHRINKAGES]
    a = float(SHRINKAGES[int(np.argmin(errors))])
    return a * lo, a * hi


def _error(x: Array, lo: float, hi: float, steps: int) -> float:
    """E: the zero point is a whole number of steps from lo."""
    scale = (hi - lo) / steps
    zero = round(-lo / scale)
    q = np.clip(np.rint(x / scale), -zero, steps - zero)
    return float(np.mean((x - scale * q) ** 2))


def _activations(proto: Any, tensors: Iterable[str], inputs: Array) -> Iterator[tuple[str, Array]]:
    """Each tensor for each batch, from a session that gives them all out."""
    onnx = require("onnx", "export")
    onnxruntime = require("onnxruntime", "cpu")
    inferred = onnx.shape_inference.infer_shapes(proto)
    known = {info.name: info for info in (*inferred.graph.value_info, *inferred.graph.output, *inferred.graph.input)}
    out = {info.name for info in inferred.graph.output}
    float32 = onnx.TensorProto.FLOAT
    names = [name for name in tensors if name in known and known[name].type.tensor_type.elem_type == float32]
    inferred.graph.output.extend(known[name] for name in names if name not in out)
    session = onnxruntime.InferenceSession(inferred.SerializeToString(), providers=["CPUExecutionProvider"])
    for start in range(0, len(inputs), CALIBRATION_BATCH):
        fed = {proto.graph.input[0].name: inputs[start : start + CALIBRATION_BATCH]}
        yield from zip(names, session.run(names, fed), strict=True)


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
        kinds = WEIGHTED if self._strict else (*WEIGHTED, *_ARITHMETIC)
        self._kinds = kinds if self._strict else (*kinds, *_PASSING, *_SHAPING)
        self.nodes = quantisable(proto, kinds)
        """Layers that can be kept in float32: name for people to name of the node."""
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
        measured = best_ranges(proto, activations, inputs, symmetric=self._strict)
        ranges = {name: (np.float32(lo), np.float32(hi)) for name, (lo, hi) in measured.items()}
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
    # The quantiser shares one Q/DQ pair among all readers of a tensor.
    for node in proto.graph.node:
        if node.op_type in (*WEIGHTED, "QuantizeLinear", "DequantizeLinear"):
            continue
        for number, name in enumerate(node.input):
            dequantise = produced.get(name)
            if dequantise is not None and dequantise.op_type == "DequantizeLinear":
                node.input[number] = produced[dequantise.input[0]].input[0]


SENSITIVITY_IMAGES = 64
"""Calibration images that sensitivities are measured on: few are enough to rank layers."""


def sensitivities(
    quantiser: Int8Quantiser, nodes: dict[str, str], reference: Any, inputs: Array, backend: str
) -> dict[str, float]:
    """The sensitivity of every layer: the mean squared change of the logits where it alone is quantised.

    Args:
        quantiser: The quantiser of the graph.
        nodes: Name for people to name of the node.
        reference: The float32 graph.
        inputs: Calibration images as the graph takes them.
        backend: What the file is proven on.
    """
    inputs = inputs[:SENSITIVITY_IMAGES]
    expected_NK = logits_of(reference, [inputs], backend)
    changes = {}
    for name, node in nodes.items():
        quantised_NK = logits_of(quantiser.quantised(only=[node]), [inputs], backend)
        changes[name] = float(np.mean((quantised_NK - expected_NK) ** 2))
    return changes


def fewest_kept(ranked: Sequence[str], passes: Callable[[Sequence[str]], bool]) -> Sequence[str]:
    """The shortest beginning of a ranking that passes.

    Args:
        ranked: Layers, the most sensitive first; to keep none of them is known not to pass.
        passes: Whether the gate passes with these layers kept; asked at most 2 log2(len(ranked)) + 2 times.

    Returns:
        The layers to keep, for which `passes` was asked; all of them where even that does not pass.
    """
    # Doubling, then bisection: usually one or two layers are to blame, and each question costs a conversion and a run
    # over all held-out images. That a longer beginning passes where a shorter one did is likely, not certain (a gate on
    # few images is noisy): the answer is one that has passed, and need not be the very shortest.
    failing, passing = 0, 1
    while not passes(ranked[:passing]):
        if passing >= len(ranked):
            return ranked
        failing, passing = passing, min(2 * passing, len(ranked))
    while passing - failing > 1:
        middle = (failing + passing) // 2
        if passes(ranked[:middle]):
            passing = middle
        else:
            failing = middle
    return ranked[:passing]
