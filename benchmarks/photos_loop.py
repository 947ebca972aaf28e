"""The loop of photos.py: networks that learn from the same photos at the same time, each step a CUDA graph."""

from __future__ import annotations

import copy
import functools
import math
import time
from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from ladder_loop import Given, method_of, step_together
from photos_rows import Row
from torch import Tensor, nn

from rkd_deploy.data.augment import Mixing, draw_windows, flip, resized_crop
from rkd_deploy.data.splits import ImageSet, Split
from rkd_deploy.models import zoo
from rkd_deploy.models.residual import ResidualStudent, StudentAlone
from rkd_deploy.models.separation.pruning import narrowable
from rkd_deploy.models.separation.separate import Separation, narrow, separate
from rkd_deploy.models.staged import FeatureNetwork, Staged
from rkd_deploy.models.trunk import parted
from rkd_deploy.train.capture import captured, new_stream
from rkd_deploy.train.frozen import folded_copy

MOMENTUM, LARGEST_NORM, WARM_UP = 0.9, 5.0, 0.05
MIXUP, CUTMIX = 0.2, 1.0


class Builder:
    """Networks of rows, for one size of images.

    Args:
        pixels: Side of the images.
        classes: K.
        T: Its classifier is copied into what is trained under it; None: nothing is.
    """

    def __init__(self, pixels: int, classes: int, T: FeatureNetwork | None = None) -> None:
        self.pixels, self.classes, self.T = pixels, classes, T
        self.channels = 0 if T is None else T.channels
        self.original, self.narrowable = functools.cache(self.create), functools.cache(self._narrowable)
        self.separation = functools.cache(self._separation)

    def create(self, name: str) -> FeatureNetwork:
        """A network by its name, with fresh weights."""
        return zoo.create(name, self.classes, input_size=self.pixels)

    def _narrowable(self, name: str) -> Staged:
        return narrowable(self.original(name), (self.pixels, self.pixels))

    def _separation(self, name: str, layout: str) -> Separation:
        return separate(
            self.original(name),
            num_classes=self.classes,
            input_size=self.pixels,
            layout=layout,
            channels=self.channels,
        )

    def __call__(self, row: Row, seed: int) -> nn.Module:
        """The network of a row with fresh weights.

        Raises:
            UsageError: S0 cannot be narrowed, or not in this layout.
            BudgetError: Nothing fits.
        """
        size, layout = (self.pixels, self.pixels), row.layout
        if layout is not None:
            separation = self.separation(row.network, layout)
        torch.manual_seed(seed)
        if row.inherits:
            return self._inherited(cast(float, row.fraction))
        if row.own_head and row.fraction is None:
            return self.create(row.network)
        s0 = self.narrowable(row.network)
        if row.fraction is not None:
            widths = narrow(s0, row.fraction, num_classes=self.classes, input_size=size)
            return s0.rebuilt(widths, self.classes)
        head = self._head()
        if layout is None:
            return ResidualStudent(s0.rebuilt(s0.widths, None), (), self.channels, self.classes, head)
        S = s0.rebuilt(separation.student.widths, None)
        A = s0.rebuilt(separation.assistant.widths, None)
        if separation.shared_stages:
            return parted(S, [A], separation.shared_stages, self.channels, self.classes, head)
        return ResidualStudent(S, [A], self.channels, self.classes, head)

    def _head(self) -> nn.Module:
        assert self.T is not None
        return copy.deepcopy(cast(nn.Module, self.T.fc))

    def _inherited(self, fraction: float) -> nn.Module:
        """S + A of a share of T's MACs that begin with its weights."""
        assert self.T is not None
        cut = separate(
            self.T,
            num_classes=self.classes,
            input_size=self.pixels,
            channels=self.channels,
            fraction=fraction,
            weights="inherited",
        )
        return ResidualStudent(cut.student, cut.assistants, self.channels, self.classes, self._head())


