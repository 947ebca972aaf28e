"""The cost of a network: multiply-adds and parameters.

Convention: one multiply-add is one MAC, so MACs = FLOPs / 2. Convolutions, linear layers and matrix products count;
batch norm, activations, pooling, additions, reshapes and data movement count 0, as in the tables of the field.
PyTorch's own FLOP formulas do the counting (torch.utils.flop_counter), operator by operator as they are dispatched, so
functional calls count too. Operators that are neither counted nor known to be free are reported, never skipped.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

# Normalisation and activations; element by element; pooling and reductions; shapes and data movement.
_FREE_NAMES = """
native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm batch_norm
native_layer_norm native_group_norm relu relu_ leaky_relu leaky_relu_ hardswish hardswish_ hardsigmoid hardsigmoid_
hardtanh hardtanh_ silu silu_ gelu sigmoid sigmoid_ tanh elu elu_ mish _softmax _safe_softmax _log_softmax clamp clamp_
clamp_min linalg_vector_norm

add add_ sub sub_ mul mul_ div div_ neg pow sqrt rsqrt exp sin cos native_dropout dropout fill_ masked_fill eq ne
bitwise_not cumsum

max_pool2d max_pool2d_with_indices avg_pool2d adaptive_avg_pool2d _adaptive_avg_pool2d mean sum amax max

view _unsafe_view reshape flatten squeeze unsqueeze permute transpose t expand cat stack split split_with_sizes chunk
slice select clone copy_ detach contiguous _to_copy alias constant_pad_nd empty empty_like new_empty new_zeros zeros
zeros_like ones full arange upsample_nearest2d upsample_bilinear2d channel_shuffle native_channel_shuffle roll
as_strided as_strided_ unbind lift_fresh index
"""
_FREE = frozenset(_FREE_NAMES.split())


@dataclass(frozen=True)
class NetworkCost:
    """Cost of a network: multiply-adds for one image, and parameters.

    Attributes:
        macs: Multiply-adds.
        parameters: Trainable numbers.
        unsupported: Operators that are neither counted nor known to be free: their MACs are missing.
    """

    macs: int
    parameters: int
    unsupported: tuple[str, ...]


def count(module: nn.Module, input_size: int | tuple[int, int]) -> NetworkCost:
    """Cost of a network for one RGB image.

    Args:
        module: Left as it is; a copy is run, without data where that is possible.
        input_size: Height and width in pixels, or one number for both.
    """
    height, width = (input_size, input_size) if isinstance(input_size, int) else input_size
    return _counted(module, (1, 3, height, width))


def count_end(end: nn.Module, map_shape: tuple[int, int, int]) -> NetworkCost:
    """Cost of the end of a network for one image's map.

    Args:
        end: Left as it is.
        map_shape: (C, H, W) of the map that it takes.
    """
    return _counted(end, (1, *map_shape))


def count_head(head: nn.Module, channels: int) -> NetworkCost:
    """Cost of a head for one image's pooled map [1, C].

    Args:
        head: Left as it is.
        channels: C.
    """
    return _counted(head, (1, channels))


def _counted(module: nn.Module, shape: tuple[int, ...]) -> NetworkCost:
    try:
        operators = _run(module, shape, "meta")
    except Exception:  # of tensors that a forward makes, and of values that it looks at, there is nothing without data
        operators = _run(module, shape, "cpu")
    return NetworkCost(
        macs=operators.flops // 2,
        parameters=sum(parameter.numel() for parameter in module.parameters()),
        unsupported=tuple(sorted(operators.unsupported)),
    )


def _run(module: nn.Module, shape: tuple[int, ...], device: str) -> _Operators:
    shadow = copy.deepcopy(module).to(device).float().eval()
    for layer in shadow.modules():
        if type(layer) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
            # It keeps the shape and costs 0, but half of the time here: without data it runs as a dozen operators.
            layer.forward = nn.Identity().forward
    operators = _Operators()
    with torch.no_grad(), operators:
        shadow(torch.zeros(shape, device=device))
    return operators


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up FLOPs operator by operator, and notes the operators that nothing is known of."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0
        self.unsupported: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count one operator and run it."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = func.overloadpacket
        if packet in flop_registry:
            self.flops += flop_registry[packet](*args, **kwargs, out_val=out)
        elif packet.__name__ not in _FREE:
            self.unsupported.add(packet.__name__)
        return out
