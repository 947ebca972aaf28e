"""A progressive student fused: the same value at every level, in float64, and the adapters between stages folded."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rkd_deploy.errors import UsageError
from rkd_deploy.export.fusion import _FoldedStageAdapters, _StageAdapters, fuse
from rkd_deploy.models import zoo
from rkd_deploy.models.cost import count
from rkd_deploy.models.progressive import ProgressiveStudent, progressive_student

LEVELS = ("sum", "tail")


def test_branches_that_exchange_their_maps_cannot_lie_side_by_side() -> None:
    with pytest.raises(UsageError, match="they exchange their maps at every stage"):
        fuse(network_of("resnet8", (16, 32, 24)), "wide")


def network_of(family: str, channels: tuple[int, ...], assistants: int = 1) -> ProgressiveStudent:
    """Every weight and statistic random, so that nothing folds by luck."""
    s0 = zoo.create(family, 5)
    widths = [tuple(max(s0.multiple_of, width // part) for width in s0.widths) for part in (2, 4)]
    student, *chain = (s0.rebuilt(w, None) for w in (widths[0], *[widths[1]] * assistants))
    model = progressive_student(student, chain, channels, 5, (16, 16)).double().eval()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point():
            low, high = (0.5, 1.5) if name.endswith("running_var") else (-0.3, 0.3)
            tensor.data.uniform_(low, high)
    return model


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("family", "assistants"), [("resnet8", 1), ("resnet8", 2), ("wrn_16_1", 1), ("vgg8", 1)])
@torch.no_grad()
def test_every_level_has_the_value_of_the_network(family: str, assistants: int, level: str) -> None:
    model, x = network_of(family, (16, 32, 24), assistants), torch.randn(3, 3, 16, 16, dtype=torch.float64)
    x[1] = 5 * x[1] + 5  # pooled, images of the same noise would be almost equal
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for network in (model, model.alone()):
        expected = network(x)
        assert (expected[0] - expected[1]).abs().max() > 1e-5
        torch.testing.assert_close(fuse(network, level)(x), expected, rtol=1e-10, atol=1e-10)
    assert (model(x) - model.alone()(x)).abs().max() > 1e-5  # A does matter
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_tail_folds_the_adapters_between_stages_where_that_is_cheaper() -> None:
    """S has half of T's channels and A a quarter: one matrix [3/4, 3/4] for four, two of them to T's width and back."""
    model = network_of("resnet8", (16, 32, 64)).float()
    layers = {level: list(fuse(model, level).branches.exchanges.children()) for level in LEVELS}
    assert [len(list(layer.modules())) for layer in layers["tail"]] == [2, 2]
    convolutions = [layer.conv for layer in layers["tail"]]
    assert [(c.in_channels, c.out_channels) for c in convolutions] == [(12, 12), (24, 24)]
    costs = {level: count(fuse(model, level), 16).macs for level in LEVELS}
    assert costs["tail"] < costs["sum"] <= count(model, 16).macs
    between = 256 * 12 * (16 + 16) + 64 * 24 * (32 + 32)  # P and Q as they are trained
    folded = 256 * 12 * 12 + 64 * 24 * 24
    tail = 16 * 48 * 64 + 64 * 5 - 48 * 5  # the last adapters and the head against one matrix
    assert costs["sum"] - costs["tail"] == between - folded + tail


def test_a_narrow_teacher_keeps_its_adapters() -> None:
    """Through two channels and back is cheaper than any folded matrix."""
    model = network_of("resnet8", (2, 2, 64))
    rows = model.rows()
    exchanges = fuse(model, "tail").branches.exchanges
    assert not any(hasattr(layer, "conv") for layer in exchanges.children())
    maps = [torch.randn(2, step.adapter.in_channels, 4, 4, dtype=torch.float64) for step in rows[0]]
    kept, folded = _StageAdapters(rows[0], rows[1]), _FoldedStageAdapters(rows[0], rows[1])
    for one, other in zip(kept(tuple(maps)), folded(tuple(maps)), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    assert sum(p.numel() for p in folded.parameters()) > sum(p.numel() for p in kept.parameters())
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in fuse(model, "tail").modules())
