"""One update of what a method trains: forward, backward, clipping, optimiser step."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from rkd_deploy.recipe import TrainRecipe
from rkd_deploy.train.distributed import ALONE, Group
from rkd_deploy.train.methods.base import Losses, Method


class Average:
    """An exponential moving average of a network's weights, batch norm's statistics among them.

    Args:
        network: The network whose state dict is averaged.
        decay: Share of the average that is kept at each update.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self._network = network
        mean: Callable[..., None] = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        self._averaged = AveragedModel(network, multi_avg_fn=mean, use_buffers=True)

    def update(self) -> None:
        """Take the network's present weights into the average."""
        self._averaged.update_parameters(self._network)

    def weights(self) -> dict[str, Tensor]:
        """The averaged state dict, under the network's names."""
        return dict(self._averaged.module.state_dict())

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """While the block runs, the network itself has the averaged weights."""
        # Cloned: a state dict holds the network's own tensors, which the next line writes over.
        trained = {key: value.clone() for key, value in self._network.state_dict().items()}
        self._network.load_state_dict(self.weights())
        try:
            yield
        finally:
            self._network.load_state_dict(trained)

    def state(self) -> dict[str, Tensor]:
        """The state of the average, which `restore` takes up again."""
        return dict(self._averaged.state_dict())

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from a state that `state` gave."""
        self._averaged.load_state_dict(state)


def learning_rate(recipe: TrainRecipe, step: int, epochs: int, steps_per_epoch: int) -> float:
    """Learning rate of one optimiser step.

    Args:
        recipe: Table `[train]`.
        step: Number of the step, from 0, over all epochs of the phase.
        epochs: Epochs of the phase.
        steps_per_epoch: Batches in an epoch.
    """
    epoch = step / steps_per_epoch  # a fraction: cosine falls with every step, not epoch by epoch
    # From 1, so that the first step is not lost to a rate of 0.
    warmup = min(1.0, (step + 1) / (recipe.warmup_epochs * steps_per_epoch)) if recipe.warmup_epochs else 1.0
    if recipe.schedule == "step":
        return warmup * recipe.lr * recipe.lr_decay ** sum(epoch >= milestone for milestone in recipe.milestones)
    if recipe.schedule == "cosine":
        return warmup * recipe.lr * (1 + math.cos(math.pi * epoch / epochs)) / 2
    return warmup * recipe.lr


def sgd(module: nn.Module, recipe: TrainRecipe) -> torch.optim.SGD:
    """SGD over what the module trains; weight decay only on weights of two dimensions and more."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    # Vectors are biases and batch norm's scales and shifts: they are few, and to pull them to zero regularises nothing
    # (the rule of He et al. 2019, arXiv 1812.01187).
    groups = [
        {"params": [parameter for parameter in trained if parameter.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [parameter for parameter in trained if parameter.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.SGD(
        [group for group in groups if group["params"]],
        lr=recipe.lr,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
        fused=True,  # one kernel for all parameters: small networks are bound by launches otherwise
    )


# PyTorch 2.15 has a new name for it and warns of the old one.
_PARAMETERS = inspect.signature(DistributedDataParallel).parameters
_LOCAL_BUFFERS: dict[str, Any] = {
    "forward_sync_buffers" if "forward_sync_buffers" in _PARAMETERS else "broadcast_buffers": False
}


class Stepper:
    """Updates what a method trains, batch after batch.

    Args:
        method: On its device, all that is frozen frozen.
        recipe: Table `[train]`.
        group: The processes that share each batch. Every one holds the whole method and computes its images' gradient;
            the means over processes are what all of them step by. T and all else that is frozen has no gradient and is
            never sent anywhere.

    Attributes:
        optimizer: The optimiser, whose state belongs into a checkpoint.
    """

    def __init__(self, method: Method, recipe: TrainRecipe, group: Group = ALONE) -> None:
        if recipe.sync_batchnorm and group.size > 1:
            synchronise_batchnorm(method)
        if recipe.channels_last:
            method.to(memory_format=torch.channels_last)
        self._method, self._recipe = method, recipe
        self._trained = [parameter for parameter in method.parameters() if parameter.requires_grad]
        self._parallel: DistributedDataParallel | None = None
        forward: nn.Module = method
        if group.size > 1:
            # Statistics of batch norm are not sent around at every step: those of rank 0 are kept in the end.
            forward = self._parallel = DistributedDataParallel(method, **_LOCAL_BUFFERS)
        self._forward: Callable[[Tensor, Tensor], Losses] = _compiled(forward) if recipe.compile else forward
        self.optimizer = sgd(method, recipe)

    def start_epoch(self, epoch: int) -> None:
        """Begin an epoch, counted from 1: the method may change its losses' weights."""
        self._method.start_epoch(epoch)
        self._method.train()

    def step(self, x_NCHW: Tensor, y_N: Tensor, rate: float) -> Losses:
        """Forward, backward and update by one batch at this learning rate."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if self._recipe.channels_last:
            x_NCHW = x_NCHW.contiguous(memory_format=torch.channels_last)
        self.optimizer.zero_grad(set_to_none=True)
        losses = self._accumulated(x_NCHW, y_N)
        if self._recipe.clip_norm is not None:
            # After the exchange between processes: all of them clip the same mean gradient by the same norm.
            norm = nn.utils.clip_grad_norm_(self._trained, self._recipe.clip_norm)
            losses = losses._replace(parts=losses.parts | {"grad_norm": norm})
        self.optimizer.step()
        return losses

    def _accumulated(self, x_NCHW: Tensor, y_N: Tensor) -> Losses:
        """Gradients of the whole batch, piece by piece."""
        count = self._recipe.accumulate
        if count == 1:
            return self._passes(x_NCHW, y_N)
        if len(x_NCHW) % count:
            raise AssertionError(f"{len(x_NCHW)} images in {count} pieces")  # recipes and loaders give equal pieces
        # Each piece's loss is a mean over its images, so equal pieces at a share of 1 / count add up to the gradient of
        # the batch's mean. Batch norm still normalises within a piece.
        pieces = []
        for number, (x_MCHW, y_M) in enumerate(zip(x_NCHW.chunk(count), y_N.chunk(count), strict=True), 1):
            with self._unsent() if number < count else contextlib.nullcontext():
                pieces.append(self._passes(x_MCHW, y_M, share=1 / count))
        return _mean_of_pieces(pieces)

    def _passes(self, x_NCHW: Tensor, y_N: Tensor, share: float = 1.0) -> Losses:
        kind = x_NCHW.device.type
        with torch.autocast(kind, torch.bfloat16, enabled=self._recipe.amp):
            losses: Losses = self._forward(x_NCHW, y_N)
        total = losses.total if share == 1.0 else losses.total * share
        total.backward()  # type: ignore[no-untyped-call]
        return losses

    def _unsent(self) -> AbstractContextManager[None]:
        """Gradients add up here first; only those of the last piece's backward pass are exchanged."""
        return contextlib.nullcontext() if self._parallel is None else self._parallel.no_sync()


def _compiled(forward: nn.Module) -> Callable[[Tensor, Tensor], Losses]:
    """The compiled pass, with the total loss multiplied by 1 at run time.

    Where a loss is its only part, inductor (2.15) returns one buffer for both, and the loss without its gradient. It
    cannot know that the factor is 1, so it keeps the two apart.
    """

    def distinct(x_NCHW: Tensor, y_N: Tensor, factor: Tensor) -> Losses:
        losses: Losses = forward(x_NCHW, y_N)
        return losses._replace(total=losses.total * factor)

    compiled = torch.compile(distinct)
    return lambda x_NCHW, y_N: compiled(x_NCHW, y_N, torch.ones((), device=x_NCHW.device))


def synchronise_batchnorm(method: Method) -> None:
    """Let what is trained normalise over the images of all processes; frozen networks use their statistics anyway."""
    for module in list(method.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d) and child.weight is not None and child.weight.requires_grad:
                convert: Callable[[nn.Module], nn.Module] = nn.SyncBatchNorm.convert_sync_batchnorm
                setattr(module, name, convert(child))


def _mean_of_pieces(pieces: list[Losses]) -> Losses:
    """Losses of the whole batch from those of its equal pieces."""
    parts = {name: torch.stack([losses.parts[name] for losses in pieces]).mean() for name in pieces[0].parts}
    total = torch.stack([losses.total.detach() for losses in pieces]).mean()
    logits = [losses.logits_NK for losses in pieces if losses.logits_NK is not None]
    return Losses(total, parts, torch.cat(logits) if logits else None)
