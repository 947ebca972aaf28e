"""The loop of ladder_joint.py: networks that learn at the same time, each as a CUDA graph."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import cast

import torch
from ladder_rows import Row
from torch import Tensor, nn

from rkd_deploy.export.fusion import fuse
from rkd_deploy.models import zoo
from rkd_deploy.models.cost import count
from rkd_deploy.models.residual import ResidualStudent
from rkd_deploy.models.staged import FeatureNetwork, Staged
from rkd_deploy.models.trunk import parted
from rkd_deploy.train.frozen import folded_copy
from rkd_deploy.train.methods.base import Method, WeightedLoss
from rkd_deploy.train.methods.baseline import CrossEntropy, Distilled
from rkd_deploy.train.methods.dkd import DKD
from rkd_deploy.train.methods.end_to_end import EndToEnd, Weights
from rkd_deploy.train.methods.kd import KD
from rkd_deploy.train.methods.residual import relative

MEAN, STD = (0.5070, 0.4865, 0.4409), (0.2673, 0.2564, 0.2761)  # of T's weights
BATCH, MOMENTUM = 128, 0.9


class Given(nn.Module):
    """T as the rows see it: its maps and logits of the batch, computed once for all of them."""

    def __init__(self, maps: Sequence[Tensor], logits_NK: Tensor) -> None:
        super().__init__()
        self.maps, self.logits_NK = tuple(maps), logits_NK

    def maps_and_logits(self, _x_NCHW: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """What T gave for the batch."""
        return self.maps, self.logits_NK


def build(row: Row, s0_name: str, head: nn.Module, seed: int) -> nn.Module:
    """The network of a row with fresh weights."""
    torch.manual_seed(seed)
    s0 = zoo.create(s0_name, 100)
    assert isinstance(s0, Staged)
    if row.own_head:
        return s0.rebuilt(row.student, 100)
    S = s0.rebuilt(row.student, None)
    if row.assistant is None:
        return ResidualStudent(S, (), 64, 100, copy.deepcopy(head).cpu())
    A = s0.rebuilt(row.assistant, None)
    if row.shared:
        return parted(S, [A], row.shared, 64, 100, copy.deepcopy(head).cpu())
    return ResidualStudent(S, [A], 64, 100, copy.deepcopy(head).cpu())


def shipped_macs(row: Row, s0_name: str, head: nn.Module) -> int:
    """MACs of the network as it is exported: adapters and head are one matrix there."""
    network = build(row, s0_name, head, 0).eval()
    return count(network if row.own_head else fuse(network, "tail"), 32).macs


def method_of(row: Row, network: nn.Module, teacher: nn.Module, device: torch.device) -> Method:
    """The package's loss of a row."""
    if row.task == "ce":
        return CrossEntropy(network)
    loss, weight, ce = {
        "kd": (KD(4.0, False), 0.9, 0.1),
        "dkd": (DKD(1.0, 2.0, 4.0, False), 1.0, 1.0),
        "lskd": (KD(2.0, True), 9.0, 0.1),
    }[row.task]
    base = WeightedLoss(loss, weight * row.x, 0)
    base.weight = torch.full((), weight * row.x, device=device)  # type: ignore[assignment]
    if row.own_head:
        return Distilled(teacher, network, base, ce * row.x)  # type: ignore[arg-type]
    assert isinstance(network, ResidualStudent)
    weights = Weights(feature=row.distance, assistant=1.0, ce=ce * row.x, student=row.x_student, step_decay=0.5)
    return EndToEnd(teacher, network, relative, weights, detach=True, train_head=True, base=base)  # type: ignore[arg-type]


