"""What is done to a network while it is exported: nothing that changes the file."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import nn

from rkd_deploy.card import METADATA_KEY, Preprocess
from rkd_deploy.export.exporter import fast_exporter
from rkd_deploy.export.graph import ExportGraph, append_card, to_onnx

FLOATS = Preprocess(height=4, width=4, mean=(0.5,) * 3, std=(0.5,) * 3, embedded=False)


class Shortcut(nn.Module):
    """x + relu(x), or 2 relu(x) where the activation overwrites what the shortcut reads."""

    def __init__(self, *, inplace: bool) -> None:
        super().__init__()
        self.act, self.fc = nn.ReLU(inplace=inplace), nn.Linear(3, 5)

    def forward(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        shifted = x_NCHW + 0.1
        activated = self.act(shifted)
        return self.fc((shifted + activated).mean((2, 3)))


@pytest.mark.parametrize("inplace", [True, False])
def test_an_activation_that_overwrites_what_is_read_again_is_exported_as_it_is(inplace):
    network = Shortcut(inplace=inplace).eval()
    x = torch.randn(2, 3, 4, 4)
    expected = network(x.clone()).detach().numpy()
    proto = to_onnx(ExportGraph(network, FLOATS), FLOATS)
    (found,) = ort.InferenceSession(proto.SerializeToString()).run(["logits"], {"input": x.numpy()})
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    assert network.act.inplace is inplace


def test_activations_overwrite_again_afterwards_and_not_meanwhile():
    network = nn.Sequential(nn.Flatten(), nn.ReLU(inplace=True)).eval()
    with fast_exporter(network, torch.randn(1, 3, 4, 4)):
        assert network[1].inplace is False
    assert network[1].inplace is True


def test_an_appended_card_is_what_every_reader_finds(model, card, tmp_path):
    preprocess = card.preprocess
    proto = to_onnx(ExportGraph(model, preprocess), preprocess)
    del proto.metadata_props[:]
    file = tmp_path / "model.onnx"
    before = proto.SerializeToString(deterministic=True)
    file.write_bytes(before)
    append_card(file, card)
    import onnx

    read = onnx.load(file)
    assert [entry.key for entry in read.metadata_props] == [METADATA_KEY]
    assert ort.InferenceSession(str(file)).get_modelmeta().custom_metadata_map == {METADATA_KEY: card.to_json()}
    del read.metadata_props[:]
    assert read.SerializeToString(deterministic=True) == before
