"""FP8 (E4M3) with NVIDIA ModelOpt, for TensorRT. ONNX Runtime's own quantiser ruins the network (cosine 0.09)."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt

from rkd_deploy.errors import require
from rkd_deploy.export.layers import preprocessing


def to_fp8(proto: Any, inputs: npt.NDArray[Any], keep: Sequence[str] = ()) -> Any:
    """A copy of a float32 graph with FP8 Q/DQ pairs before its layers.

    Args:
        proto: An exported graph.
        inputs: Calibration images as the graph takes them.
        keep: Nodes to leave in float32.

    Raises:
        MissingDependencyError: ModelOpt is not installed.
    """
    onnx = require("onnx", "export")
    modelopt = require("modelopt.onnx.quantization", "quant")
    with tempfile.TemporaryDirectory(prefix="rkd-deploy-fp8-") as name:
        source, target = Path(name) / "model.onnx", Path(name) / "fp8.onnx"
        source.write_bytes(proto.SerializeToString())
        modelopt.quantize(
            str(source),
            quantize_mode="fp8",
            calibration_data={proto.graph.input[0].name: inputs},
            calibration_eps=["cpu"],  # its CUDA calibration can crash where cuDNN does not fit
            high_precision_dtype="fp32",
            nodes_to_exclude=[*preprocessing(proto), *keep],
            output_path=str(target),
            log_level="ERROR",
        )
        return onnx.load(target)
