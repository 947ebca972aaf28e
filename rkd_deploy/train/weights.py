"""Weights files: safetensors with facts in the header, loaded only where they fit exactly."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from rkd_deploy.decoding import DecodingError, decode, parse_object
from rkd_deploy.errors import CheckpointError
from rkd_deploy.storage import open_regular, write_bytes
from rkd_deploy.train.facts import WeightsFacts

_FACTS = "rkd_deploy"
_HEADS = ("fc.", "head.", "heads.", "classifier.", "linear.")


def save_tensors(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write tensors and JSON facts into one safetensors file.

    Raises:
        StorageError: It could not be written whole; a file that was there before is intact.
    """
    # Cloned: safetensors stores no strides, and refuses two tensors that share their memory, as tied weights do.
    plain = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
    write_bytes(path, safetensors.torch.save(plain, {_FACTS: json.dumps(facts, allow_nan=False)}))


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_tensors` wrote; a foreign safetensors file has no facts.

    Raises:
        CheckpointError: Missing or damaged.
    """
    try:
        open_regular(path).close()  # a named pipe would wait for ever
        with safetensors.safe_open(path, framework="pt") as stream:
            facts = parse_object((stream.metadata() or {}).get(_FACTS, "{}"))
            return {key: stream.get_tensor(key) for key in stream.keys()}, facts  # noqa: SIM118
    except (OSError, safetensors.SafetensorError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(
            f"{path} cannot be read as safetensors ({reason}): the file is missing or damaged."
        ) from error


def weights_facts(path: Path, header: Mapping[str, Any]) -> WeightsFacts:
    """The facts in the header of a weights file, typed.

    Raises:
        CheckpointError: It is not what this package writes.
    """
    try:
        return decode(WeightsFacts, header)
    except DecodingError as error:
        raise CheckpointError(
            f"{path} has a damaged header of rkd-deploy: {error}. Copy the file again, or save its tensors alone."
        ) from error


def load_weights(module: nn.Module, state: Mapping[str, Tensor], where: str, what: str) -> None:
    """Load a state dict that must fit exactly.

    Args:
        module: Receives the weights.
        state: Tensors by name.
        where: The file, for messages.
        what: The network, for messages, e.g. ``"teacher resnet56"``.

    Raises:
        CheckpointError: Names the first keys that differ, or the numbers of classes.
    """
    wanted = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    # Old PyTorch had no counter of batches in batch norm, and nothing here reads it.
    missing = [key for key in wanted if key not in shapes and not key.endswith("num_batches_tracked")]
    unknown = [key for key in shapes if key not in wanted]
    if missing or unknown:
        raise CheckpointError(
            f"{where} is not a checkpoint of {what}: {len(missing)} of its {len(wanted)} weights are missing"
            f"{_first(missing)}, {len(unknown)} are foreign{_first(unknown)}. Name the network the file was saved from."
        )
    differing = [key for key in shapes if shapes[key] != wanted[key]]
    if differing and all(key.startswith(_HEADS) for key in differing):
        raise CheckpointError(
            f"{where} was trained on {shapes[differing[0]][0]} classes; the data have {wanted[differing[0]][0]}. "
            f"Use a {what} trained on these classes, or the data it was trained on."
        )
    if differing:
        shown = "; ".join(f"{key} is {shapes[key]}, not {wanted[key]}" for key in differing[:3])
        raise CheckpointError(
            f"{where} does not fit {what}: {len(differing)} weights have other shapes ({shown}). "
            "Name the network the file was saved from."
        )
    kept_as = {key: value.dtype for key, value in module.state_dict().items()}
    other = [key for key, value in state.items() if not _fits(value, kept_as.get(key, value.dtype))]
    if other:
        kind = state[other[0]]
        raise CheckpointError(
            f"{where} does not fit {what}: {len(other)} weights are of another kind{_first(other)}: "
            f"{str(kind.dtype).removeprefix('torch.')}, {str(kind.layout).removeprefix('torch.')}, on {kind.device}. "
            "Save them as dense floating-point numbers."
        )
    broken = [key for key, value in state.items() if value.is_floating_point() and not bool(value.isfinite().all())]
    if broken:
        raise CheckpointError(
            f"{where} holds NaN or infinite weights{_first(broken)}: it was saved after diverging. Take an earlier "
            "checkpoint, or train again with a lower train.lr."
        )
    module.load_state_dict(dict(state), strict=False)


def _fits(value: Tensor, dtype: torch.dtype) -> bool:
    """Whether a tensor can be copied into one of a type and stay what it is, up to rounding."""
    is_plain = value.layout == torch.strided and not value.is_quantized and not value.is_meta
    return is_plain and value.is_floating_point() == dtype.is_floating_point and value.is_complex() == dtype.is_complex


def _first(keys: list[str]) -> str:
    return f" (first: {', '.join(keys[:3])})" if keys else ""
