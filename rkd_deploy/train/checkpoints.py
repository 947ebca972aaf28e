"""Reads checkpoints of other programs: their formats, names of weights and order of classes.

A checkpoint is a .safetensors file, or a PyTorch file that torch.load reads with weights_only=True: one that holds
anything but tensors and plain containers is refused, so that nothing is ever executed.
"""

from __future__ import annotations

import argparse
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rkd_deploy.errors import CheckpointError, unknown_name
from rkd_deploy.storage import open_regular, read_text
from rkd_deploy.train.facts import WeightsFacts
from rkd_deploy.train.weights import load_tensors, weights_facts

_SETS = ("state_dict", "model", "model_state_dict", "net", "network", "weights")
"""Keys that hold the weights themselves, first choice first; any other set of tensors comes after them."""
_PREFIXES = ("module.", "_orig_mod.", "network.", "model.")
"""Prefixes that nn.DataParallel, torch.compile, `External`, and Lightning and others (`model`) put before names.
Others, an attribute of a Lightning module say, are stripped where a network's names are known and fit then."""
_COUNTER = "n_averaged"
"""Name of the counter that torch.optim.swa_utils.AveragedModel stores beside the weights."""
_DEEPEST = 4
"""Levels of dicts that are looked through for weights; a file can hold itself, and then has no end."""


class Checkpoint(NamedTuple):
    """One set of weights out of a file, by the network's own names.

    Attributes:
        state: Tensors by the names of the network's modules.
        facts: The header, where this package wrote the file.
        chosen: Key of the set that was taken, where the file has several; else empty.
        others: Keys of the sets that were not.
    """

    state: dict[str, Tensor]
    facts: WeightsFacts
    chosen: str = ""
    others: tuple[str, ...] = ()


def weights_path(checkpoint: str) -> Path:
    """The path of a weights file that a recipe names; ``~`` is the home folder."""
    return Path(os.path.expanduser(checkpoint))  # of a user who is not there Path.expanduser raises


def check_readable(path: Path, key: str = "") -> None:
    """Refuse a weights file that is not there or cannot be read.

    Args:
        path: The file.
        key: The recipe's key that names it, for the message.

    Raises:
        CheckpointError: There is no such file, or it is a folder, a pipe, a pointer of Git LFS, or not readable.
    """
    where = f" ({key})" if key else ""
    try:
        open_regular(path).close()
    except FileNotFoundError as error:
        raise CheckpointError(
            f"There is no checkpoint at {path}{where}. Name a .safetensors, .pth or .pt file."
        ) from error
    except OSError as error:
        raise CheckpointError(
            f"{path}{where} cannot be read as a checkpoint: {error.strerror}. Name a .safetensors, .pth or .pt file."
        ) from error


def load_checkpoint(path: Path, wanted: Collection[str] = (), key: str | None = None) -> Checkpoint:
    """Read the weights of a checkpoint.

    Prefixes of wrapped training are stripped where the names do not fit as they are, and only as far as they fit then.

    Args:
        path: A .safetensors, .pth, .pt, .bin or .ckpt file.
        wanted: Names of the network's weights. Empty: all of `_PREFIXES` are stripped.
        key: Which of several sets, with dots where they are nested. Default: the first of `_SETS`, else the first.

    Raises:
        CheckpointError: Missing, damaged, holding more than weights, or without such a set.
    """
    check_readable(path)
    if path.suffix == ".safetensors":
        tensors, header = load_tensors(path)
        content, sets = dict(tensors), {"": tensors} if tensors else {}
    else:
        header, content = {}, _load_pytorch(path)
        sets = _sets(content)
    needed = frozenset(name for name in wanted if not name.endswith("num_batches_tracked"))
    if needed:
        sets = {
            name: part
            for where, state in sets.items()
            for name, part in (_fitting(state, where, needed) or {where: state}).items()
        }
    if not sets:
        raise CheckpointError(
            f"{path} holds no state dict: expected tensors by name, found {_shown(content)}. "
            "Save it with torch.save(model.state_dict(), path)."
        )
    if key is not None and key not in sets:
        raise CheckpointError(f"{path}: {unknown_name('set of weights', key, [name or '(the file)' for name in sets])}")
    chosen = _preferred(sets) if key is None else key
    others = tuple(name for name in sets if name != chosen)
    state = _unwrapped(sets[chosen], needed, _COUNTER not in wanted)
    return Checkpoint(state, weights_facts(path, header), chosen if others else "", others)


def _sets(content: Mapping[Any, Any], where: str = "", depth: int = 0) -> dict[str, dict[str, Tensor]]:
    """Every dict of tensors, and of nothing else, in a file, by its keys from the outside in."""
    if content and all(isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()):
        return {where: dict(content)}
    sets: dict[str, dict[str, Tensor]] = {}
    if depth < _DEEPEST:
        for name, value in content.items():
            if isinstance(name, str) and isinstance(value, Mapping):
                sets |= _sets(value, f"{where}.{name}" if where else name, depth + 1)
    return sets


def _shown(content: Mapping[Any, Any]) -> str:
    other = [key for key, value in content.items() if not (isinstance(key, str) and isinstance(value, Tensor))]
    return ", ".join(repr(key) for key in other[:3]) or "nothing"


