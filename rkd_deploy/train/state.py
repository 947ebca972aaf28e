"""The checkpoint of a phase in progress: a resumed phase goes on as if it had not stopped."""

from __future__ import annotations

import dataclasses
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from rkd_deploy.data.augment import hard_labels
from rkd_deploy.decoding import DecodingError, decode
from rkd_deploy.errors import CheckpointError, command_line
from rkd_deploy.train.distributed import Group
from rkd_deploy.train.methods.base import Losses, Method
from rkd_deploy.train.runs import Run
from rkd_deploy.train.stepping import Average
from rkd_deploy.train.weights import load_tensors, save_tensors

_NEVER = 2**62  # stands for no step at all, and is later than any


@dataclass(frozen=True, kw_only=True)
class CheckpointFacts:
    """Header of a checkpoint: where it stands.

    Attributes:
        phase: Name of the phase.
        epoch: Epoch to go on with, from 0.
        batch: Batch of it to go on with, from 0.
        names: Names of the sums of the epoch in progress.
        images: How many images they count.
        log: Size of the log then, in bytes.
    """

    phase: str
    epoch: int
    batch: int
    names: tuple[str, ...]
    images: int
    log: int


@dataclass
class EpochSums:
    """Sums over this process's share of the images of an epoch in progress.

    Attributes:
        names: Names of the values: the loss, its parts.
        totals_V: Sum over images of each value, float64.
        correct: Images that were classified right; None where nothing is classified yet.
        images: How many were seen.
    """

    names: tuple[str, ...] = ()
    totals_V: Tensor | None = None
    correct: Tensor | None = None
    images: int = 0
    _first_bad_V: Tensor | None = field(default=None, repr=False)

    def add(self, losses: Losses, y_N: Tensor, step: int | Tensor) -> None:
        """Count one batch in.

        Args:
            losses: Losses of the batch.
            y_N: Labels [N], or probabilities [N, K].
            step: Number of the batch within the epoch, from 1; int64 [1] on the device where the step is recorded.
        """
        self.names = ("loss", *losses.parts)
        # Nothing here is read back: to look at a value would make the CPU wait for the device at every step. So that a
        # value is not finite is noted on the device, as the number of its first step, and read when the epoch ends.
        values_V = torch.stack([value.detach().double() for value in (losses.total, *losses.parts.values())])
        first_bad_V = torch.where(values_V.isfinite(), _NEVER, step)
        weighted_V = values_V * len(y_N)
        self.totals_V = weighted_V if self.totals_V is None else self.totals_V.add_(weighted_V)
        if losses.logits_NK is not None:
            correct = (losses.logits_NK.argmax(1) == hard_labels(y_N)).sum()
            self.correct = correct if self.correct is None else self.correct.add_(correct)
        if self._first_bad_V is None:
            self._first_bad_V = first_bad_V
        else:
            torch.minimum(self._first_bad_V, first_bad_V, out=self._first_bad_V)
        self.images += len(y_N)

    def count_in(self, place: EpochSums) -> None:
        """Go on counting in the tensors of another, which a recorded step writes."""
        if self.totals_V is place.totals_V:
            return
        for name, empty in (("totals_V", 0), ("correct", 0), ("_first_bad_V", _NEVER)):
            value, target = getattr(self, name), getattr(place, name)
            if target is not None:
                target.fill_(empty) if value is None else target.copy_(value)
                setattr(self, name, target)
        self.names = place.names

    def over(self, group: Group) -> EpochSums:
        """The sums over the images of all processes."""
        if group.size == 1 or self.totals_V is None or self._first_bad_V is None:
            return self
        # Counts travel with the sums, in one exchange: float64 holds whole numbers up to 2^53 exactly.
        counts_2 = self.totals_V.new_tensor([self.images, 0 if self.correct is None else self.correct])
        *totals, images, correct = group.summed(torch.cat([self.totals_V, counts_2]))
        right = None if self.correct is None else correct.long()
        return EpochSums(self.names, torch.stack(totals), right, int(images.item()), group.smallest(self._first_bad_V))

    def means(self) -> dict[str, float]:
        """Means over the images so far, and the training accuracy in percent; this waits for the device."""
        if self.totals_V is None:
            return {}
        means = dict(zip(self.names, (self.totals_V / self.images).tolist(), strict=True))
        return means if self.correct is None else {**means, "train_top1": 100 * self.correct.item() / self.images}

    def first_bad(self) -> tuple[int, list[str]] | None:
        """The first step at which a value is not finite, and the parts of the loss that are not; None where all are."""
        if self._first_bad_V is None:
            return None
        steps = self._first_bad_V.tolist()
        if (first := min(steps)) == _NEVER:
            return None
        bad = [name for name, step in zip(self.names, steps, strict=True) if step == first]
        return first, [name for name in bad if name != "loss"] or bad


