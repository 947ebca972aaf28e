"""Level `auto`: which fusion is fastest is measured, not guessed.

Candidates are `tail`, `wide`, and `wide-grouped` where it differs from `wide`. `sum` is none: it does all that `tail`
does, and adapters and an addition besides. Each is exported as it would ship and run by the backend that it is meant
for, by turns, at each batch size.

The rule: r(level) is the geometric mean over the batch sizes of the level's median over `tail`'s, so every batch size
counts alike whatever it takes. The level with the least r wins if it is at least 2 % below 1; else `tail` stays, which
is the simplest. The choice depends on the machine and on the moment: a bundle of level `auto` is only reproduced by
naming the level that it chose.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from rkd_deploy.errors import UsageError
from rkd_deploy.export.fusion import WideBranches, fuse
from rkd_deploy.models.residual import ResidualStudent
from rkd_deploy.serve.bench import Result, bench
from rkd_deploy.serve.bench.provenance import provenance
from rkd_deploy.serve.bench.report import to_record
from rkd_deploy.serve.bench.timing import Progress

MARGIN = 0.02
"""How much faster than `tail` a level must be to take its place."""

Convert = Callable[[nn.Module], Any]
"""From a fused network to the ONNX model that would ship."""


@dataclass(frozen=True)
class Target:
    """Where and how the candidates are run; as for `bench`."""

    backend: str = "onnxruntime"
    device: str | None = None
    """None: the backend's own."""
    threads: int | None = None
    batches: tuple[int, ...] = (1,)
    min_seconds: float = 1.0
    """Of timed calls of each candidate at each batch size."""


@dataclass(frozen=True)
class Choice:
    """The level that ships.

    Attributes:
        level: Its name.
        network: The fused network.
        proto: Its ONNX model, as `convert` made it.
        summary: For the card; empty where nothing was measured.
        record: The whole measurement, every sample; empty where nothing was measured.
    """

    level: str
    network: nn.Module
    proto: Any
    summary: dict[str, Any] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)


def choose_level(model: nn.Module, convert: Convert, target: Target, progress: Progress | None = None) -> Choice:
    """Build the candidates, measure them, keep the fastest.

    Args:
        model: As for `fuse`; of a network without assistants there is one candidate, which is not measured.
        convert: Makes an ONNX model of a fused network.
        target: Where it is meant to run.
        progress: Told what is measured, and how far it is.

    Raises:
        UsageError: A batch size below 1.
        BackendError: The backend cannot run here, or cannot run a candidate.
    """
    networks, refused = _candidates(model)
    protos = {level: convert(network) for level, network in networks.items()}
    if not isinstance(model, ResidualStudent):
        return Choice("tail", networks["tail"], protos["tail"])
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{level}.onnx" for level in protos]
        for file, proto in zip(files, protos.values(), strict=True):
            file.write_bytes(proto.SerializeToString())
        settings: dict[str, Any] = {
            "backend": target.backend,
            "device": target.device,
            "threads": target.threads,
            "batches": target.batches,
            "min_seconds": target.min_seconds,
        }
        results = bench(files, **settings, progress=progress)
    p50_ms = by_level(list(protos), results)
    level, ratios = fastest(p50_ms)
    summary = {
        **settings,
        "device": results[0].device,
        "p50_ms": p50_ms,
        "ratio_to_tail": ratios,
        "refused": refused,
        "chosen": level,
    }
    summary["batches"] = list(target.batches)
    return Choice(level, networks[level], protos[level], summary, to_record(results, provenance(), summary))


def by_level(levels: Sequence[str], results: Sequence[Result]) -> dict[str, dict[str, float]]:
    """Medians in ms by level and batch size; results in the order of `bench`: each batch size, each level."""
    table: dict[str, dict[str, float]] = {level: {} for level in levels}
    for number, result in enumerate(results):
        table[levels[number % len(levels)]][str(result.batch)] = result.p50_ms
    return table


def fastest(p50_ms: dict[str, dict[str, float]]) -> tuple[str, dict[str, float]]:
    """The rule at the top of this file.

    Args:
        p50_ms: By level and batch size; `tail` among the levels.

    Returns:
        The level, and r of every level.
    """
    tail = p50_ms["tail"]
    ratios = {
        level: math.exp(sum(math.log(times[batch] / tail[batch]) for batch in tail) / len(tail))
        for level, times in p50_ms.items()
    }
    best = min(ratios, key=lambda level: ratios[level])
    return best if ratios[best] <= 1 - MARGIN else "tail", ratios


def _candidates(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The networks by level, and why a level is none."""
    networks, refused = {"tail": fuse(model, "tail")}, {}
    if isinstance(model, ResidualStudent):
        try:
            networks["wide"] = wide = fuse(model, "wide")
            if isinstance(wide, WideBranches) and wide.can_group:
                networks["wide-grouped"] = fuse(model, "wide-grouped")
        except UsageError as error:
            refused["wide"] = str(error)
    return networks, refused
