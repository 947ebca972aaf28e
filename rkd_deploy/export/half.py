"""16-bit floats, written by PyTorch's own exporter.

Pre-processing stays in float32, where it costs nothing and loses nothing, and so do the outputs. Converters of files
were tried and left: ONNX Runtime's float16 puts a pair of casts around every node that it is told to leave alone and
does not sort them, and ModelOpt's AutoCast cannot take uint8 inputs.
"""

from __future__ import annotations

from typing import Any

import torch

from rkd_deploy.card import Preprocess
from rkd_deploy.errors import UsageError
from rkd_deploy.export.graph import OPSET, ExportGraph, to_onnx

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
BF16_OPSET = 22
"""The first whose convolutions are defined for bf16."""


def to_half(graph: ExportGraph, preprocess: Preprocess, precision: str) -> Any:
    """The graph exported again with its network in 16 bits.

    Args:
        graph: Pre-processing, network and outputs; left as it is.
        preprocess: For the type and shape of the input.
        precision: fp16 or bf16.

    Raises:
        UsageError: fp16, which ends at 65,504, cannot hold a weight.
    """
    dtype = DTYPES[precision]
    limit = torch.finfo(dtype).max
    for name, tensor in graph.network.state_dict().items():
        if tensor.dtype.is_floating_point and (largest := float(tensor.abs().amax())) > limit:
            raise UsageError(
                f"--precision {precision} ends at {limit:g}, and {name} holds {largest:g}. "
                "Choose --precision bf16, whose range is that of float32."
            )
    return to_onnx(graph.lowered(dtype), preprocess, opset=BF16_OPSET if precision == "bf16" else OPSET)
