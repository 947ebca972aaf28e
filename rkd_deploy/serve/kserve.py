"""Writes the resource that makes KServe serve a model in a cluster; the runtime is named, never left to be guessed."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

_TEMPLATE = """\
# {comment}, then: kubectl apply -f {file}
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


def service_text(
    model: str,
    *,
    comment: str,
    runtime: str,
    model_format: str,
    storage_uri: str,
    gpu: bool = False,
    arguments: Sequence[str] = (),
) -> str:
    """The text of an InferenceService in YAML (serving.kserve.io/v1beta1).

    Args:
        model: Name of the model, which the resource gets as far as KServe takes it.
        comment: What is to be uploaded.
        runtime: Name of a ClusterServingRuntime.
        model_format: One that this runtime supports.
        storage_uri: Where KServe fetches the model from.
        gpu: Whether to ask for one.
        arguments: Of the server, beside those that the runtime gives it.
    """
    text = _TEMPLATE.format(
        comment=comment,
        file=file_name(model),
        name=json.dumps(service_name(model)),  # a JSON string is a YAML string
        runtime=runtime,
        model_format=model_format,
        uri=json.dumps(storage_uri),
    )
    if arguments:
        text += "      args:\n" + "".join(f"        - {json.dumps(argument)}\n" for argument in arguments)
    return text + (_GPU if gpu else "")


def file_name(model: str) -> str:
    """Name of the file that holds the resource; it lies beside the model's folder, where no server looks."""
    return f"{model}.kserve.yaml"


def service_name(model: str) -> str:
    """The model's name by KServe's rule, [a-z]([-a-z0-9]*[a-z0-9])?, at most 63 characters."""
    name = re.sub(r"[^a-z0-9]+", "-", model.lower()).strip("-")
    name = name if re.match(r"[a-z]", name) else f"model-{name}".rstrip("-")
    return name[:63].rstrip("-")