def _preferred(sets: Collection[str]) -> str:
    ranks = {name: rank for rank, name in enumerate(_SETS)}
    # What lies less deep comes first: a trainer's state may hold a whole checkpoint of another network.
    return min(sets, key=lambda name: (name.count("."), ranks.get(name.split(".")[-1], len(ranks))))


def _fitting(
    state: dict[str, Tensor], where: str, needed: frozenset[str], depth: int = 0
) -> dict[str, dict[str, Tensor]]:
    """A set of tensors whose names fit a network, by its key; else its parts that do, as a network among others."""
    if needed <= _unwrapped(state, needed, True).keys():
        return {where: state}
    found: dict[str, dict[str, Tensor]] = {}
    for prefix in dict.fromkeys(name.partition(".")[0] for name in state) if depth < _DEEPEST else ():
        part = {name.removeprefix(f"{prefix}."): state[name] for name in state if name.startswith(f"{prefix}.")}
        if len(part) >= len(needed):
            found |= _fitting(part, f"{where}.{prefix}" if where else prefix, needed, depth + 1)
    return found


def _unwrapped(state: dict[str, Tensor], needed: frozenset[str], drops_counter: bool) -> dict[str, Tensor]:
    """The tensors under the network's names, as far as stripping prefixes gets there."""
    while not (needed and needed <= state.keys()):
        if _COUNTER in state and drops_counter:
            state = {name: value for name, value in state.items() if name != _COUNTER}
        prefix = next((prefix for prefix in _PREFIXES if all(name.startswith(prefix) for name in state)), None)
        if prefix is None or not state:
            break
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def _load_pytorch(path: Path) -> dict[str, Any]:
    try:
        _check_sums(path)
        # The settings that timm's and torchvision's own training scripts store beside the weights: names and values.
        settings = torch.serialization.safe_globals([argparse.Namespace])
        with warnings.catch_warnings(action="ignore"), settings:  # what they warn of either loads or is refused below
            content = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        kind = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise CheckpointError(
            f"{path} is damaged, or holds Python objects {f'({kind[1]}) ' if kind else ''}that would have to be "
            "executed to be read, which is refused. Save only the weights: torch.save(model.state_dict(), path)."
        ) from error
    except Exception as error:  # damage breaks the unpickler anywhere: IndexError, struct.error, AssertionError
        if "TorchScript" in str(error):
            raise CheckpointError(
                f"{path} is a TorchScript program. Save its weights: torch.save(torch.jit.load(path).state_dict(), "
                "file)."
            ) from error
        reason = "it is empty" if not path.stat().st_size else f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{path} is not a whole PyTorch file ({reason}). Copy or download it again.") from error
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{path} holds a {type(content).__name__}, not a state dict. Save torch.save(model.state_dict(), path)."
        )
    return dict(content)


def _check_sums(path: Path) -> None:
    """Test the checksums of a ZIP file, which torch.save writes and torch.load never looks at.

    Raises:
        CheckpointError: A checksum differs: a bit of a weight has changed.
        zipfile.BadZipFile: The file is damaged otherwise.
    """
    if not zipfile.is_zipfile(path):  # the format of before PyTorch 1.6 has none
        return
    with zipfile.ZipFile(path) as content:
        if (damaged := content.testzip()) is not None:
            raise CheckpointError(f"{path} is damaged: the checksum of {damaged} in it differs. Copy it again.")


def read_labels(path: Path) -> tuple[str, ...]:
    """Names of classes, one a line, in the order of a network's logits.

    Raises:
        CheckpointError: The file cannot be read as text, or names a class twice.
    """
    try:
        names = tuple(line.strip() for line in read_text(path).splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{path} cannot be read as a list of classes, one a line: {reason}.") from error
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if twice:
        raise CheckpointError(f"{path} names class {twice[0]!r} twice. Name each once, in the order of the logits.")
    return names


@torch.no_grad()
def reorder_classes(network: nn.Module, order: Sequence[int], image_size: tuple[int, int]) -> bool:
    """Give the classifier of a network another order of classes.

    Args:
        network: Images to logits [N, K].
        order: For each new class, its index now.
        image_size: Height and width in pixels of the images that the network takes.

    Returns:
        Whether it was done: there is one layer whose rows are the classes. Else the network is as before.
    """
    like = next(network.parameters())
    x_NCHW = torch.rand(2, 3, *image_size, generator=torch.Generator().manual_seed(0)).to(like)
    was_training, index_K = network.training, torch.tensor(order, device=like.device)
    before_NK = network.eval()(x_NCHW)[:, index_K]
    rows = [m for m in network.modules() if isinstance(m, nn.Linear | nn.Conv2d) and len(m.weight) == len(order)]
    done = False
    for layer in reversed(rows):  # the classifier is the last of them in nearly every network
        before = {name: value.clone() for name, value in layer.state_dict().items()}
        for parameter in (layer.weight, layer.bias):
            if parameter is not None:
                parameter.copy_(parameter[index_K])
        # Other layers may have as many rows: the logits decide which one it was.
        done = torch.allclose(network(x_NCHW), before_NK, rtol=1e-4, atol=1e-5)
        if done:
            break
        layer.load_state_dict(before)
    network.train(was_training)
    return done
