"""Networks by name: this package's, torchvision's, timm's or a user's own.

Torchvision's are named ``tv:NAME``, timm's ``timm:NAME``. A user's own is named ``package.module:attribute``; the
current directory can be imported from. The attribute is

    an nn.Module            taken as it is, weights included: a copy of it, in float32
    a class or function     called with num_classes=K where it has such a parameter, else without arguments; what it
                            returns must be an nn.Module
"""

from __future__ import annotations

import copy
import difflib
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

from torch import Tensor, nn

from rkd_deploy.errors import CheckpointError, UsageError, require, shortened, unknown_name
from rkd_deploy.models.external import External
from rkd_deploy.models.families import cifar_resnet, mobilenet, resnet50, shufflenet, vgg, wide_resnet
from rkd_deploy.models.foreign import check_real, with_current_norms
from rkd_deploy.models.staged import FeatureNetwork, Staged

PREFIXES = ("tv", "timm")


class Published(NamedTuple):
    """Weights that torchvision or timm publish.

    Attributes:
        state: Tensors by the names of the network's own modules; a classifier of other classes is left out.
        mean: Mean that the weights' images were normalised with, per channel, in units of [0, 1].
        std: Standard deviation that they were normalised with, per channel, in units of [0, 1].
        complete: Whether the classifier is among the weights.
    """

    state: Mapping[str, Tensor]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    complete: bool


def is_external(name: str) -> bool:
    """Whether a name is of the form ``tv:NAME``, ``timm:NAME`` or ``module:attribute``."""
    return ":" in name


def build(name: str, num_classes: int, size: tuple[int, int]) -> nn.Module:
    """Build an external network with fresh weights, or copy a user's own as it is.

    Args:
        name: ``tv:NAME``, ``timm:NAME`` or ``module:attribute`` (the docstring of this file).
        num_classes: K.
        size: Height and width of the images, for networks that are built for one size.

    Raises:
        UsageError: Nothing of this name, or no network behind it.
        MissingDependencyError: timm is not installed.
    """
    prefix, _, model_name = name.partition(":")
    if prefix == "tv":
        return _torchvision(model_name, num_classes, size)
    return _timm(model_name, num_classes, size) if prefix == "timm" else _users(prefix, model_name, num_classes)


def published(name: str, network: nn.Module) -> Published:
    """Download the weights of a network that `build` gave, by torchvision's or timm's own code and into their cache.

    Raises:
        CheckpointError: None are published, or they could not be fetched.
    """
    prefix, _, model_name = name.partition(":")
    try:
        state, mean, std = (_torchvision_weights if prefix == "tv" else _timm_weights)(model_name)
    except CheckpointError:
        raise
    except Exception as error:  # a network error of urllib, requests or the hub's client, or a damaged download
        raise CheckpointError(
            f"The published weights of {name} could not be fetched: {error}. Where there is no internet, download them "
            "elsewhere and give the file: checkpoint = PATH in place of pretrained = true."
        ) from error
    wanted = network.state_dict()
    differing = [key for key, value in state.items() if key in wanted and wanted[key].shape != value.shape]
    if any(wanted[key].shape[1:] != state[key].shape[1:] for key in differing):
        raise CheckpointError(
            f"The published weights of {name} are for images of another size: {differing[0]} is "
            f"{tuple(state[differing[0]].shape)}, not {tuple(wanted[differing[0]].shape)}. Use images of that size."
        )
    return Published({key: state[key] for key in state if key not in differing}, mean, std, not differing)


