"""Reads and writes the Open Inference Protocol, version 2, over REST.

Tensors stand in the JSON, or behind it as bytes (the binary tensor extension), or are encoded images: BYTES. Pure
functions of bytes, which never trust a length, a type or a shape that a request states.

https://github.com/kserve/open-inference-protocol, and Triton's extensions: protocol/extension_binary_data.md,
protocol/extension_classification.md of https://github.com/triton-inference-server/server
"""

from __future__ import annotations

import base64
import binascii
import itertools
import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rkd_deploy.backends import Array
from rkd_deploy.card import ModelCard
from rkd_deploy.decoding import DecodingError, decode, parse_object
from rkd_deploy.errors import UsageError, shortened, unknown_name
from rkd_deploy.text import slug

HEADER_LENGTH = "inference-header-content-length"
"""Header with the length of the JSON in bytes, where tensors follow it as bytes."""
VERSION = "1"
SERVED_OUTPUTS = ("logits", "probabilities")
EXTENSIONS = ("binary_tensor_data", "classification")
_TYPES = {"uint8": "UINT8", "float32": "FP32"}
_LENGTH = struct.Struct("<I")


@dataclass(frozen=True)
class TensorInterface:
    """What a served model takes and gives, in the protocol's words.

    Attributes:
        model: The model's name in addresses.
        input_name: Name of its one input.
        shape: Of one input, without the batch.
        dtype: NumPy's name of the input's type: uint8 or float32.
        labels: Names of the classes.
        max_batch: Most images of a request.
    """

    model: str
    input_name: str
    shape: tuple[int, ...]
    dtype: str
    labels: tuple[str, ...]
    max_batch: int

    @classmethod
    def of(cls, card: ModelCard, input_name: str, max_batch: int) -> TensorInterface:
        """The interface of a model by its card."""
        rule = card.preprocess
        return cls(slug(card.name), input_name, rule.input_shape, rule.input_dtype, card.labels, max_batch)

    @property
    def datatype(self) -> str:
        """The protocol's name of the input's type."""
        return _TYPES[self.dtype]

    def metadata(self) -> dict[str, Any]:
        """The answer to a request for the model's metadata."""
        outputs = [{"name": name, "datatype": "FP32", "shape": [-1, len(self.labels)]} for name in SERVED_OUTPUTS]
        images = {"name": self.input_name, "datatype": self.datatype, "shape": [-1, *self.shape]}
        return {
            "name": self.model,
            "versions": [VERSION],
            "platform": "rkd_deploy",
            "inputs": [images],
            "outputs": outputs,
        }


@dataclass(frozen=True)
class _Parameters:
    binary_data_size: int | None = None
    binary_data: bool | None = None
    binary_data_output: bool | None = None
    classification: int | None = None
    shared_memory_region: str | None = None


@dataclass(frozen=True)
class _Input:
    name: str
    shape: tuple[int, ...]
    datatype: str
    data: Any = None
    parameters: _Parameters = _Parameters()


@dataclass(frozen=True)
class _Output:
    name: str
    parameters: _Parameters = _Parameters()


@dataclass(frozen=True)
class _Body:
    inputs: tuple[_Input, ...]
    outputs: tuple[_Output, ...] = ()
    id: str | None = None
    parameters: _Parameters = _Parameters()


@dataclass(frozen=True)
class OutputChoice:
    """An output that a request asks for: its name, whether as bytes, and the best classes of it alone where not 0."""

    name: str
    binary: bool
    classes: int = 0


@dataclass(frozen=True)
class InferRequest:
    """A request that holds what the model takes.

    Attributes:
        tensor: [N, ...] as the graph takes it; None: `images` are to be decoded.
        images: Encoded images.
        outputs: What is asked for, in that order.
        id: The client's own mark.
    """

    tensor: Array | None
    images: tuple[bytes, ...]
    outputs: tuple[OutputChoice, ...]
    id: str | None


