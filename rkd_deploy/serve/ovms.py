"""Writes a bundle as a model of OpenVINO Model Server, with the KServe resource that runs it in a cluster.

    REPOSITORY/
      config.json        the models; with INFERENCE_PRECISION_HINT, see below
      NAME.kserve.yaml   the KServe resource that serves NAME
      NAME/
        1/model.onnx     the next export of the same name is 2/

A server takes tensors, and NAME takes pixels as `images.to_array` gives them. It would take encoded images too, and
answer them otherwise: it decodes to BGR and stretches to the model's size, without antialiasing and without a crop
(docs/binary_input_layout_and_shape.md of https://github.com/openvinotoolkit/model_server). Send it none.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from rkd_deploy.backends.files import ONNX_NAME, check_files
from rkd_deploy.backends.tensorrt.source import read_source
from rkd_deploy.decoding import DecodingError, read_json
from rkd_deploy.errors import StorageError
from rkd_deploy.serve.kserve import file_name, service_text
from rkd_deploy.serve.triton.settings import Serving
from rkd_deploy.storage import new_folder, write_bytes, write_json, write_text
from rkd_deploy.text import slug

OVMS_RUNTIME = "kserve-openvino"
"""The cluster serving runtime that KServe brings for OpenVINO Model Server."""

OVMS_CONFIG = "config.json"
PLUGIN_CONFIG = {"INFERENCE_PRECISION_HINT": "f32"}
"""On CPUs with bfloat16 units OpenVINO computes in that by itself, whatever the file says."""


@dataclass(frozen=True)
class OvmsVersion:
    """A version of a model as it was written for OpenVINO Model Server."""

    repository: Path
    name: str
    version: int
    service: Path
    """File of the KServe resource."""


def export_ovms(path: str | os.PathLike[str], repository: Path, serving: Serving | None = None) -> OvmsVersion:
    """Write a model as the next version of its name; nothing is left behind where that fails.

    Args:
        path: Bundle folder or ONNX file.
        repository: Folder of the models and of config.json, which keeps its other models; made where it is not there.
        serving: Its name and where KServe fetches it from; the rest of it is Triton's.

    Raises:
        ModelFileError: The model is missing or corrupt, or a file of the bundle is not as it was written.
        StorageError: config.json is none, or something could not be written.
        MissingDependencyError: onnx is not installed.
    """
    serving = serving or Serving()
    check_files(path, complete=True)
    source = read_source(path)
    name = serving.name or slug(source.file.stem if source.card is None else source.card.name)
    config = _with_model(repository / OVMS_CONFIG, name)
    versions = [int(child.name) for child in (repository / name).glob("*") if re.fullmatch(r"[0-9]{1,18}", child.name)]
    version = max(versions, default=0) + 1
    service = repository / file_name(name)
    with new_folder(repository / name / str(version)) as temporary:
        write_bytes(temporary / ONNX_NAME, source.content)
        write_json(repository / OVMS_CONFIG, config)
        write_text(service, _service(name, serving.storage_uri))
    return OvmsVersion(repository, name, version, service)


def _service(name: str, storage_uri: str) -> str:
    return service_text(
        name,
        comment=f"Upload the folder {name}/, which holds the versions, to storageUri",
        runtime=OVMS_RUNTIME,
        model_format="onnx",
        storage_uri=storage_uri,
        # KServe starts the server with one model and no config.json.
        arguments=[f"--plugin_config={json.dumps(PLUGIN_CONFIG)}"],
    )


def _with_model(file: Path, name: str) -> dict[str, list[dict[str, object]]]:
    """The content of config.json with this model in it, beside those that are there."""
    try:
        standing = read_json(file)["model_config_list"] if os.path.lexists(file) else []
        others = [entry for entry in standing if entry["config"]["name"] != name]
    except (DecodingError, KeyError, TypeError) as error:
        raise StorageError(
            f"{file} stands there and is no list of models for OpenVINO Model Server ({error}). Move it away, or give "
            "another --repository."
        ) from error
    model = {"name": name, "base_path": name, "plugin_config": PLUGIN_CONFIG}  # the path: from config.json on
    return {"model_config_list": [*others, {"config": model}]}