def published_normalisation(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation that published weights were trained with, per channel; nothing is downloaded.

    Args:
        name: ``tv:NAME`` or ``timm:NAME``.

    Raises:
        UsageError: Nothing of this name.
        CheckpointError: It has no published weights.
        MissingDependencyError: timm is not installed.
    """
    prefix, _, model_name = name.partition(":")
    if prefix == "tv":
        preprocessing = _torchvision_published(model_name).transforms()
        return tuple(preprocessing.mean), tuple(preprocessing.std)
    settings = _timm_settings(model_name)
    return tuple(settings.mean), tuple(settings.std)


def _torchvision_published(model_name: str) -> Any:
    import torchvision

    _check_torchvision(model_name)
    weights = getattr(torchvision.models.get_model_weights(model_name), "DEFAULT", None)
    if weights is None:
        raise CheckpointError(f"torchvision publishes no weights of tv:{model_name}. Leave pretrained out.")
    return weights


def _timm_settings(model_name: str) -> Any:
    timm = require("timm", "timm")
    _check_timm(model_name)
    try:
        settings = timm.get_pretrained_cfg(model_name)
    except RuntimeError as error:  # no such set of weights
        raise CheckpointError(f"timm publishes no weights timm:{model_name}: {error} Name others.") from error
    if settings is None or not settings.has_weights:
        raise CheckpointError(f"timm publishes no weights of timm:{model_name}. Leave pretrained out.")
    return settings


def _torchvision(model_name: str, num_classes: int, size: tuple[int, int]) -> nn.Module:
    import torchvision

    _check_torchvision(model_name)
    settings: dict[str, Any] = {}
    if model_name.startswith("vit_"):
        settings["image_size"] = _side(f"tv:{model_name}", size)
    if model_name in ("googlenet", "inception_v3"):
        settings |= {"aux_logits": False, "init_weights": True}  # in training they would answer three times
    return cast(nn.Module, torchvision.models.get_model(model_name, num_classes=num_classes, **settings))


def _timm(model_name: str, num_classes: int, size: tuple[int, int]) -> nn.Module:
    timm = require("timm", "timm")
    _check_timm(model_name)
    settings = {}
    if timm.get_pretrained_cfg_value(model_name.partition(".")[0], "fixed_input_size"):
        settings["img_size"] = _side(f"timm:{model_name}", size)
    return cast(nn.Module, timm.create_model(model_name, num_classes=num_classes, **settings))


def _check_torchvision(model_name: str) -> None:
    import torchvision

    names = torchvision.models.list_models(module=torchvision.models)
    if model_name not in names:
        raise UsageError(_unknown("torchvision", model_name, names))


def _check_timm(model_name: str) -> None:
    timm, architecture = require("timm", "timm"), model_name.partition(".")[0]
    if not timm.is_model(architecture):
        raise UsageError(_unknown("timm", architecture, timm.list_models()))


def _unknown(library: str, name: str, names: list[str]) -> str:
    near = ", ".join(difflib.get_close_matches(name, names, n=8, cutoff=0.5)) or "none"  # a thousand are too many
    return f"Unknown classifier {shortened(name)} of {library}. Near it, of {len(names)}: {near}."


def _side(name: str, size: tuple[int, int]) -> int:
    if size[0] != size[1]:
        raise UsageError(f"{name} is built for square images; these have {size[0]} x {size[1]} pixels. Resize them.")
    return size[0]


def _users(module_name: str, attribute: str, num_classes: int) -> nn.Module:
    name = f"{module_name}:{attribute}"
    rule = (
        "Name an nn.Module, or a class or function that gives one (called with num_classes where it has such a "
        "parameter), as package.module:attribute; the current directory can be imported from."
    )
    try:
        with _importing_from(Path.cwd()):
            target: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            target = getattr(target, part)
    except Exception as error:  # whatever the user's own module raises when it is imported
        is_message_of_python = isinstance(error, ImportError | AttributeError | ValueError)
        reason = str(error) if is_message_of_python else f"{type(error).__name__}: {error}"
        raise UsageError(f"No network {shortened(name)}: {reason}. {rule}") from error
    if isinstance(target, nn.Module):
        network: Any = copy.deepcopy(target)
    elif callable(target):
        try:
            network = _called(target, num_classes)
        except Exception as error:  # the user's own code
            raise UsageError(
                f"{name} could not be called: {type(error).__name__}: {error}. {rule} --debug shows where."
            ) from error
    else:
        raise UsageError(f"{name} is of type {type(target).__name__}. {rule}")
    if not isinstance(network, nn.Module):
        raise UsageError(f"{name} gave an object of type {type(network).__name__}. {rule}")
    check_real(network, name)
    return with_current_norms(network, name).float()


def _called(maker: Callable[..., Any], num_classes: int) -> Any:
    parameters = inspect.signature(maker).parameters.values()
    takes_it = any(
        parameter.name == "num_classes" or parameter.kind is parameter.VAR_KEYWORD for parameter in parameters
    )
    return maker(num_classes=num_classes) if takes_it else maker()


@contextmanager
def _importing_from(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def _torchvision_weights(model_name: str) -> tuple[Mapping[str, Tensor], tuple[float, ...], tuple[float, ...]]:
    state = _torchvision_published(model_name).get_state_dict(progress=False, check_hash=True)
    return state, *published_normalisation(f"tv:{model_name}")


def _timm_weights(model_name: str) -> tuple[Mapping[str, Tensor], tuple[float, ...], tuple[float, ...]]:
    network = require("timm", "timm").create_model(model_name, pretrained=True)
    return network.state_dict(), *published_normalisation(f"timm:{model_name}")


_MAKERS: dict[str, Callable[[int], Staged]] = {
    **cifar_resnet.FAMILY,
    **wide_resnet.FAMILY,
    **vgg.FAMILY,
    **mobilenet.FAMILY,
    **shufflenet.FAMILY,
    **resnet50.FAMILY,
}


def network_names() -> tuple[str, ...]:
    """Names of all networks of the families written here."""
    return tuple(_MAKERS)


def create(
    name: str, num_classes: int, *, input_size: int | Sequence[int] = 224, stages: Sequence[str] | None = None
) -> FeatureNetwork:
    """Build a network with fresh weights, or take a user's own as it is.

    Args:
        name: One of `network_names()`, e.g. ``"resnet20"``, which give a `Staged`; or the name of an external one.
        num_classes: K, the number of logits.
        input_size: Height and width in pixels, or one number for both. External networks are run once to be understood.
        stages: Where the stages of an external network end (`External`). Default: found.

    Raises:
        UsageError: Unknown name; an external network that gives another number of logits; stages of a family.
        MissingDependencyError: timm is not installed.
    """
    if not is_external(name):
        if name not in _MAKERS:
            outside = "Other classifiers: tv:NAME (torchvision), timm:NAME, package.module:attribute (your own)."
            raise UsageError(f"{unknown_name('network', name, _MAKERS)} {outside}")
        if stages:
            raise UsageError(f"stages = {list(stages)} has no effect: those of {name} are given. Leave it out.")
        return _MAKERS[name](num_classes)
    height, width = (input_size, input_size) if isinstance(input_size, int) else input_size
    network = External(build(name, num_classes, (height, width)), stages, input_size=(height, width))
    if network.num_classes != num_classes:
        raise UsageError(
            f"{name} gives {network.num_classes} logits; the data have {num_classes} classes. Give it a parameter "
            "num_classes, or name a network made for these classes."
        )
    return network
