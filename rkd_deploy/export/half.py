"""16-bit floats: fp16 by ONNX Runtime's converter of files, bf16 by PyTorch's own exporter.

Both leave the pre-processing in float32, where it costs nothing and loses nothing, and both give float32 logits. The
converter has no bf16, and ModelOpt's AutoCast, which has, cannot take uint8 inputs: PyTorch writes such a graph by
itself when the network is bf16.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rkd_deploy.card import Preprocess
from rkd_deploy.errors import UsageError, require
from rkd_deploy.export.graph import ExportGraph, to_onnx
from rkd_deploy.export.layers import preprocessing

BF16_OPSET = 22
"""The first whose convolutions are defined for bf16."""


def to_fp16(proto: Any) -> Any:
    """A copy of a float32 graph in fp16.

    Raises:
        UsageError: fp16, which ends at 65,504, cannot hold a weight.
    """
    numpy_helper = require("onnx.numpy_helper", "export")
    limit = float(np.finfo(np.float16).max)
    for tensor in proto.graph.initializer:
        largest = float(np.abs(numpy_helper.to_array(tensor)).max(initial=0))
        if largest > limit:
            raise UsageError(
                f"--precision fp16 ends at {limit:g}, and {tensor.name} holds {largest:g}. "
                "Choose --precision bf16, whose range is that of float32."
            )
    source = type(proto)()
    source.CopyFrom(proto)  # the converter works in place
    float16 = require("onnxruntime.transformers.float16", "cpu")
    return float16.convert_float_to_float16(source, keep_io_types=True, node_block_list=preprocessing(proto))


def to_bf16(graph: ExportGraph, preprocess: Preprocess) -> Any:
    """The graph exported again with its network in bf16.

    Args:
        graph: Pre-processing, network and outputs; left as it is.
        preprocess: For the type and shape of the input.

    Raises:
        UsageError: Outputs other than logits and probabilities are asked for.
    """
    if "features" in graph.outputs:
        raise UsageError("--precision bf16 exports logits and probabilities only. Leave features out of --outputs.")
    lowered = copy.deepcopy(graph)
    lowered.network = InBf16(lowered.network)
    return to_onnx(lowered, preprocess, opset=BF16_OPSET)


class InBf16(nn.Module):
    """A network computed in bf16 between float32 input and output."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.bfloat16()

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Float32 to float32."""
        logits_NK: Tensor = self.network(x_NCHW.to(torch.bfloat16))
        return logits_NK.float()
