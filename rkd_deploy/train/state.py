"""The state of a phase in progress on disk: all that makes a resumed phase go on as if it had not stopped."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rkd_deploy.train.averaging import Average
from rkd_deploy.train.checkpoint import load_tensors, save_tensors
from rkd_deploy.train.parallel import Group
from rkd_deploy.train.runs import Run
from rkd_deploy.train.sums import EpochSums

if TYPE_CHECKING:
    from rkd_deploy.train.loop import Phase


def save(
    phase: Phase,
    optimizer: torch.optim.Optimizer,
    average: Average | None,
    run: Run,
    place: tuple[int, int],
    sums: EpochSums,
) -> None:
    """Write the checkpoint.

    Args:
        phase: Its weights, and those trained along with them.
        optimizer: Its momenta.
        average: Of the weights, where there is one.
        run: Where to.
        place: Epoch and batch to go on with, from 0.
        sums: Of the epoch in progress, over all processes.

    Raises:
        StorageError: It could not be written; the one before is intact.
    """
    tensors = _with_prefix("product/", phase.product.state_dict())
    if (auxiliary := phase.method.auxiliary()) is not None:
        tensors |= _with_prefix("auxiliary/", auxiliary.state_dict())
    if average is not None:
        tensors |= _with_prefix("average/", average.state())
    state = optimizer.state_dict()["state"]
    tensors |= {f"momentum/{index}": entry["momentum_buffer"] for index, entry in state.items()}
    tensors |= {
        name: value for name, value in (("sums", sums.totals_V), ("correct", sums.correct)) if value is not None
    }
    tensors["random"] = torch.get_rng_state()
    facts = {
        "phase": phase.name,
        "epoch": place[0],
        "batch": place[1],
        "names": list(sums.names),
        "images": sums.images,
        "log": run.log.size(),
    }
    save_tensors(run.checkpoint, tensors, facts)


def restore(
    phase: Phase, optimizer: torch.optim.Optimizer, average: Average | None, run: Run, group: Group
) -> tuple[int, int, EpochSums]:
    """Take up the checkpoint of this phase, if there is one: epoch, batch and sums to go on from."""
    tensors, facts = group.first(lambda: _read(phase.name, run))
    if facts is None:
        _draw_apart(phase, group, (0, 0))
        return 0, 0, EpochSums()
    phase.product.load_state_dict(_under("product/", tensors))
    if (auxiliary := phase.method.auxiliary()) is not None:
        auxiliary.load_state_dict(_under("auxiliary/", tensors))
    if average is not None:
        average.restore(_under("average/", tensors))
    _restore_momenta(optimizer, _under("momentum/", tensors))
    torch.set_rng_state(tensors["random"])
    place = (facts["epoch"], facts["batch"])
    _draw_apart(phase, group, place)
    if group.rank > 0 or "sums" not in tensors:  # what all processes saw is counted on by the first one
        return *place, EpochSums()
    device = next(phase.product.parameters()).device
    totals_V = tensors["sums"].to(device)
    correct = tensors["correct"].to(device) if "correct" in tensors else None
    return *place, EpochSums(tuple(facts["names"]), totals_V, correct, facts["images"])


def _read(name: str, run: Run) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """The checkpoint of this phase, the log cut back to where it stood; nothing where the phase is new."""
    tensors, facts = load_tensors(run.checkpoint) if run.checkpoint.exists() else ({}, {"phase": None})
    if facts["phase"] != name:
        run.log.forget(name)  # killed after its first epoch was logged and before that was saved
        return {}, None
    run.log.rewind(facts["log"])
    return tensors, facts


def _restore_momenta(optimizer: torch.optim.Optimizer, momenta: dict[str, Tensor]) -> None:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, value in momenta.items():
        # Laid out in memory as the parameter is: files know no channels_last, and a fused step goes by storage.
        buffer = torch.empty_like(parameters[int(index)])
        optimizer.state[parameters[int(index)]]["momentum_buffer"] = buffer.copy_(value)


def _draw_apart(phase: Phase, group: Group, place: tuple[int, int]) -> None:
    """Dropout and the like draw other numbers on every rank; rank 0 draws what one process would."""
    if group.rank > 0:
        torch.manual_seed(zlib.crc32(f"{phase.name}/{place}/{group.rank}/{torch.initial_seed()}".encode()))


def _with_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in tensors.items()}


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