def save(
    phase: Phase,
    optimizer: torch.optim.Optimizer,
    average: Average | None,
    run: Run,
    place: tuple[int, int],
    sums: EpochSums,
) -> None:
    """Write the checkpoint of a phase, whole or not at all.

    Args:
        phase: Gives the weights, and those trained along with them.
        optimizer: Gives the momenta.
        average: The average of the weights, where there is one.
        run: Where the checkpoint goes.
        place: Epoch and batch to go on with, from 0.
        sums: Sums of the epoch in progress, over all processes.

    Raises:
        StorageError: It could not be written; the one before is intact.
    """
    tensors = _with_prefix("product/", phase.product.state_dict())
    if (auxiliary := phase.method.auxiliary()) is not None:
        tensors |= _with_prefix("auxiliary/", auxiliary.state_dict())
    if average is not None:
        tensors |= _with_prefix("average/", average.state())
    # By position: PyTorch numbers parameters in the order in which the optimizer got them, and the method fixes that.
    state = optimizer.state_dict()["state"]
    tensors |= {f"momentum/{index}": entry["momentum_buffer"] for index, entry in state.items()}
    tensors |= {
        name: value for name, value in (("sums", sums.totals_V), ("correct", sums.correct)) if value is not None
    }
    # For dropout and the like: a loader draws by epoch and batch (`data/batches.py`) and has no state of its own.
    tensors["random"] = torch.get_rng_state()
    facts = CheckpointFacts(
        phase=phase.name,
        epoch=place[0],
        batch=place[1],
        names=sums.names,
        images=sums.images,
        log=run.log.size(),
    )
    save_tensors(run.checkpoint, tensors, dataclasses.asdict(facts))


def restore(
    phase: Phase, optimizer: torch.optim.Optimizer, average: Average | None, run: Run, group: Group
) -> tuple[int, int, EpochSums]:
    """Take up the checkpoint of a phase, if there is one; returns epoch, batch and sums to go on from.

    Raises:
        CheckpointError: The checkpoint is damaged, or another phase's under this one's name.
    """
    tensors, facts = group.on_main(lambda: _read(phase.name, run))
    if facts is None:
        _draw_apart(phase, group, (0, 0))
        return 0, 0, EpochSums()
    try:
        return _take_up(phase, optimizer, average, group, tensors, facts)
    except torch.OutOfMemoryError:  # nothing is wrong with the file
        raise
    except (RuntimeError, KeyError, IndexError, TypeError, ValueError) as error:  # tensors of others, or none
        raise _damaged(run, f"it does not fit phase {phase.name}: {error}") from error


def _take_up(
    phase: Phase,
    optimizer: torch.optim.Optimizer,
    average: Average | None,
    group: Group,
    tensors: dict[str, Tensor],
    facts: CheckpointFacts,
) -> tuple[int, int, EpochSums]:
    phase.product.load_state_dict(_under("product/", tensors))
    if (auxiliary := phase.method.auxiliary()) is not None:
        auxiliary.load_state_dict(_under("auxiliary/", tensors))
    if average is not None:
        average.restore(_under("average/", tensors))
    _restore_momenta(optimizer, _under("momentum/", tensors))
    torch.set_rng_state(tensors["random"])
    place = (facts.epoch, facts.batch)
    _draw_apart(phase, group, place)
    if group.rank > 0 or "sums" not in tensors:  # what all processes saw is counted on by the first one
        return *place, EpochSums()
    device = next(phase.product.parameters()).device
    totals_V = tensors["sums"].to(device)
    correct = tensors["correct"].to(device) if "correct" in tensors else None
    return *place, EpochSums(facts.names, totals_V, correct, facts.images)


def _read(name: str, run: Run) -> tuple[dict[str, Tensor], CheckpointFacts | None]:
    """Tensors and facts of the checkpoint of a phase, and the log cut back to it; nothing where the phase is new."""
    tensors, facts = _read_checkpoint(run) if os.path.lexists(run.checkpoint) else ({}, None)
    if facts is None or facts.phase != name:
        run.log.forget(name)  # killed after its first epoch was logged and before that was saved
        return {}, None
    run.log.rewind(facts.log)
    return tensors, facts


def _read_checkpoint(run: Run) -> tuple[dict[str, Tensor], CheckpointFacts]:
    try:
        tensors, header = load_tensors(run.checkpoint)
        facts = decode(CheckpointFacts, header)
        if min(facts.epoch, facts.batch, facts.images, facts.log) < 0:
            raise DecodingError("a number in its header is negative")
    except (CheckpointError, DecodingError) as error:
        raise _damaged(run, str(error)) from error
    return tensors, facts


def _damaged(run: Run, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{run.checkpoint}, the state of the phase in progress, is damaged: {reason} Remove it, and that phase begins "
        f"anew with: {command_line('train', run.folder, '--resume')}"
    )


def _restore_momenta(optimizer: torch.optim.Optimizer, momenta: dict[str, Tensor]) -> None:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, value in momenta.items():
        # Laid out in memory as the parameter is: files know no channels_last, and a fused step goes by storage.
        buffer = torch.empty_like(parameters[int(index)])
        optimizer.state[parameters[int(index)]]["momentum_buffer"] = buffer.copy_(value)


def _draw_apart(phase: Phase, group: Group, place: tuple[int, int]) -> None:
    """Seed every rank but 0 apart, so that dropout differs between them; rank 0 draws what one process would."""
    if group.rank > 0:
        torch.manual_seed(zlib.crc32(f"{phase.name}/{place}/{group.rank}/{torch.initial_seed()}".encode()))


def _with_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in tensors.items()}


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


@dataclass
class Phase:
    """One stretch of training with one method.

    Attributes:
        name: Names its log lines and its weights.
        method: What is trained.
        product: The network whose weights are kept.
        epochs: How long.
        val_top1: Accuracy of the deployable network on the held-out images in percent, or None without either.
    """

    name: str
    method: Method
    product: nn.Module
    epochs: int
    val_top1: Callable[[nn.Module | None], float | None]
