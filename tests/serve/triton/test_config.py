"""The configuration of a model and its ensemble, held against Triton's own protobuf."""

from __future__ import annotations

import json

import pytest

from rkd_deploy.serve.triton.repository import export_triton
from rkd_deploy.serve.triton.settings import Instances, Serving
from tests.support.repositories import NAME, save


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["onnxruntime", "tensorrt", "python"])
def test_the_configuration_is_triton_s(triton, with_plan, tmp_path, backend):
    """Read by Triton's own protobuf definition, which knows no field that is not its own."""
    bundle = with_plan("1:1:1", "2:8:32")
    on_cpu = {} if backend == "tensorrt" else {"threads": 2, "instances": Instances("cpu", 3)}
    serving = Serving(backend=backend, queue_delay_us=500, versions=None if backend == "python" else 2, **on_cpu)
    export_triton(bundle, tmp_path / "models", serving)
    config = json.loads(triton.client("config", tmp_path / "models" / NAME / "config.pbtxt"))
    sizes = [1, 8, 32] if backend == "tensorrt" else [8, 32]
    image = {"data_type": "TYPE_UINT8", "dims": ["8", "8", "3"]}
    group = {"kind": "KIND_CPU", "count": 3}
    if backend == "tensorrt":
        group = {"kind": "KIND_GPU", "count": 1, "profile": ["0", "1"]}
    wanted = {
        "name": NAME,
        "backend": backend,
        "max_batch_size": 32,
        "input": [{"name": "input", **image}],
        "output": [{"name": "logits", "data_type": "TYPE_FP32", "dims": ["5"], "label_filename": "labels.txt"}],
        "dynamic_batching": {"preferred_batch_size": sizes, "max_queue_delay_microseconds": "500"},
        "instance_group": [group],
        "version_policy": {"all": {}} if backend == "python" else {"latest": {"num_versions": 2}},
        "model_warmup": [
            {"name": f"batch_{size}", "batch_size": size, "inputs": {"input": {**image, "zero_data": True}}}
            for size in sorted({1, *sizes})
        ],
    }
    if on_cpu:
        wanted["parameters"] = {"intra_op_thread_count": {"string_value": "2"}}
    assert config == wanted


@pytest.mark.slow
def test_the_ensemble_is_triton_s(triton, bundles, tmp_path):
    export_triton(bundles[0], tmp_path, Serving(max_batch=16))
    config = json.loads(triton.client("config", tmp_path / f"{NAME}-images/config.pbtxt"))
    assert config == {
        "name": f"{NAME}-images",
        "platform": "ensemble",
        "max_batch_size": 16,
        "input": [{"name": "input", "data_type": "TYPE_STRING", "dims": ["1"]}],
        "output": [{"name": "logits", "data_type": "TYPE_FP32", "dims": ["5"], "label_filename": "labels.txt"}],
        "ensemble_scheduling": {
            "step": [
                {
                    "model_name": f"{NAME}-pixels",
                    "model_version": "-1",
                    "input_map": {"images": "input"},
                    "output_map": {"pixels": "pixels"},
                },
                {
                    "model_name": NAME,
                    "model_version": "-1",
                    "input_map": {"input": "pixels"},
                    "output_map": {"logits": "logits"},
                },
            ]
        },
    }
    config = json.loads(triton.client("config", tmp_path / f"{NAME}-pixels/config.pbtxt"))
    assert config["backend"] == "python"
    assert config["output"] == [{"name": "pixels", "data_type": "TYPE_UINT8", "dims": ["8", "8", "3"]}]


@pytest.mark.slow
def test_names_of_others_are_quoted(triton, tmp_path):
    written = export_triton(save(tmp_path / "model.onnx", [["n", 3]]), tmp_path / "models")
    config = json.loads(triton.client("config", written.repository / "model/config.pbtxt"))
    assert config["output"] == [{"name": 'say "hi"\\', "data_type": "TYPE_FP32", "dims": ["3"]}]


@pytest.mark.slow
def test_a_field_that_triton_does_not_know_is_seen(triton, tmp_path):
    (tmp_path / "config.pbtxt").write_text("dynamic_batching { preferred_batch_sizes: [ 8 ] }\n")
    with pytest.raises(AssertionError, match='has no field named "preferred_batch_sizes"'):
        triton.client("config", tmp_path / "config.pbtxt")
