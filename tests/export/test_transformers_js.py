"""The folder for Transformers.js: the graph behind another input, and a configuration that says the card's rule."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import onnxruntime
import pytest

from rkd_deploy.card import Preprocess
from rkd_deploy.errors import GateError, StorageError, UsageError
from rkd_deploy.export import transformers_js
from rkd_deploy.export.bundle import export_bundle
from rkd_deploy.export.transformers_js import export_transformers_js


@pytest.mark.parametrize("embedded", [True, False], ids=["uint8", "float32"])
def test_the_graph_answers_pixel_values_as_the_bundle_answers_its_input(model, card, tmp_path, embedded):
    rule = dataclasses.replace(card.preprocess, embedded=embedded, crop_fraction=0.8, interpolation="bicubic")
    export_bundle(model, dataclasses.replace(card, preprocess=rule), tmp_path / "bundle")
    parity = export_transformers_js(tmp_path / "bundle", tmp_path / "app")
    assert parity.passed
    assert parity.n >= 8
    session = onnxruntime.InferenceSession(tmp_path / "app/onnx/model.onnx", providers=["CPUExecutionProvider"])
    (taken,) = session.get_inputs()
    assert (taken.name, taken.type, taken.shape[1:]) == ("pixel_values", "tensor(float)", [3, 8, 8])
    golden = np.load(tmp_path / "bundle/golden.npz")
    x = golden["inputs"].astype(np.float32).transpose(0, 3, 1, 2) if embedded else golden["inputs"]
    for batch in (1, 3):
        (found,) = session.run(["logits"], {"pixel_values": np.ascontiguousarray(x[:batch])})
        np.testing.assert_allclose(found, golden["logits"][:batch], rtol=0, atol=1e-5)
    said = json.loads((tmp_path / "app/preprocessor_config.json").read_text())
    assert (said["do_rescale"], said["do_normalize"]) == (not embedded, not embedded)
    assert (said["resample"], said["size"], said["crop_size"]) == (3, {"shortest_edge": 10}, {"height": 8, "width": 8})
    assert json.loads((tmp_path / "app/config.json").read_text())["id2label"]["4"] == "e"


def test_what_it_cannot_express_is_refused(model, card, tmp_path):
    wide = Preprocess(height=8, width=12, mean=(0.5,) * 3, std=(0.25,) * 3)
    export_bundle(model, dataclasses.replace(card, preprocess=wide), tmp_path / "wide")
    with pytest.raises(UsageError, match="must be square"):
        export_transformers_js(tmp_path / "wide", tmp_path / "app")
    assert not (tmp_path / "app").exists()


def test_a_graph_that_answers_otherwise_leaves_nothing_behind(model, card, tmp_path, monkeypatch):
    export_bundle(model, card, tmp_path / "bundle")
    monkeypatch.setattr(transformers_js, "with_pixel_values", lambda graph, rule: _upside_down(graph, rule))
    with pytest.raises(GateError):
        export_transformers_js(tmp_path / "bundle", tmp_path / "app")
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    monkeypatch.undo()
    export_transformers_js(tmp_path / "bundle", tmp_path / "app")
    with pytest.raises(StorageError, match="exists already"):
        export_transformers_js(tmp_path / "bundle", tmp_path / "app")


_whole = transformers_js.with_pixel_values


def _upside_down(graph, rule):
    made = _whole(graph, rule)
    made.graph.node[0].attribute[0].ints[:] = [0, 3, 2, 1]
    return made
