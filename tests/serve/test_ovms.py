"""What OpenVINO Model Server is given: its configuration, and a graph that answers as the bundle does under it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import yaml
from deployment_schemas import faults

from rkd_deploy.errors import StorageError
from rkd_deploy.serve.ovms import export_ovms
from rkd_deploy.serve.triton.settings import Serving


def test_versions_stand_side_by_side_and_other_models_stay(photo_bundle, tmp_path):
    for version in (1, 2):
        written = export_ovms(photo_bundle, tmp_path / "models")
        assert (written.name, written.version) == ("tiny-s-a", version)
    export_ovms(photo_bundle, tmp_path / "models", Serving(name="other"))
    config = json.loads((tmp_path / "models/config.json").read_text())
    hint = {"INFERENCE_PRECISION_HINT": "f32"}
    assert config == {
        "model_config_list": [
            {"config": {"name": name, "base_path": name, "plugin_config": hint}} for name in ("tiny-s-a", "other")
        ]
    }
    assert faults("ovms_config", config) == []
    found = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {
        "models/config.json",
        *(f"models/tiny-s-a/{version}/model.onnx" for version in (1, 2)),
        "models/other/1/model.onnx",
        *(f"models/{name}.kserve.yaml" for name in ("tiny-s-a", "other")),
    }


def test_the_graph_under_this_configuration_gives_the_golden_logits(photo_bundle, tmp_path):
    """By OpenVINO itself, which is what the server runs; the server is in no package here."""
    import openvino

    export_ovms(photo_bundle, tmp_path)
    (entry,) = json.loads((tmp_path / "config.json").read_text())["model_config_list"]
    file = tmp_path / entry["config"]["base_path"] / "1/model.onnx"
    compiled = openvino.Core().compile_model(file, "CPU", entry["config"]["plugin_config"])
    assert compiled.get_property("INFERENCE_PRECISION_HINT") == openvino.Type.f32
    golden = np.load(photo_bundle / "golden.npz")
    found = compiled(golden["inputs"])["logits"]
    np.testing.assert_allclose(found, golden["logits"], atol=float(golden["tolerance"]))


def test_the_kserve_resource_names_its_runtime_and_the_precision(photo_bundle, tmp_path):
    written = export_ovms(photo_bundle, tmp_path, Serving(storage_uri="s3://bucket/models/tiny-s-a"))
    found = yaml.safe_load(written.service.read_text())
    assert (found["kind"], found["metadata"]["name"]) == ("InferenceService", "tiny-s-a")
    assert found["spec"]["predictor"]["model"] == {
        "runtime": "kserve-openvino",
        "protocolVersion": "v2",
        "modelFormat": {"name": "onnx"},
        "storageUri": "s3://bucket/models/tiny-s-a",
        "args": ['--plugin_config={"INFERENCE_PRECISION_HINT": "f32"}'],
    }


def test_the_resource_is_what_the_cluster_takes(photo_bundle, tmp_path):
    resource = yaml.safe_load(export_ovms(photo_bundle, tmp_path).service.read_text())
    assert faults("kserve_inferenceservice", resource) == []


@pytest.mark.parametrize(
    ("schema", "document", "words"),
    [
        (
            "ovms_config",
            {"model_config_list": [{"config": {"name": "a", "base_pat": "a"}}]},
            "'base_pat' was unexpected",
        ),
        ("ovms_config", {"model_config_list": [{"config": {"base_path": "a"}}]}, '"name" is a required property'),
        (
            "ovms_config",
            {"model_config_list": [{"config": {"name": "a", "base_path": "a", "plugin_config": {"X": [1]}}}]},
            "is not valid",
        ),
        ("kserve_inferenceservice", {"spec": {"predictor": {"model": {"modelFormat": {}}}}}, '"name" is a required'),
        ("kserve_inferenceservice", {"spec": {"predictor": {"model": {"args": "x"}}}}, "is not of type"),
        ("kserve_inferenceservice", {"spec": {"predictor": {"modle": {}}}}, "'modle' was unexpected"),
    ],
)
def test_the_schemas_say_no(schema, document, words):
    assert any(words in fault for fault in faults(schema, document)), faults(schema, document)


@pytest.mark.parametrize("content", ["", "[]", '{"model_config_list": 1}', '{"model_config_list": [1]}', "{}"])
def test_a_configuration_of_something_else_is_left_alone(photo_bundle, tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(StorageError, match="is no list of models for OpenVINO Model Server"):
        export_ovms(photo_bundle, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_the_command(rkd, photo_bundle, tmp_path):
    done = rkd("export", photo_bundle, "--format", "ovms", "--repository", "models", "--model-name", "tiny", "--json")
    assert done.code == 0, done.err
    assert done.json["ovms"] == {
        "repository": "models",
        "service": "models/tiny.kserve.yaml",
        "name": "tiny",
        "version": 1,
    }
    assert f"ovms --config_path {tmp_path / 'models/config.json'}" in done.err
    for flag, value in (("--max-batch", "8"), ("--instances", "cpu"), ("--tf32", None), ("--threads", "1")):
        refused = rkd("export", photo_bundle, "--format", "ovms", flag, *([value] if value else []))
        assert refused.code == 2
        assert f"has no use for {flag}" in refused.err or f"has no use for {flag}:" in refused.err
