"""The KServe resource that runs a model repository on a cluster: an InferenceService of serving.kserve.io/v1beta1."""

from __future__ import annotations

import json
import re

from rkd_deploy.export.triton.settings import Serving

RUNTIME = "kserve-tritonserver"
"""The cluster serving runtime that KServe brings for Triton."""

_FORMATS = {"onnxruntime": "onnx", "tensorrt": "tensorrt", "python": "triton"}
"""Which of the runtime's model formats a backend's file is; "triton" is any repository that Triton itself can read."""

_TEMPLATE = """\
# Upload the model repository (the folder that holds {model}/) to storageUri, then: kubectl apply -f {file}
apiVersion: serving.kserve.io/v1beta1
kind: InferenceService
metadata:
  name: {name}
spec:
  predictor:
    model:
      runtime: {runtime}
      protocolVersion: v2
      modelFormat:
        name: {model_format}
      storageUri: {uri}
"""

_GPU = """\
      resources:
        limits:
          nvidia.com/gpu: "1"
"""


def inference_service(model: str, serving: Serving) -> str:
    """The YAML text.

    Args:
        model: Name of the model in the repository.
        serving: What is asked for.
    """
    text = _TEMPLATE.format(
        model=model,
        file=file_name(model),
        name=json.dumps(service_name(model)),  # a JSON string is a YAML string
        runtime=RUNTIME,
        model_format=_FORMATS[serving.backend],
        uri=json.dumps(serving.storage_uri),
    )
    return text + (_GPU if serving.where.kind == "gpu" else "")


def file_name(model: str) -> str:
    """Where it lies: beside the model's folder, where Triton does not look."""
    return f"{model}.kserve.yaml"


def service_name(model: str) -> str:
    """The model's name by KServe's rule, [a-z]([-a-z0-9]*[a-z0-9])?, at most 63 characters."""
    name = re.sub(r"[^a-z0-9]+", "-", model.lower()).strip("-")
    name = name if re.match(r"[a-z]", name) else f"model-{name}".rstrip("-")
    return name[:63].rstrip("-")