class Photos:
    """Training photos on the device, and one augmented batch of them in place, plain and mixed."""

    def __init__(self, images: ImageSet, batch: int, device: torch.device) -> None:
        train = cast(Split, images.train)
        self.pixels, self.labels = train.images_NCHW.to(device), train.labels_N.to(device)
        self.batch, self.device, self.steps = batch, device, len(train) // batch
        self.mean, self.std = (torch.tensor(v, device=device)[:, None, None] * 255 for v in (images.mean, images.std))
        self.mixing = Mixing(classes=len(images.classes), mixup=MIXUP, cutmix=CUTMIX)
        x = torch.zeros(batch, *self.pixels.shape[1:], device=device)
        if device.type == "cuda":
            x = x.to(memory_format=torch.channels_last)
        self.x, self.x_mixed = x, x.clone()
        self.y = torch.zeros(batch, dtype=torch.long, device=device)
        self.y_mixed = torch.zeros(batch, len(images.classes), device=device)
        self.start_epoch(0, 0)

    def normalised(self, pixels_NCHW: Tensor) -> Tensor:
        """What networks take of uint8 images."""
        return (pixels_NCHW.float() - self.mean) / self.std

    def start_epoch(self, seed: int, epoch: int) -> None:
        """Draw order, windows and mirror images of an epoch."""
        number = 100_003 * (seed + 1) + epoch
        g = torch.Generator().manual_seed(number)
        self.random = np.random.default_rng(number)
        count = self.steps * self.batch
        order = torch.randperm(len(self.labels), generator=g)[:count]
        self.order = torch.cat([order[-1:], order]).to(self.device)  # mixing takes each image's partner in front of it
        size = cast("tuple[int, int]", tuple(self.pixels.shape[-2:]))
        self.windows = draw_windows(count + 1, size, g).to(self.device)
        self.flipped = (torch.rand(count + 1, generator=g) < 0.5).to(self.device)

    def take(self, step: int) -> None:
        """Put the batch of a step in place."""
        at = slice(step * self.batch, (step + 1) * self.batch + 1)
        index = self.order[at]
        x = self.normalised(flip(resized_crop(self.pixels[index], self.windows[:, at]), self.flipped[at]))
        y = self.labels[index]
        self.x.copy_(x[1:])
        self.y.copy_(y[1:])
        x, y = self.mixing(x, y, self.random)
        self.x_mixed.copy_(x)
        self.y_mixed.copy_(y)


