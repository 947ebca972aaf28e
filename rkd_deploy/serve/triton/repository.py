"""Writes Triton model repositories: one folder a model, in it one folder a version.

    REPOSITORY/
      NAME.kserve.yaml   the KServe resource that serves this repository
      NAME/
        config.pbtxt     what goes in and out; batching, instances, versions, warm-up
        labels.txt       one class name a line
        1/               model.onnx; or model.plan and its record; or model.onnx and model.py
        2/               the next export of the same name
      NAME-pixels/       prepares encoded images for it, with versions of the same numbers
      NAME-images/       the ensemble of both: encoded images in, logits out

A version is never overwritten and appears whole or not at all, so that a server which polls the repository can be given
the next one while it answers.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from rkd_deploy.backends.files import check_files
from rkd_deploy.backends.tensorrt.source import OnnxSource, read_source
from rkd_deploy.errors import StorageError, UsageError
from rkd_deploy.serve.kserve import file_name, service_text
from rkd_deploy.serve.triton.config import LABELS_NAME, config_text, interface
from rkd_deploy.serve.triton.ensemble import configurations, ensemble_files, pixels_files, stage_names
from rkd_deploy.serve.triton.settings import Serving
from rkd_deploy.serve.triton.signature import Plan, Signature, choose_batching, read_plan, read_signature
from rkd_deploy.storage import new_folder, read_text, write_bytes, write_text

TRITON_RUNTIME = "kserve-tritonserver"
"""The cluster serving runtime that KServe brings for Triton."""

_FORMATS = {"onnxruntime": "onnx", "tensorrt": "tensorrt", "python": "triton"}
"""KServe's model format by Triton's backend; "triton" is any repository that Triton itself can read."""


def inference_service(model: str, serving: Serving) -> str:
    """The text of an InferenceService in YAML, which makes KServe serve a repository with Triton.

    Args:
        model: Name of the model in the repository.
        serving: What is asked for.
    """
    return service_text(
        model,
        comment=f"Upload the model repository (the folder that holds {model}/) to storageUri",
        runtime=TRITON_RUNTIME,
        model_format=_FORMATS[serving.backend],
        storage_uri=serving.storage_uri,
        gpu=serving.where.kind == "gpu",
    )


TRITON_CONFIG = "config.pbtxt"
_VERSION = re.compile(r"[0-9]{1,18}")
"""Names of folders that are versions, as Triton reads them."""
MODEL_CODE = Path(__file__).with_name("model.py")
"""Source of the python backend; copied, never imported: what it imports is there only inside of Triton."""


@dataclass(frozen=True)
class Written:
    """A version of a model as it was written to a repository."""

    repository: Path
    name: str
    version: int
    service: Path
    """File of the KServe resource."""
    unchanged: tuple[Path, ...]
    """Configuration files that stood there already, differ, and were left as they are, as `Serving.config` says."""


def export_triton(path: str | os.PathLike[str], repository: Path, serving: Serving | None = None) -> Written:
    """Write a model as the next version of its name; nothing is left behind where that fails.

    Args:
        path: Bundle folder or ONNX file.
        repository: What `tritonserver --model-repository` is given; made where it is not there.
        serving: On what, how many at a time, which versions.

    Raises:
        UsageError: A setting that does not fit the model or what stands there; no plan for backend tensorrt.
        ModelFileError: The model is missing or corrupt, or a file of the bundle is not as it was written.
        StorageError: Something else stands there, or it could not be written.
        MissingDependencyError: onnx is not installed.
    """
    serving = serving or Serving()
    check_files(path, complete=True)
    source = read_source(path)
    _check_precision(source, serving)
    signature = read_signature(source)
    plan = read_plan(source, signature, serving) if serving.backend == "tensorrt" else None
    name = serving.name or signature.name
    folder = repository / name
    batching = choose_batching(serving, plan)
    texts = {
        folder / TRITON_CONFIG: config_text(name, signature, serving, batching),
        repository / file_name(name): inference_service(name, serving),
    }
    if source.card is not None:  # without one, nothing is known of what is done to images
        texts |= {
            repository / each / TRITON_CONFIG: text for each, text in configurations(name, signature, batching).items()
        }
    version = _next_version(folder, interface(name, serving.backend, signature), signature)
    unchanged = _unchanged(texts, serving)
    with ExitStack() as opened:
        # What is entered last appears first: the ensemble after its parts, for a server that polls the repository.
        if source.card is not None:
            pixels, ensemble = stage_names(name)
            if not (repository / ensemble).exists():
                _write_model(opened, repository / ensemble, 1, texts, _labels(signature), ensemble_files())
            _write_model(opened, repository / pixels, version, texts, "", pixels_files(source.card))
        _write_model(opened, folder, version, texts, _labels(signature), _version_files(source, plan, serving))
        for path, text in texts.items():
            if path not in unchanged:
                write_text(path, text)
    return Written(repository, name, version, repository / file_name(name), unchanged)


def _check_precision(source: OnnxSource, serving: Serving) -> None:
    wrong = source.precision == "fp8" or (source.precision == "bf16" and serving.where.kind == "cpu")
    if wrong and serving.backend != "tensorrt":
        raise UsageError(
            f"{source.file} is {source.precision}, which ONNX Runtime cannot run rightly on a {serving.where.kind}. "
            "Serve a plan of it (--triton-backend tensorrt), or export another precision."
        )


def _next_version(folder: Path, wanted: str, signature: Signature) -> int:
    """The number after the newest version of a model in its folder; 1 for a new model.

    Raises:
        StorageError: The folder is no model's.
        UsageError: The model there takes or answers something else.
    """
    if not os.path.lexists(folder):
        return 1
    try:
        versions = [int(child.name) for child in folder.iterdir() if child.is_dir() and _VERSION.fullmatch(child.name)]
    except OSError as error:
        raise StorageError(
            f"{folder} cannot be read as a model's folder: {error.strerror}. Remove it first."
        ) from error
    config, labels = folder / TRITON_CONFIG, folder / LABELS_NAME
    if not versions or not config.is_file():
        raise StorageError(
            f"{folder} exists already and holds no model with a version and a {TRITON_CONFIG}. Remove it first, or "
            "give another --model-name or --repository."
        )
    standing = _text_of(config)
    named = _text_of(labels) if os.path.lexists(labels) else ""
    if wanted not in standing or named != _labels(signature):
        what = "backend, inputs or outputs" if wanted not in standing else "labels"
        raise UsageError(
            f"{folder} serves a model with other {what} than this one; every version must agree on them, or clients "
            "break. Give another --model-name."
        )
    return max(versions) + 1


def _text_of(path: Path) -> str:
    try:
        return read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise StorageError(f"{path} of that repository cannot be read: {reason}. Mend or remove it.") from error


def _unchanged(texts: dict[Path, str], serving: Serving) -> tuple[Path, ...]:
    """Configuration files that stand there already, differ from what would be written, and are to stay.

    Raises:
        UsageError: A file differs, and `Serving.config` does not say whether to keep or to replace it.
    """
    differing = {
        path: difflib.unified_diff(standing.splitlines(), text.splitlines(), "there", "asked for", n=0, lineterm="")
        for path, text in texts.items()
        if os.path.lexists(path) and (standing := _text_of(path)) != text
    }
    if differing and serving.config is None:
        path, difference = next(iter(differing.items()))
        changed = [line for line in difference if not line.startswith(("---", "+++", "@@"))]
        raise UsageError(
            f"{path} stands there already and is not what was asked for:\n" + "\n".join(changed) + "\n"
            "Give --config keep to leave it as it is, or --config replace."
        )
    return tuple(differing) if serving.config == "keep" else ()


def _version_files(source: OnnxSource, plan: Plan | None, serving: Serving) -> dict[str, bytes]:
    """The files of a version, by their names in its folder."""
    if plan is None:
        files = {"model.onnx": source.content}
    else:
        files = {"model.plan": plan.content}
        if plan.record is not None:
            files["model.plan.json"] = (json.dumps(plan.record.to_dict(), indent=2, allow_nan=False) + "\n").encode()
    return {**files, "model.py": MODEL_CODE.read_bytes()} if serving.backend == "python" else files


def _write_model(
    opened: ExitStack, folder: Path, version: int, texts: dict[Path, str], labels: str, files: dict[str, bytes]
) -> None:
    """Write a version, and the model around it where there is none; it appears when `opened` is left.

    The texts that stand in a new model's folder are taken out of `texts`.
    """
    whole = not folder.exists()
    temporary = opened.enter_context(new_folder(folder if whole else folder / str(version)))
    if whole:
        write_text(temporary / TRITON_CONFIG, texts.pop(folder / TRITON_CONFIG))
        if labels:
            write_text(temporary / LABELS_NAME, labels)
    for name, content in files.items():
        write_bytes((temporary / str(version) if whole else temporary) / name, content)


def _labels(signature: Signature) -> str:
    return "".join(f"{label}\n" for label in signature.labels)