class Images:
    """Training images on the device, and one batch of them in place."""

    def __init__(self, pixels: Tensor, labels: Tensor, device: torch.device, batch: int = BATCH) -> None:
        self.batch = batch
        self.padded = nn.functional.pad(pixels, (0, 0, 4, 4, 4, 4)).to(device)
        self.labels, self.device, self.count = labels.to(device), device, len(pixels)
        self.steps = self.count // batch
        self.mean, self.std = (torch.tensor(v, device=device)[:, None, None] * 255 for v in (MEAN, STD))
        self.step = torch.zeros((), dtype=torch.long, device=device)
        self.offset, self.range = torch.arange(batch, device=device), torch.arange(32, device=device)
        self.order = torch.zeros(self.steps * batch, dtype=torch.long, device=device)
        self.shift = torch.zeros(2, self.steps * batch, dtype=torch.long, device=device)
        self.flip = torch.zeros(self.steps * batch, dtype=torch.bool, device=device)
        self.x = torch.zeros(batch, 3, 32, 32, device=device).to(memory_format=torch.channels_last)
        self.y = torch.zeros(batch, dtype=torch.long, device=device)

    def start_epoch(self, seed: int, epoch: int) -> None:
        """Draw order, crops and mirror images of an epoch."""
        g = torch.Generator().manual_seed(1000 * (seed + 1) + epoch)
        n = len(self.order)
        self.order.copy_(torch.randperm(self.count, generator=g)[:n])
        self.shift.copy_(torch.randint(0, 9, (2, n), generator=g))
        self.flip.copy_(torch.rand(n, generator=g) < 0.5)
        self.step.zero_()

    def take(self) -> None:
        """The next batch into x and y; nothing here waits for the device."""
        at = self.step * self.batch + self.offset
        index, (dy, dx), flip = self.order[at], self.shift[:, at], self.flip[at]
        rows = self.range + dy[:, None]
        columns = torch.where(flip[:, None], 31 - self.range, self.range) + dx[:, None]
        batch = self.padded[index[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
        self.x.copy_((batch.float() - self.mean) / self.std)
        self.y.copy_(self.labels[index])
        self.step += 1


class Recorded:
    """Something that is done once a step: recorded as a CUDA graph on a CUDA device, called elsewhere."""

    def __init__(self, do: Callable[[], None], device: torch.device) -> None:
        self.do, self.graph = do, None
        if device.type == "cuda":
            self.graph = torch.cuda.CUDAGraph()
            torch.cuda.synchronize()
            with torch.cuda.graph(self.graph, stream=torch.cuda.Stream()):  # type: ignore[no-untyped-call]
                do()
            torch.cuda.synchronize()

    def __call__(self) -> None:
        """Do it."""
        if self.graph is None:
            self.do()
        else:
            self.graph.replay()


class Learner:
    """A row in training: its network, losses and weights' updates."""

    def __init__(self, row: Row, s0_name: str, seed: int, teacher: Given, head: nn.Module, images: Images) -> None:
        device = images.device
        self.row, self.images = row, images
        self.network = build(row, s0_name, head, seed).to(device).to(memory_format=torch.channels_last)
        self.method = method_of(row, self.network, teacher, device).train()
        self.parameters: list[Tensor] = [p for p in self.method.parameters() if p.requires_grad]
        self.decayed = [i for i, p in enumerate(self.parameters) if p.ndim > 1]
        self.velocity = [torch.zeros_like(p) for p in self.parameters]
        self.lr = torch.zeros((), device=device)
        self.loss = torch.zeros((), device=device)
        buffers = [(b, b.clone()) for b in self.method.buffers()]
        if device.type == "cuda":  # libraries choose their kernels before anything is recorded
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            with torch.cuda.stream(stream):
                for _ in range(2):
                    self._gradients()
            torch.cuda.synchronize()
            for buffer, before in buffers:
                buffer.copy_(before)
        self.step = Recorded(self._step, device)
        if device.type == "cuda":
            self.loss.zero_()

    def _gradients(self) -> tuple[Tensor, ...]:
        with torch.autocast(self.images.device.type, torch.bfloat16):
            losses = self.method(self.images.x, self.images.y)
        self.loss += losses.total.detach()
        return torch.autograd.grad(losses.total, self.parameters)

    def _step(self) -> None:
        """Nesterov's momentum, weight decay on convolutions and matrices."""
        gradients = list(self._gradients())
        with torch.no_grad():
            decayed = [gradients[i] for i in self.decayed]
            torch._foreach_add_(decayed, [self.parameters[i] for i in self.decayed], alpha=5e-4)
            torch._foreach_mul_(self.velocity, MOMENTUM)
            torch._foreach_add_(self.velocity, gradients)
            torch._foreach_add_(gradients, self.velocity, alpha=MOMENTUM)
            torch._foreach_mul_(gradients, self.lr)
            torch._foreach_add_(self.parameters, gradients, alpha=-1)

    def start_epoch(self, epoch: int, epochs: int) -> None:
        """The weight of DKD rises over the first twelfth of the epochs, as published."""
        self.loss.zero_()
        base = getattr(self.method, "base", None)
        if base is not None and self.row.task == "dkd":
            base.weight.fill_(self.row.x * min(1.0, (epoch + 1) / max(1.0, epochs / 12)))


def step_together(steps: Sequence[Callable[[], None]], streams: Sequence[torch.cuda.Stream]) -> None:
    """Take a step of each row, each on a stream of its own; one after the other where there are no streams."""
    if not streams:
        for step in steps:
            step()
        return
    main = torch.cuda.current_stream()
    for step, stream in zip(steps, streams, strict=True):
        stream.wait_stream(main)
        with torch.cuda.stream(stream):
            step()
    for stream in streams:
        main.wait_stream(stream)


class Joint:
    """Rows that learn side by side."""

    def __init__(self, rows: Sequence[Row], s0_name: str, seed: int, T: nn.Module, images: Images) -> None:
        device, self.images, self.seed = images.device, images, seed
        kind = torch.bfloat16 if device.type == "cuda" else torch.float32
        fast = folded_copy(cast(FeatureNetwork, T.eval()), kind, False)
        assert fast is not None  # networks of the zoo can be traced
        self.fast = fast.to(device).to(memory_format=torch.channels_last)
        with torch.no_grad():
            images.take()
            maps, z = self.fast.maps_and_logits(images.x)
        self.given = Given([torch.zeros_like(m) for m in maps[-1:]], torch.zeros_like(z, dtype=torch.float32))
        with torch.no_grad():
            self._teach()
        self.shared = Recorded(self._teach, device)
        self.learners = [Learner(row, s0_name, seed, self.given, T.fc, images) for row in rows]  # type: ignore[arg-type]
        self.streams = [torch.cuda.Stream() for _ in self.learners] if device.type == "cuda" else []  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def _teach(self) -> None:
        self.images.take()
        maps, z = self.fast.maps_and_logits(self.images.x)
        self.given.maps[0].copy_(maps[-1])
        self.given.logits_NK.copy_(z)

    def train(self, epochs: int) -> Iterator[tuple[int, float]]:
        """Train; yields epoch and seconds."""
        steps = self.images.steps
        for epoch in range(epochs):
            began = time.perf_counter()
            self.images.start_epoch(self.seed, epoch)
            for learner in self.learners:
                learner.start_epoch(epoch, epochs)
            for step in range(steps):
                done = (epoch * steps + step) / (epochs * steps)
                share = min(1.0, (epoch * steps + step + 1) / (0.5 * steps)) * (1 + math.cos(math.pi * done)) / 2
                self._step(share)
            if self.images.device.type == "cuda":
                torch.cuda.synchronize()
            yield epoch, time.perf_counter() - began

    def _step(self, share: float) -> None:
        share *= self.images.batch / BATCH  # rates were chosen at BATCH; linear scaling, arXiv 1706.02677
        for learner in self.learners:
            learner.lr.fill_(learner.row.lr * share)
        self.shared()
        step_together([learner.step for learner in self.learners], self.streams)