class Learner:
    """A row in training: its network, losses and weights' updates."""

    def __init__(self, row: Row, network: nn.Module, teacher: nn.Module | None, photos: Photos) -> None:
        device = photos.device
        self.row, self.device = row, device
        self.x, self.y = (photos.x_mixed, photos.y_mixed) if row.mixed else (photos.x, photos.y)
        self.network = network.to(device)
        if device.type == "cuda":
            self.network.to(memory_format=torch.channels_last)
        self.method = method_of(row.losses, self.network, cast(nn.Module, teacher), device).train()
        self.parameters: list[Tensor] = [p for p in self.method.parameters() if p.requires_grad]
        self.decayed = [i for i, p in enumerate(self.parameters) if p.ndim > 1]
        self.velocity = [torch.zeros_like(p) for p in self.parameters]
        self.lr, self.loss = (torch.zeros((), device=device) for _ in range(2))
        self.graph: torch.cuda.CUDAGraph | None = None
        self.broken = ""

    def record(self, stream: torch.cuda.Stream) -> None:
        """Record a step as a CUDA graph; what cannot be recorded is done step by step."""
        before = [(buffer, buffer.clone()) for buffer in self.method.buffers()]

        def undo() -> None:  # at a rate of 0 the weights stay as they are
            for buffer, value in before:
                buffer.copy_(value)
            for velocity in self.velocity:
                velocity.zero_()
            self.loss.zero_()

        try:
            self.graph = captured(self._step, stream, undo)
        except RuntimeError as error:
            torch.cuda.synchronize()
            self.broken = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            undo()

    def step(self) -> None:
        """One update."""
        if self.graph is None:
            self._step()
        else:
            self.graph.replay()

    def _step(self) -> None:
        """Nesterov's momentum, weight decay on convolutions and matrices, gradients no longer than a limit."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            losses = self.method(self.x, self.y)
        gradients = list(torch.autograd.grad(losses.total, self.parameters, allow_unused=True, materialize_grads=True))
        with torch.no_grad():
            self.loss += losses.total.detach()
            norm = torch.stack(torch._foreach_norm(gradients)).norm()
            torch._foreach_mul_(gradients, (LARGEST_NORM / norm.clamp_min(1e-6)).clamp_max(1.0))
            decayed = [gradients[i] for i in self.decayed]
            torch._foreach_add_(decayed, [self.parameters[i] for i in self.decayed], alpha=self.row.weight_decay)
            torch._foreach_mul_(self.velocity, MOMENTUM)
            torch._foreach_add_(self.velocity, gradients)
            torch._foreach_add_(gradients, self.velocity, alpha=MOMENTUM)
            torch._foreach_mul_(gradients, self.lr)
            torch._foreach_sub_(self.parameters, gradients)

    def start_epoch(self, epoch: int, epochs: int) -> None:
        """The weight of DKD rises over the first twelfth of the epochs, as published."""
        self.loss.zero_()
        base = getattr(self.method, "base", None)
        if base is not None and self.row.task == "dkd":
            base.weight.fill_(self.row.x * min(1.0, (epoch + 1) / max(1.0, epochs / 12)))


class Joint:
    """Learners side by side, with T's pass over each batch done once for all of them."""

    def __init__(self, photos: Photos, T: FeatureNetwork | None) -> None:
        self.photos, self.cuda = photos, photos.device.type == "cuda"
        self.learners: list[Learner] = []
        self.streams: list[torch.cuda.Stream] = []
        self.given: Given | None = None
        self.teach_graph: torch.cuda.CUDAGraph | None = None
        photos.take(0)
        if T is not None:
            dtype = torch.bfloat16 if self.cuda else torch.float32
            self.T = folded_copy(T.eval(), dtype, False)
            assert self.T is not None
            self.T.to(photos.device)
            if self.cuda:
                self.T.to(memory_format=torch.channels_last)
            with torch.no_grad():
                maps, z = self.T.maps_and_logits(photos.x)
            self.given = Given([torch.zeros_like(maps[-1])], torch.zeros_like(z, dtype=torch.float32))
            if self.cuda:
                self.teach_graph = captured(self._teach, new_stream())
            self._teach()

    @torch.no_grad()
    def _teach(self) -> None:
        assert self.given is not None
        assert self.T is not None
        maps, z = self.T.maps_and_logits(self.photos.x)
        self.given.maps[0].copy_(maps[-1])
        self.given.logits_NK.copy_(z)

    def add(self, row: Row, network: nn.Module) -> None:
        """Let a network learn along."""
        learner = Learner(row, network, None if row.task == "ce" else self.given, self.photos)
        if self.cuda:
            stream = new_stream()
            learner.record(stream)
            self.streams.append(stream)
        self.learners.append(learner)

    def train(self, seed: int, epochs: int) -> list[float]:
        """Train; seconds of each epoch."""
        steps, seconds = self.photos.steps, []
        for epoch in range(epochs):
            began = time.perf_counter()
            self.photos.start_epoch(seed, epoch)
            for learner in self.learners:
                learner.start_epoch(epoch, epochs)
            for step in range(steps):
                done = (epoch * steps + step + 1) / (epochs * steps)
                self._step(step, min(1.0, done / WARM_UP) * (1 + math.cos(math.pi * done)) / 2)
            if self.cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
        return seconds

    def _step(self, step: int, share: float) -> None:
        self.photos.take(step)
        if self.teach_graph is not None:
            self.teach_graph.replay()
        elif self.given is not None:
            self._teach()
        for learner in self.learners:
            learner.lr.fill_(learner.row.lr * share)
        step_together([learner.step for learner in self.learners], self.streams)


@torch.inference_mode()
def logits(network: nn.Module, split: Split, photos: Photos) -> Tensor:
    """Logits [N, K] of a split in float32 on the CPU; the network is left in eval mode."""
    network.eval()
    chunks: Sequence[Tensor] = list(split.chunks(200))
    return torch.cat([network(photos.normalised(chunk.to(photos.device))).float().cpu() for chunk in chunks])


def exits(network: nn.Module) -> dict[str, nn.Module]:
    """What is judged: the network, and S alone where there is an A."""
    parts: dict[str, nn.Module] = {"sum": network}
    if isinstance(network, ResidualStudent) and len(network.assistants):
        parts["student"] = StudentAlone(network)
    return parts
