"""Batch norm folded: the same values, also where a layer is called twice or its weight is read by another."""

import copy

import pytest
import torch
from torch import nn

from rkd_deploy.card import ModelCard, Preprocess
from rkd_deploy.export.bundle import export_bundle
from rkd_deploy.export.fusion.batch_norm import fold_batch_norms
from tests.support.networks import Shared, TwoNorms, body

IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def scrambled(network):
    generator = torch.Generator().manual_seed(7)
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        if tensor.dtype.is_floating_point:
            low, high = (0.5, 1.5) if name.endswith("running_var") else (-0.4, 0.4)
            tensor.data.uniform_(low, high, generator=generator)
    return network.eval()


class OnLinear(nn.Module):
    """A linear layer under a norm of its outputs, and one of the second dimension of three."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(16, 8), nn.BatchNorm1d(8)
        self.tokens, self.over_rows = nn.Linear(16, 5), nn.BatchNorm1d(48)

    def forward(self, x):
        rows = self.over_rows(self.tokens(x.flatten(1, 2)))
        return self.norm(self.linear(x.mean((1, 2)))) + rows.mean((1, 2))[:, None]


@pytest.mark.parametrize(
    ("network", "left"),
    [(body(), 0), (Shared(4), 0), (TwoNorms(4), 3), (OnLinear(), 1)],
    ids=["plain", "shared", "two norms", "linear"],
)
@torch.no_grad()
def test_values_stay(network, left):
    network = scrambled(network)
    before = copy.deepcopy(network.state_dict())
    folded = fold_batch_norms(network)
    torch.testing.assert_close(folded(IMAGES), network(IMAGES), rtol=1e-5, atol=1e-5)
    used = {str(node.target) for node in folded.graph.nodes if node.op == "call_module"}
    assert sum(isinstance(folded.get_submodule(name), nn.BatchNorm1d | nn.BatchNorm2d) for name in used) == left
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())  # a copy was folded


@pytest.mark.parametrize("kind", [Shared, TwoNorms])
def test_a_layer_that_is_called_twice_passes_its_parity(kind, tmp_path):
    preprocess = Preprocess(height=16, width=16, mean=(0.5,) * 3, std=(0.25,) * 3)
    card = ModelCard(name="shared", labels=tuple("abcd"), preprocess=preprocess)
    assert export_bundle(scrambled(kind(4)), card, tmp_path / "bundle").parity.max_abs_diff <= 1e-4
