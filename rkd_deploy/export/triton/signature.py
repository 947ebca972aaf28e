"""What goes in and out of a model, in the words of Triton's configuration: read from the ONNX file itself."""

from __future__ import annotations

import re
from dataclasses import dataclass

import onnx
from onnx import TensorProto

from rkd_deploy.errors import ModelFileError, UsageError
from rkd_deploy.serve.engines.source import Source

_TYPES: dict[int, str] = {
    TensorProto.FLOAT: "TYPE_FP32",
    TensorProto.FLOAT16: "TYPE_FP16",
    TensorProto.BFLOAT16: "TYPE_BF16",
    TensorProto.DOUBLE: "TYPE_FP64",
    TensorProto.UINT8: "TYPE_UINT8",
    TensorProto.INT8: "TYPE_INT8",
    TensorProto.INT32: "TYPE_INT32",
    TensorProto.INT64: "TYPE_INT64",
}


@dataclass(frozen=True)
class Tensor:
    """An input or output: Triton's name of its type, and its shape without the batch."""

    name: str
    type: str
    dims: tuple[int, ...]


@dataclass(frozen=True)
class Signature:
    """What a model takes and answers, and what its classes are called."""

    name: str
    """Of the model, fit for a folder and an address."""
    input: Tensor
    outputs: tuple[Tensor, ...]
    labels: tuple[str, ...]
    """Empty: the file does not say."""

    def labelled(self, output: Tensor) -> bool:
        """Whether the numbers of this output are one for each class."""
        return bool(self.labels) and output.name in ("logits", "probabilities") and output.dims == (len(self.labels),)


def read_signature(source: Source) -> Signature:
    """Read it from an ONNX file.

    Raises:
        UsageError: Triton's batching cannot serve such a model: a fixed batch, another free dimension.
    """
    graph = onnx.load_model_from_string(source.content).graph
    weights = {tensor.name for tensor in graph.initializer}
    (images,) = (value for value in graph.input if value.name not in weights)  # `read_source` has seen to it
    card = source.card
    labels = () if card is None else card.labels
    if any("\n" in label or "\r" in label for label in labels):
        raise ModelFileError(f"A label of {source.file} holds a line break, and labels.txt is one label a line.")
    return Signature(
        name=_slug(source.file.stem if card is None else card.name),
        input=_tensor(source, images),
        outputs=tuple(_tensor(source, value) for value in graph.output),
        labels=labels,
    )


def _tensor(source: Source, value: onnx.ValueInfoProto) -> Tensor:
    tensor = value.type.tensor_type
    shape = [None if dim.HasField("dim_param") else dim.dim_value or None for dim in tensor.shape.dim]
    shown = ", ".join("?" if size is None else str(size) for size in shape)
    if tensor.elem_type not in _TYPES:
        raise UsageError(
            f"{value.name!r} of {source.file} has the type {TensorProto.DataType.Name(tensor.elem_type)}, which is not "
            "served here. Export the model with numbers in and out."
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
    return Tensor(value.name, _TYPES[tensor.elem_type], dims)


def _slug(text: str) -> str:
    """A text as a model's name: "digits S + A" -> "digits-s-a"."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:100] or "model"