def parse_request(body: bytes, header_length: str | None, interface: TensorInterface) -> InferRequest:
    """Read an inference request.

    Args:
        body: JSON, and the tensors' bytes behind it.
        header_length: Value of the header `HEADER_LENGTH`; None: the body is JSON alone.
        interface: What the model takes.

    Raises:
        UsageError: It is no such request, or asks for what the model has not.
    """
    length = len(body)
    if header_length is not None:
        if not header_length.isdecimal() or len(header_length) > 10 or int(header_length) > length:
            raise UsageError(
                f"{HEADER_LENGTH} is {shortened(header_length)}; it must be the bytes of the JSON, at most {length}, "
                "those of the whole body."
            )
        length = int(header_length)
    try:
        request = decode(_Body, parse_object(body[:length].decode()))
    except (DecodingError, UnicodeDecodeError) as error:
        raise UsageError(f"The request is not what it has to be: {error}. /openapi.json describes it.") from error
    if len(request.inputs) != 1:
        raise UsageError(f"The request has {len(request.inputs)} inputs; the model takes 1, {interface.input_name!r}.")
    (tensor_input,) = request.inputs
    if tensor_input.name != interface.input_name:
        raise UsageError(unknown_name("input", tensor_input.name, [interface.input_name]))
    _check_shape(tensor_input, interface)
    binary = body[length:]
    if len(binary) != (tensor_input.parameters.binary_data_size or 0):
        raise UsageError(
            f"{len(binary)} bytes follow the JSON, and binary_data_size of {tensor_input.name!r} is "
            f"{tensor_input.parameters.binary_data_size or 0}: they must be equal."
        )
    if tensor_input.parameters.shared_memory_region is not None:
        raise UsageError("Shared memory is not served. Send the tensor itself.")
    raw = None if tensor_input.parameters.binary_data_size is None else binary
    if (raw is None) == (tensor_input.data is None):
        raise UsageError(f"Input {tensor_input.name!r} must have either data, or binary_data_size and its bytes.")
    images: tuple[bytes, ...] = ()
    tensor = None
    if tensor_input.datatype == "BYTES":
        images = (
            _texts(raw, tensor_input.shape[0]) if raw is not None else _base64(tensor_input.data, tensor_input.shape)
        )
    else:
        tensor = _numbers(raw, tensor_input.shape, interface) if raw is not None else _listed(tensor_input, interface)
    return InferRequest(tensor, images, _outputs(request, interface), request.id)


def _check_shape(tensor: _Input, interface: TensorInterface) -> None:
    if tensor.datatype not in (interface.datatype, "BYTES"):
        raise UsageError(
            f"Input {tensor.name!r} has datatype {shortened(tensor.datatype)}; it must be {interface.datatype}, or "
            "BYTES, which are encoded images."
        )
    batch, *sizes = tensor.shape or (0,)
    encoded = tensor.datatype == "BYTES"
    if not 1 <= batch <= interface.max_batch or (
        sizes not in ([], [1]) if encoded else tuple(sizes) != interface.shape
    ):
        wanted = "[N] or [N, 1]" if encoded else f"[N, {', '.join(map(str, interface.shape))}]"
        raise UsageError(
            f"Input {tensor.name!r} has shape {shortened(list(tensor.shape))}; it must be {wanted}, N from 1 to "
            f"{interface.max_batch}."
        )


def _texts(content: bytes, count: int) -> tuple[bytes, ...]:
    """Elements of a BYTES tensor: each is its length, 4 bytes with the lowest first, and that many bytes."""
    elements: list[bytes] = []
    place = 0
    while place < len(content) and len(elements) < count:
        start = place + _LENGTH.size
        size = _LENGTH.unpack_from(content, place)[0] if start <= len(content) else len(content)
        place = start + size
        if place > len(content):
            break
        elements.append(content[start:place])
    if place != len(content) or len(elements) != count:
        raise UsageError(
            f"The {len(content)} bytes of a BYTES tensor are not {count} elements of a length and as many bytes."
        )
    return tuple(elements)


def _base64(data: Any, shape: Sequence[int]) -> tuple[bytes, ...]:
    elements = _flat(data, shape)
    try:
        if not all(type(element) is str for element in elements):
            raise ValueError
        return tuple(base64.b64decode(element, validate=True) for element in elements)
    except (ValueError, binascii.Error) as error:
        raise UsageError("In JSON, BYTES must be encoded images in base64, as texts.") from error


def _numbers(content: bytes, shape: tuple[int, ...], interface: TensorInterface) -> Array:
    dtype = np.dtype(interface.dtype).newbyteorder("<")
    if len(content) != math.prod(shape) * dtype.itemsize:
        raise UsageError(
            f"Shape {list(shape)} of {interface.datatype} takes {math.prod(shape) * dtype.itemsize} bytes; "
            f"binary_data_size is {len(content)}."
        )
    return _finite(np.frombuffer(content, dtype).astype(interface.dtype).reshape(shape))


