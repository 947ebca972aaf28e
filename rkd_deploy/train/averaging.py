"""The exponential moving average of the weights that are trained (Polyak and Juditsky 1992 average evenly).

    theta_ema <- decay theta_ema + (1 - decay) theta        after every update; the first one copies

Statistics of batch norm are averaged alike. PyTorch's own AveragedModel does it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class Average:
    """Follows a network.

    Args:
        network: Its state dict is averaged.
        decay: Share of the average that is kept at each update.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self._network = network
        mean: Callable[..., None] = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        self._averaged = AveragedModel(network, multi_avg_fn=mean, use_buffers=True)

    def update(self) -> None:
        """Take the network's present weights in."""
        self._averaged.update_parameters(self._network)

    def weights(self) -> dict[str, Tensor]:
        """The averaged state dict, under the network's names."""
        return dict(self._averaged.module.state_dict())

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """While the block runs, the network itself has the averaged weights."""
        own = {key: value.clone() for key, value in self._network.state_dict().items()}
        self._network.load_state_dict(self.weights())
        try:
            yield
        finally:
            self._network.load_state_dict(own)

    def state(self) -> dict[str, Tensor]:
        """What `restore` needs."""
        return dict(self._averaged.state_dict())

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from a saved state."""
        self._averaged.load_state_dict(state)
