"""Merges a convolution or a batch norm of each branch into one layer.

The letters are those of `wide.py`.

A branch's convolution of g groups is g blocks: block k maps its input channels to its output channels and to no others.
A merged convolution of G groups needs these blocks in G sets, each with as many input and as many output channels as
the next, no input in two sets. Within a set the weights are dense, with zeros wherever two channels are of two blocks.
The sets, by the first rule that fits:

    G = blocks    each block alone: no arithmetic on zeros. All blocks must be of one size. Taken for convolutions that
                  are grouped already (depthwise ones above all), and for the others where `grouped` asks for it.
    G = g         the k-th blocks of all branches together. All branches must have g groups.
    G = 1         all blocks in one set; the only way where branches share their input, and then without zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class _Block:
    """One group of one branch's convolution.

    Attributes:
        branch: Its number.
        inputs: Positions of its input channels in the merged input.
        outputs: Its output channels, counted in the branch.
    """

    branch: int
    inputs: Tensor
    outputs: slice

    @property
    def size(self) -> tuple[int, int]:
        return len(self.inputs), self.outputs.stop - self.outputs.start


@dataclass(frozen=True)
class MergedConv:
    """A convolution in place of several.

    Attributes:
        conv: The layer.
        order: How the channels of its input must be put in order first; None where they are as they should be.
        q: For each branch, where its output channels are in the merged output.
    """

    conv: nn.Conv2d
    order: Tensor | None
    q: list[Tensor]


def merge_convs(convs: Sequence[nn.Conv2d], p: Sequence[Tensor], channels: int, *, grouped: bool) -> MergedConv:
    """Merge the branches' convolutions: W[q_b(o), p_b(i)] = W_b[o, i], zero elsewhere; c[q_b(o)] = c_b[o].

    Args:
        convs: One of each branch; of one kernel size, stride, padding and dilation.
        p: For each branch, where its input channels are in the merged input.
        channels: Number of channels of the merged input.
        grouped: Whether blocks of one size are grouped where the branches' convolutions are not.
    """
    sets = _sets(convs, p, grouped)
    # Sorted by `unique`: the places of a block's channels are searched for below.
    inputs = [torch.cat([block.inputs for block in blocks]).unique() for blocks in sets]  # type: ignore[no-untyped-call]
    order = torch.cat(inputs)
    first = convs[0]
    conv = nn.Conv2d(
        channels,
        sum(branch_conv.out_channels for branch_conv in convs),
        first.kernel_size,  # type: ignore[arg-type]
        first.stride,  # type: ignore[arg-type]
        first.padding,  # type: ignore[arg-type]
        first.dilation,  # type: ignore[arg-type]
        groups=len(sets),
        bias=any(branch_conv.bias is not None for branch_conv in convs),
        padding_mode=first.padding_mode,
        dtype=first.weight.dtype,
    )
    q = [torch.empty(branch_conv.out_channels, dtype=torch.long) for branch_conv in convs]
    start = 0
    with torch.no_grad():
        for parameter in conv.parameters():
            parameter.zero_()
        for blocks, set_inputs in zip(sets, inputs, strict=True):
            for block in blocks:
                rows = torch.arange(start, start := start + block.size[1])
                columns = torch.searchsorted(set_inputs, block.inputs)
                branch_conv = convs[block.branch]
                conv.weight[rows[:, None], columns[None, :]] = branch_conv.weight[block.outputs]
                if conv.bias is not None and branch_conv.bias is not None:
                    conv.bias[rows] = branch_conv.bias[block.outputs]
                q[block.branch][block.outputs] = rows
    return MergedConv(conv, None if torch.equal(order, torch.arange(channels)) else order, q)


def can_group(convs: Sequence[nn.Conv2d], p: Sequence[Tensor]) -> bool:
    """Whether `grouped` makes a difference to these convolutions."""
    return len(_sets(convs, p, grouped=True)) != len(_sets(convs, p, grouped=False))


def _sets(convs: Sequence[nn.Conv2d], p: Sequence[Tensor], grouped: bool) -> list[list[_Block]]:
    blocks = [
        _Block(branch, inputs, slice(k * (rows := conv.out_channels // conv.groups), (k + 1) * rows))
        for branch, (conv, positions) in enumerate(zip(convs, p, strict=True))
        for k, inputs in enumerate(positions.chunk(conv.groups))
    ]
    all_inputs = torch.cat([block.inputs for block in blocks])
    shared = len(set(all_inputs.tolist())) < len(all_inputs)
    groups = {conv.groups for conv in convs}
    # A channel can be in one group only, so blocks that read the same channels must lie in one set.
    if shared or (groups == {1} and not grouped):
        return [blocks]
    if len({block.size for block in blocks}) == 1:
        # By their places: depthwise convolutions then take their input in any order.
        return sorted(([block] for block in blocks), key=lambda blocks: int(blocks[0].inputs.min()))
    if len(groups) == 1:
        # Group k of every branch in one set: as many groups as before, each as wide as all branches' together.
        (g,) = groups
        return [blocks[k::g] for k in range(g)]
    return [blocks]


def merge_norms(norms: Sequence[nn.BatchNorm2d], p: Sequence[Tensor], channels: int) -> nn.BatchNorm2d:
    """One batch norm: everything that it has is per channel. `p` and `channels` as for `merge_convs`."""
    # eps is 0 here, because each branch's own is added to its variances.
    merged = nn.BatchNorm2d(channels, eps=0.0, dtype=_mean(norms[0]).dtype)
    with torch.no_grad():
        for norm, positions in zip(norms, p, strict=True):
            assert merged.running_mean is not None
            assert merged.running_var is not None
            assert norm.running_var is not None
            merged.running_mean[positions] = _mean(norm)
            merged.running_var[positions] = norm.running_var + norm.eps  # eps may differ between branches
            merged.weight[positions] = torch.ones_like(_mean(norm)) if norm.weight is None else norm.weight
            merged.bias[positions] = torch.zeros_like(_mean(norm)) if norm.bias is None else norm.bias
    return merged.eval()


def fold_norm(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    """Fold a batch norm into a convolution in place: W' = W g / sd, c' = beta + (c - mean) g / sd.

    Args:
        conv: Its output is the norm's input, channel by channel.
        norm: From `merge_norms`.
    """
    assert norm.running_var is not None
    with torch.no_grad():
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        c = torch.zeros_like(scale) if conv.bias is None else conv.bias
        conv.weight.mul_(scale[:, None, None, None])
        conv.bias = nn.Parameter(norm.bias + (c - _mean(norm)) * scale)


def _mean(norm: nn.BatchNorm2d) -> Tensor:
    assert norm.running_mean is not None
    return norm.running_mean
