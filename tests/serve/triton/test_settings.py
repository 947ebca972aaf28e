"""Settings of a server, and the names and resources that follow from them."""

from __future__ import annotations

import re

import pytest
import yaml
from deployment_schemas import faults

from rkd_deploy.errors import UsageError
from rkd_deploy.serve.kserve import service_name
from rkd_deploy.serve.triton.repository import export_triton, inference_service
from rkd_deploy.serve.triton.settings import Instances, Serving


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"backend": "onnx"}, "Did you mean 'onnxruntime'"),
        ({"name": "../up"}, "'../up' names a folder"),
        ({"max_batch": 0}, "--max-batch 0 must be a whole number between 1 and 65536"),
        ({"max_batch": 999_999_999_999}, "--max-batch 999999999999 must be a whole number between 1 and 65536"),
        ({"max_batch": 1.5}, "--max-batch 1.5 must be a whole number between 1 and 65536"),
        ({"max_batch": True}, "--max-batch True must be a whole number"),
        ({"threads": 2**31}, "--threads 2147483648 must be a whole number between 1 and 1024"),
        ({"versions": 0}, "--serve-versions: versions = 0 must be"),
        ({"queue_delay_us": -1}, "--queue-delay -1"),
        ({"config": "overwrite"}, "Choices: keep, replace"),
        ({"backend": "tensorrt", "instances": Instances("cpu")}, "plans on GPUs only"),
        ({"instances": Instances("gpu"), "threads": 2}, "--threads 2 has no effect"),
        ({"storage_uri": "ftp://host/models"}, "'ftp://host/models' must be an address"),
        ({"storage_uri": "s3://a b"}, "must be an address"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, reason):
    with pytest.raises(UsageError, match=re.escape(reason)):
        Serving(**settings)


@pytest.mark.parametrize("text", ["tpu", "cpu:0", "gpu:-1", "cpu:1.5", ""])
def test_instances_are_cpu_or_gpu_and_a_number(text):
    assert Instances.parse("cpu:3") == Instances("cpu", 3)
    with pytest.raises(UsageError, match="must be cpu or gpu"):
        Instances.parse(text)


def test_a_batch_size_above_the_largest_is_refused(bundles, tmp_path):
    with pytest.raises(UsageError, match="--preferred-batch 8,16: each must be between 1 and the largest batch, 8"):
        export_triton(bundles[0], tmp_path / "models", Serving(max_batch=8, preferred=(8, 16)))


@pytest.mark.parametrize(
    ("serving", "model_format", "gpus"),
    [
        (Serving(storage_uri="s3://bucket/models"), "onnx", None),
        (Serving(storage_uri="pvc://volume/models", instances=Instances("gpu", 2)), "onnx", "1"),
        (Serving(storage_uri="gs://bucket/models", backend="tensorrt"), "tensorrt", "1"),
        (Serving(storage_uri="oci://registry/models:1", backend="python"), "triton", None),
    ],
)
def test_the_kserve_resource(serving, model_format, gpus):
    """Field by field as serving.kserve.io/v1beta1 has them; formats are those of KServe's own runtime for Triton."""
    resource = yaml.safe_load(inference_service("Foo_1.2", serving))
    model = {
        "runtime": "kserve-tritonserver",
        "protocolVersion": "v2",
        "modelFormat": {"name": model_format},
        "storageUri": serving.storage_uri,
    }
    if gpus is not None:
        model["resources"] = {"limits": {"nvidia.com/gpu": gpus}}
    assert resource == {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {"name": "foo-1-2"},
        "spec": {"predictor": {"model": model}},
    }
    assert faults("kserve_inferenceservice", resource) == []


@pytest.mark.parametrize("name", ["a", "Foo_1.2", "7up", "x" * 100, "a." + "-" * 80, "0", "NO", "1e3"])
def test_the_name_of_a_kserve_resource(name):
    service = service_name(name)
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", service)  # KServe's rule (inference_service_validation.go)
    assert len(service) <= 63
    assert yaml.safe_load(inference_service(name, Serving()))["metadata"]["name"] == service  # text, never a number