def _listed(tensor: _Input, interface: TensorInterface) -> Array:
    """Numbers that stand in the JSON, in one list or in lists of lists."""
    values = _flat(tensor.data, tensor.shape)
    allowed = {int} if interface.dtype == "uint8" else {int, float}
    if not set(map(type, values)) <= allowed or (
        interface.dtype == "uint8" and not 0 <= min(values) <= max(values) < 256
    ):
        raise UsageError(
            f"Data of {tensor.name!r} must be {'whole numbers from 0 to 255' if allowed == {int} else 'numbers'}."
        )
    with np.errstate(over="ignore"):  # 1e300 becomes infinite, which is refused
        return _finite(np.array(values, np.float64).astype(interface.dtype).reshape(tensor.shape))


def _flat(data: Any, shape: Sequence[int]) -> list[Any]:
    values = data
    if type(values) is list and values and type(values[0]) is list:
        for place, size in enumerate(shape):
            if type(values) is not list or (place and set(map(type, values)) != {list}):
                break
            sizes = {len(values)} if place == 0 else set(map(len, values))
            if sizes != {size}:
                break
            values = values if place == 0 else list(itertools.chain.from_iterable(values))
    if type(values) is not list or len(values) != math.prod(shape):
        raise UsageError(f"The data are not {math.prod(shape)} values, in one list or in lists of shape {list(shape)}.")
    return values


def _finite(tensor: Array) -> Array:
    if tensor.dtype != np.uint8 and not np.isfinite(tensor).all():
        raise UsageError("The input holds NaN or infinity; all numbers must be finite.")
    return tensor


def _outputs(request: _Body, interface: TensorInterface) -> tuple[OutputChoice, ...]:
    usual = bool(request.parameters.binary_data_output)
    choices = []
    for output in request.outputs or tuple(_Output(name) for name in SERVED_OUTPUTS):
        if output.name not in SERVED_OUTPUTS:
            raise UsageError(unknown_name("output", output.name, SERVED_OUTPUTS))
        binary, classes = output.parameters.binary_data, output.parameters.classification or 0
        if not 0 <= classes <= 65_536:
            raise UsageError(f"classification is {shortened(classes)}; it must be how many classes, from 1.")
        choices.append(
            OutputChoice(output.name, usual if binary is None else binary, min(classes, len(interface.labels)))
        )
    if len({choice.name for choice in choices}) != len(choices):
        raise UsageError("An output is asked for twice.")
    return tuple(choices)


def build_answer(
    request: InferRequest, answers: Mapping[str, Array], interface: TensorInterface
) -> tuple[bytes, dict[str, str]]:
    """The body and the headers of the answer.

    Args:
        request: What was asked for.
        answers: float32 [N, K] of each of `SERVED_OUTPUTS`.
        interface: Of the model.
    """
    outputs, binary = [], []
    for choice in request.outputs:
        values_NK = answers[choice.name]
        if choice.classes:
            texts = _classes(values_NK, choice.classes, interface.labels)
            content = b"".join(_LENGTH.pack(len(text)) + text for text in map(str.encode, itertools.chain(*texts)))
            output = {"name": choice.name, "datatype": "BYTES", "shape": [len(texts), choice.classes]}
            data: list[Any] = list(itertools.chain(*texts))
        else:
            content = values_NK.astype("<f4").tobytes()
            output = {"name": choice.name, "datatype": "FP32", "shape": list(values_NK.shape)}
            data = values_NK.ravel().tolist() if not choice.binary else []
        if choice.binary:
            binary.append(content)
            outputs.append({**output, "parameters": {"binary_data_size": len(content)}})
        else:
            outputs.append({**output, "data": data})
    answer = {"model_name": interface.model, "model_version": VERSION, "outputs": outputs}
    head = json.dumps(answer if request.id is None else {**answer, "id": request.id}).encode()
    if not binary:
        return head, {"content-type": "application/json"}
    return b"".join((head, *binary)), {"content-type": "application/octet-stream", HEADER_LENGTH: str(len(head))}


def _classes(values_NK: Array, count: int, labels: Sequence[str]) -> list[list[str]]:
    """The classes with the largest values, as Triton writes them: value, index, label."""
    best_NC = (-values_NK).argsort(axis=1, kind="stable")[:, :count]
    return [[f"{row_K[k]:f}:{k}:{labels[k]}" for k in best_C] for row_K, best_C in zip(values_NK, best_NC, strict=True)]
