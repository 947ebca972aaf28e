"""A network of torchvision, timm or the user as one that can be built at other widths, like the built-in families."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from torch import Tensor, nn

from rkd_deploy.errors import UsageError
from rkd_deploy.models.channels import trace_channels
from rkd_deploy.models.external import External
from rkd_deploy.models.inheritance import inherit
from rkd_deploy.models.pruning import WAY_OUT, Pruner, Widths
from rkd_deploy.models.staged import FeatureNetwork, Staged, he_initialised


class Pruned(Staged):
    """A pruned copy of an external network, with a linear head of its own.

    Args:
        origin: The external network, without its head.
        pruner: Of `origin.network`.
        widths: As `Pruner.widths` has them: one for every layer that has channels of its own.
        num_classes: K, or None for a feature extractor without a head.

    Attributes:
        backbone: The pruned copy.
        pruner: What narrows the origin; shared by all copies.
    """

    fc: nn.Linear | None

    def __init__(self, origin: External, pruner: Pruner, widths: Sequence[int], num_classes: int | None) -> None:
        super().__init__()
        self.widths: Widths = tuple(widths)
        self.pruner = pruner
        self._origin = (origin,)  # in a tuple: a module would be registered as a part of this one
        self.backbone = origin if self.widths == pruner.widths else origin.rewrapped(pruner.narrowed(widths))
        if self.backbone.channels != self.channels_at(widths):
            raise UsageError(
                f"S0 cannot be narrowed: its last stage, {origin.stages[-1]}, has {self.backbone.channels} channels "
                f"and {self.channels_at(widths)} were expected: it is not what the network's last layers give. Name "
                f"another last stage. {WAY_OUT}"
            )
        self.fc = None if num_classes is None else nn.Linear(self.backbone.channels, num_classes)

    @property
    def channels(self) -> int:
        """Channels of the last stage map."""
        return self.backbone.channels

    def features(self, x_NCHW: Tensor) -> tuple[Tensor, ...]:
        """The stage maps, at the same resolutions as those of the origin."""
        return self.backbone.features(x_NCHW)

    def rebuilt(self, widths: Sequence[int], num_classes: int | None) -> Pruned:
        """The same layers with other numbers of channels and fresh weights."""
        network = copy.deepcopy(Pruned(self._origin[0], self.pruner, widths, num_classes))
        for module in network.modules():
            if callable(reset := getattr(module, "reset_parameters", None)):
                reset()
        he_initialised(network)
        return network

    def steps(self, round_to: int) -> Widths:
        """`round_to`, and whole groups of grouped convolutions."""
        return self.pruner.steps(round_to)

    def channels_at(self, widths: Sequence[int]) -> int:
        """Channels of the last stage map at other widths."""
        return self.pruner.output_channels(widths)


def narrowable(given: FeatureNetwork, input_size: tuple[int, int]) -> Staged:
    """S0 as a network that can be built at other widths: itself, or its backbone with a head of its own.

    Args:
        given: S0.
        input_size: Height and width in pixels.

    Raises:
        UsageError: It cannot be narrowed; the message names the module and the operator.
    """
    if isinstance(given, Staged):
        return given
    if not isinstance(given, External):
        raise UsageError(
            f"S0 cannot be narrowed: nothing is known of the layers of a {type(given).__name__}. {WAY_OUT}"
        )
    origin = given.without_head()
    pruner = Pruner(origin.network, input_size)
    return Pruned(origin, pruner, pruner.widths, given.num_classes)


def inherit_weights(branches: Sequence[FeatureNetwork], source: FeatureNetwork, input_size: tuple[int, int]) -> None:
    """Overwrite the weights of narrowed networks by a selection of those they were cut from (`inheritance.py`).

    Args:
        branches: S, A_1, .., A_k, or S0 alone: each keeps other channels than those before it, as far as they go.
        source: The trained network.
        input_size: Height and width in pixels.

    Raises:
        UsageError: The family narrows its layers in a way in which weights cannot be inherited.
    """
    network = source.network if isinstance(source, External) else source
    channels = trace_channels(network, input_size)
    inherit([_state(branch, source) for branch in branches], network.state_dict(), channels)


def _state(branch: FeatureNetwork, source: FeatureNetwork) -> dict[str, Tensor]:
    """The tensors of a narrowed network by the names that the trained one gives them."""
    if not isinstance(branch, Pruned):
        return branch.state_dict()
    state = branch.backbone.network.state_dict()
    if branch.fc is not None and type(source.fc) is nn.Linear and isinstance(source, External):
        path = next(path for path, module in source.network.named_modules() if module is source.fc)
        state |= {f"{path}.{name}": tensor for name, tensor in branch.fc.state_dict().items()}
    return state
