"""Reads what Triton must know of a model: inputs, outputs, its plan, its batch sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rkd_deploy.backends.tensorrt.record import EngineRecord, engine_path, read_engine
from rkd_deploy.backends.tensorrt.settings import Profile
from rkd_deploy.backends.tensorrt.source import OnnxSource
from rkd_deploy.errors import ModelFileError, UsageError, command_line, require
from rkd_deploy.serve.triton.settings import Serving
from rkd_deploy.text import slug

_TYPES: dict[str, str] = {
    "FLOAT": "TYPE_FP32",
    "FLOAT16": "TYPE_FP16",
    "BFLOAT16": "TYPE_BF16",
    "DOUBLE": "TYPE_FP64",
    "UINT8": "TYPE_UINT8",
    "INT8": "TYPE_INT8",
    "INT32": "TYPE_INT32",
    "INT64": "TYPE_INT64",
}


@dataclass(frozen=True)
class Tensor:
    """An input or output: Triton's name of its type, and its shape without the batch."""

    name: str
    type: str
    dims: tuple[int, ...]


@dataclass(frozen=True)
class Signature:
    """Input, outputs and class names of a model, as a server has to know them."""

    name: str
    """Name of the model, fit for a folder and an address."""
    input: Tensor
    outputs: tuple[Tensor, ...]
    labels: tuple[str, ...]
    """Names of the classes, in the logits' order; empty: the file does not say."""

    def labelled(self, output: Tensor) -> bool:
        """Whether the numbers of this output are one for each class."""
        return bool(self.labels) and output.name in ("logits", "probabilities") and output.dims == (len(self.labels),)


def read_signature(source: OnnxSource) -> Signature:
    """Read the signature of a model from its ONNX file.

    Raises:
        UsageError: Triton's batching cannot serve such a model: a fixed batch, another free dimension.
    """
    graph = require("onnx", "export").load_model_from_string(source.content).graph
    weights = {tensor.name for tensor in graph.initializer}
    (images,) = (value for value in graph.input if value.name not in weights)  # `read_source` has seen to it
    card = source.card
    labels = () if card is None else card.labels
    if any("\n" in label or "\r" in label for label in labels):
        raise ModelFileError(f"A label of {source.file} holds a line break, and labels.txt is one label a line.")
    return Signature(
        name=slug(source.file.stem if card is None else card.name),
        input=_tensor(source, images),
        outputs=tuple(_tensor(source, value) for value in graph.output),
        labels=labels,
    )


def _tensor(source: OnnxSource, value: Any) -> Tensor:
    tensor = value.type.tensor_type
    shape = [None if dim.HasField("dim_param") else dim.dim_value or None for dim in tensor.shape.dim]
    shown = ", ".join("?" if size is None else str(size) for size in shape)
    kind = require("onnx", "export").TensorProto.DataType.Name(tensor.elem_type)
    if kind not in _TYPES:
        raise UsageError(
            f"{value.name!r} of {source.file} has the type {kind}, which is not served here. Export the model with "
            "numbers in and out."
        )
    if not shape or shape[0] is not None:
        raise UsageError(
            f"{value.name!r} of {source.file} has the shape [{shown}]: its batch is fixed, and requests could not be "
            "joined. Export the model with a free batch, as rkd-deploy export --format onnx does."
        )
    dims = tuple(size for size in shape[1:] if size is not None)
    if len(dims) != len(shape) - 1:
        raise UsageError(
            f"{value.name!r} of {source.file} has the shape [{shown}]: only the batch may be free, so that images of "
            "different requests fit together. Export the model for one image size."
        )
    return Tensor(value.name, _TYPES[kind], dims)


LARGEST = 32
"""Largest batch by default, where the model has no limit of its own."""

USUAL = 8
"""A smaller batch that is waited for by default, as the engines here are built for it."""


@dataclass(frozen=True)
class Plan:
    """An engine and, unless another tool built it, what is known of it."""

    file_name: str
    content: bytes
    record: EngineRecord | None

    @property
    def profiles(self) -> tuple[Profile, ...]:
        """The ranges of batch sizes that it was built for; empty: unknown."""
        return () if self.record is None else tuple(Profile.parse(text) for text in self.record.profiles)


@dataclass(frozen=True)
class Batching:
    """Batch sizes of a served model, all defaults filled in.

    Attributes:
        most: Largest batch.
        preferred: Batch sizes that the scheduler waits for, ascending.
        profiles: How many profiles the plan has; 0: it is none, or nothing is known of it.
    """

    most: int
    preferred: tuple[int, ...]
    profiles: int = 0


def read_plan(source: OnnxSource, signature: Signature, serving: Serving) -> Plan:
    """The engine beside the ONNX file.

    Raises:
        UsageError: There is none; the message says how to get one.
        ModelFileError: It is another model's, or is not as it was written.
    """
    file = engine_path(source.file, "tensorrt")
    if not file.is_file():
        model = source.file.parent if source.card is not None else source.file
        raise UsageError(
            f"There is no TensorRT plan for Triton: {file} does not exist. A plan runs only in the TensorRT that built "
            "it, and on such a GPU. Where the server's version is installed: "
            f"{command_line('export', model, '--format', 'tensorrt')}; or in the server's container: "
            f"{_trtexec(source, signature, serving, file.name)}; then come back. "
            "--triton-backend onnxruntime needs no plan."
        )
    content, record = read_engine(file)
    if record is not None and record.onnx_sha256 != source.sha256:
        raise ModelFileError(
            f"{file} was built from another {record.onnx_name} than {source.file} (their checksums differ). Build it "
            f"again with: {command_line('export', source.file, '--format', 'tensorrt')}"
        )
    return Plan(str(file), content, record)


def choose_batching(serving: Serving, plan: Plan | None) -> Batching:
    """Fill in what is left open, and hold what is asked for against what the plan takes.

    Raises:
        UsageError: A batch size that the model cannot take.
    """
    profiles = () if plan is None else plan.profiles
    usual: tuple[int, ...] = (USUAL,)
    most = serving.max_batch or LARGEST
    if plan is not None and profiles:
        largest = max(profile.most for profile in profiles)
        most = serving.max_batch or largest
        usual = tuple(profile.best for profile in profiles)
        refused = [size for size in range(1, most + 1) if not any(profile.covers(size) for profile in profiles)]
        if refused:
            raise UsageError(
                f"{plan.file_name} was built for {', '.join(map(str, profiles))} images, and up to --max-batch {most} "
                f"Triton may send any number, {refused[0]} too. Build it with --profile 1:OPT:MAX, MAX at least {most}."
            )
    preferred = serving.preferred or (*(size for size in usual if size <= most), most)
    if not all(1 <= size <= most for size in preferred):
        raise UsageError(
            f"--preferred-batch {','.join(map(str, preferred))}: each must be between 1 and the largest batch, {most}."
        )
    return Batching(most, tuple(sorted(set(preferred))), len(profiles))


def _trtexec(source: OnnxSource, signature: Signature, serving: Serving, engine: str) -> str:
    batching = choose_batching(serving, None)
    shapes = {"min": 1, "opt": batching.preferred[0], "max": batching.most}
    sizes = "x".join(map(str, signature.input.dims))
    ranges = " ".join(f"--{end}Shapes={signature.input.name}:{batch}x{sizes}" for end, batch in shapes.items())
    return f"trtexec --onnx={source.file.name} --saveEngine={engine} {ranges}"
