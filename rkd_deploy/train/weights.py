"""Weights and training states on disk, written whole or not at all, and read without unpickling anything.

Our own files are safetensors with facts in the header. Foreign ones may be .safetensors, or PyTorch files that
torch.load reads with weights_only=True: a file that holds anything but tensors and plain containers is refused.
"""

from __future__ import annotations

import json
import pickle
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from rkd_deploy.decoding import DecodingError, decode
from rkd_deploy.errors import CheckpointError, DataError, RecipeError
from rkd_deploy.models import zoo
from rkd_deploy.models.external import External
from rkd_deploy.recipe import Recipe
from rkd_deploy.storage import open_regular, write_bytes
from rkd_deploy.train.facts import RunFacts, WeightsFacts

_FACTS = "rkd_deploy"
_WRAPPERS = ("state_dict", "model", "model_state_dict", "net")
_PREFIXES = ("module.", "_orig_mod.", "network.")  # parallel, compiled, and wrapped by External
_HEADS = ("fc.", "head.", "heads.", "classifier.", "linear.")


def save_tensors(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write tensors and JSON facts into one safetensors file.

    Raises:
        StorageError: It could not be written whole; a file that was there before is intact.
    """
    plain = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
    write_bytes(path, safetensors.torch.save(plain, {_FACTS: json.dumps(facts, allow_nan=False)}))


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_tensors` wrote; a foreign safetensors file has no facts.

    Raises:
        CheckpointError: Missing or damaged.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as stream:
            facts = json.loads((stream.metadata() or {}).get(_FACTS, "{}"))
            return {key: stream.get_tensor(key) for key in stream.keys()}, facts  # noqa: SIM118
    except (OSError, safetensors.SafetensorError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read as safetensors ({error}): the file is missing or damaged."
        ) from error


def weights_path(checkpoint: str) -> Path:
    """The path of a weights file that a recipe names; ``~`` is the home folder."""
    return Path(checkpoint).expanduser()


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


def load_foreign(path: Path) -> tuple[dict[str, Tensor], WeightsFacts]:
    """State dict of any checkpoint, unwrapped and without the prefixes of wrapped training, and its facts.

    Raises:
        CheckpointError: Missing, damaged, or holding more than weights.
    """
    check_readable(path)
    if path.suffix == ".safetensors":
        content, header = load_tensors(path)
    else:
        content, header = _load_pytorch(path), {}
    while (inner := next((key for key in _WRAPPERS if isinstance(content.get(key), Mapping)), None)) is not None:
        content = dict(cast(Mapping[str, Any], content[inner]))
    other = [key for key, value in content.items() if not (isinstance(key, str) and isinstance(value, Tensor))]
    if other or not content:
        raise CheckpointError(
            f"{path} holds no state dict: expected tensors by name, found {other[:3] or 'nothing'}. "
            "Save it with torch.save(model.state_dict(), path)."
        )
    while prefix := next((prefix for prefix in _PREFIXES if all(key.startswith(prefix) for key in content)), ""):
        content = {key.removeprefix(prefix): value for key, value in content.items()}
    return content, weights_facts(path, header)


def weights_facts(path: Path, header: Mapping[str, Any]) -> WeightsFacts:
    """The header of a weights file, typed.

    Raises:
        CheckpointError: It is not what this package writes.
    """
    try:
        return decode(WeightsFacts, header)
    except DecodingError as error:
        raise CheckpointError(
            f"{path} has a damaged header of rkd-deploy: {error}. Copy the file again, or save its tensors alone."
        ) from error


def _load_pytorch(path: Path) -> dict[str, Any]:
    try:
        with warnings.catch_warnings(action="ignore"):  # what they warn of either loads or is refused below
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is damaged, or holds Python objects that would have to be executed to be read, which is refused. "
            f"Save only the weights: torch.save(model.state_dict(), path). ({str(error).splitlines()[0]})"
        ) from error
    except Exception as error:  # damage breaks the unpickler anywhere: IndexError, struct.error, AssertionError
        raise CheckpointError(f"{path} is not a whole PyTorch file ({error}). Copy or download it again.") from error
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{path} holds a {type(content).__name__}, not a state dict. Save torch.save(model.state_dict(), path)."
        )
    return dict(content)


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
    found = {key: tuple(value.shape) for key, value in state.items()}
    missing = [key for key in wanted if key not in found and not key.endswith("num_batches_tracked")]
    unknown = [key for key in found if key not in wanted]
    if missing or unknown:
        raise CheckpointError(
            f"{where} is not a checkpoint of {what}: {len(missing)} of its {len(wanted)} weights are missing"
            f"{_first(missing)}, {len(unknown)} are foreign{_first(unknown)}. Name the network the file was saved from."
        )
    differing = [key for key in found if found[key] != wanted[key]]
    if differing and all(key.startswith(_HEADS) for key in differing):
        raise CheckpointError(
            f"{where} was trained on {found[differing[0]][0]} classes; the data have {wanted[differing[0]][0]}. "
            f"Use a {what} trained on these classes, or the data it was trained on."
        )
    if differing:
        shapes = "; ".join(f"{key} is {found[key]}, not {wanted[key]}" for key in differing[:3])
        raise CheckpointError(
            f"{where} does not fit {what}: {len(differing)} weights have other shapes ({shapes}). "
            "Name the network the file was saved from."
        )
    broken = [key for key, value in state.items() if value.is_floating_point() and not bool(value.isfinite().all())]
    if broken:
        raise CheckpointError(
            f"{where} holds NaN or infinite weights{_first(broken)}: it was saved after diverging. Take an earlier "
            "checkpoint, or train again with a lower train.lr."
        )
    module.load_state_dict(dict(state), strict=False)


def _first(keys: list[str]) -> str:
    return f" (first: {', '.join(keys[:3])})" if keys else ""


def load_weights_from(module: nn.Module, table: str, checkpoint: str, recipe: Recipe, facts: RunFacts) -> bool:
    """Load the checkpoint that a recipe names for T or S0.

    Args:
        module: Receives the weights.
        table: ``"teacher"`` or ``"student"``.
        checkpoint: Path of the file.
        recipe: For the normalisation it states.
        facts: Classes and normalisation of the data.

    Returns:
        Whether the normalisation the weights expect is known, from the file or the recipe.

    Raises:
        CheckpointError: Missing, damaged or foreign; other classes than the data.
        RecipeError: Another normalisation than that of the data.
    """
    name = getattr(recipe, table).name
    state, header = load_foreign(weights_path(checkpoint))
    load_weights(module.network if isinstance(module, External) else module, state, checkpoint, f"{table} {name}")
    if header.classes is not None and header.classes != facts.classes:
        theirs, ours = header.classes, facts.classes
        index = next(i for i, pair in enumerate(zip(theirs, ours, strict=True)) if pair[0] != pair[1])
        raise CheckpointError(
            f"{checkpoint} was trained on other classes than the data: class {index} is {theirs[index]!r} there and "
            f"{ours[index]!r} here. Use the data it was trained on."
        )
    stated = {key: getattr(recipe.teacher, key) if table == "teacher" else None for key in ("mean", "std")}
    known = {key: getattr(header, key) or stated[key] for key in ("mean", "std")}
    check_normalisation(f"{table} {name}", known, facts)
    return all(value is not None for value in known.values())


def load_published_weights(module: nn.Module, table: str, name: str, facts: RunFacts) -> bool:
    """Load the weights that torchvision or timm publish for T or S0.

    Args:
        module: An `External`; its classifier stays fresh where the data have another number of classes.
        table: ``"teacher"`` or ``"student"``.
        name: Of the network.
        facts: Normalisation of the data.

    Returns:
        Whether the classifier is among the weights: else the network has to be trained first.

    Raises:
        CheckpointError: There are none, or they could not be fetched.
        RecipeError: Another normalisation than that of the data.
    """
    assert isinstance(module, External)
    weights = zoo.published(name, module.network)
    check_normalisation(f"{table} {name}", {"mean": weights.mean, "std": weights.std}, facts)
    module.network.load_state_dict({**module.network.state_dict(), **weights.state})
    return weights.complete


def check_normalisation(what: str, expected: Mapping[str, Sequence[float] | None], facts: RunFacts) -> None:
    """Refuse weights that expect images of another normalisation than the data's.

    Args:
        what: The network, for the message.
        expected: mean and std, None where they are not known.
        facts: Normalisation of the data.

    Raises:
        RecipeError: They do.
    """
    for key, value in expected.items():
        if value is not None and max(abs(a - b) for a, b in zip(value, getattr(facts, key), strict=True)) > 1e-3:
            raise RecipeError(
                f"{what} expects images normalised with {key} {list(value)}; the data use {list(getattr(facts, key))}. "
                f"Use the {what.split()[0]}'s: --set 'data.{key}={list(value)}'"
            )


_FEW = 20  # held-out images: of fewer, a good network too may get hardly any right


def near_chance(top1: float, classes: int) -> bool:
    """Whether an accuracy is hardly better than guessing.

    Below three times chance; where classes are few and chance is high, below a fifth of the way from there to 100 %.

    Args:
        top1: In %.
        classes: K; chance is 100 / K %.
    """
    chance = 100 / classes
    return top1 < min(3 * chance, chance + (100 - chance) / 5)


def refuse_guessing(what: str, top1: float, images: int, facts: RunFacts, known: bool) -> None:
    """A network that guesses on its own data is fed wrongly: say so now, not after hours of imitating it.

    Args:
        what: Which network, from where, for the message.
        top1: Its accuracy in %.
        images: On how many.
        facts: Classes and normalisation of the data.
        known: Whether the normalisation it expects is known.

    Raises:
        DataError: It guesses.
    """
    if not near_chance(top1, len(facts.classes)):
        return
    normalisation = "" if known else f"; its normalisation is not recorded, the data's is mean {list(facts.mean)}"
    raise DataError(
        f"{what} classifies {top1:.1f} % of {images} training images right, chance is "
        f"{100 / len(facts.classes):.1f} %: it was trained on other classes, another order of them, or another "
        f"normalisation{normalisation}. State the right ones in [data]: mean, std, name."
    )


def teacher_warning(row: Mapping[str, Any], images: int, classes: Sequence[str], recipe: Recipe) -> dict[str, Any]:
    """What the log and the terminal say of a teacher that was trained here and guesses; nothing where it does not.

    Args:
        row: Of the log, its last epoch.
        images: How many are held out; with a few or none, nothing can be said.
        classes: Their names.
        recipe: What it was trained by.
    """
    top1 = row["val_top1_ema" if recipe.train.ship == "ema" else "val_top1"]
    if top1 is None or images < _FEW or not near_chance(top1, len(classes)):
        return {}
    chance = 100 / len(classes)
    text = (
        f"The teacher classifies {top1:.1f} % of {images:,} held-out images right, and chance is {chance:.1f} %: what "
        "S and A imitate is no better than noise. Train it for longer or at another rate (--set "
        f"teacher.epochs={2 * row['epoch']}, teacher.lr), or give one that is trained (--set teacher.checkpoint=FILE)."
    )
    return {"phase": row["phase"], "text": text, "val_top1": top1, "chance": chance}
