"""Measures early exit: accuracy against mean MACs and mean time, over thresholds.

An image that leaves after step i takes the time t_i of the graphs 0 .. i, measured one way after the other in turn with
S0; with the share p_i of the images that leave there,

    mean time = sum_i p_i t_i        mean MACs = sum_i p_i (MACs of the graphs 0 .. i)
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rkd_deploy.backends import RunOn, describe_model
from rkd_deploy.bench.timing import Progress, TimingLimits, Workload, measure_workloads
from rkd_deploy.decoding import decode
from rkd_deploy.report.tables import Column, milliseconds
from rkd_deploy.serve.early_exit import EarlyExitBackend

_NEVER = 2.0
"""A threshold that no confidence reaches: every image goes through all the graphs there are."""


@dataclass(frozen=True, kw_only=True)
class ExitPoint:
    """What S + A are worth at one threshold of early exit.

    Attributes:
        threshold: Confidence at which an image leaves.
        chosen: Whether it is the lowest that loses nothing on the held-out images.
        assistant_share: Share of the test images that S does not answer alone.
        held_out_top1: Accuracy on the held-out images in %.
        top1: Accuracy on the test images in %.
        macs: Mean multiply-adds of a test image.
        macs_ratio: The same over S0's; None where there is no S0.
        mean_ms: Mean time of a test image.
        time_ratio: The same over S0's; None where there is no S0.
    """

    threshold: float
    chosen: bool
    assistant_share: float
    held_out_top1: float
    top1: float
    macs: float
    macs_ratio: float | None
    mean_ms: float
    time_ratio: float | None


@dataclass(frozen=True, kw_only=True)
class ExitCurve:
    """Early exit of one network at several thresholds, the lowest first.

    Attributes:
        network: Name of S + A's row.
        points: At each threshold.
    """

    network: str
    points: tuple[ExitPoint, ...]

    def sentence(self) -> str:
        """What the threshold gives that was chosen on held-out images."""
        point = next(point for point in self.points if point.chosen)
        cost = f"{point.mean_ms:.3g} ms on average"
        if point.time_ratio is not None and point.macs_ratio is not None:
            cost = f"{point.time_ratio:.2f} of S0's mean time, {point.macs_ratio:.2f} of its MACs"
        return (
            f"{self.network}, leaving early at {point.threshold:g} (chosen on held-out images): {point.top1:.2f} % at "
            f"{cost}; {100 * point.assistant_share:.0f} % of the test images ask A."
        )


EXIT_COLUMNS: tuple[Column[ExitPoint], ...] = (
    Column("Threshold", lambda p: f"{p.threshold:g}{' (chosen)' if p.chosen else ''}"),
    Column("Ask A, %", lambda p: f"{100 * p.assistant_share:.1f}"),
    Column("Held out, %", lambda p: f"{p.held_out_top1:.2f}"),
    Column("Top-1, %", lambda p: f"{p.top1:.2f}"),
    Column("Mean MACs, M", lambda p: f"{p.macs / 1e6:,.2f}"),
    Column("of S0's", lambda p: None if p.macs_ratio is None else f"{p.macs_ratio:.2f}"),
    Column("Mean time, ms", lambda p: milliseconds(p.mean_ms)),
    Column("of S0's time", lambda p: None if p.time_ratio is None else f"{p.time_ratio:.2f}"),
)


@dataclass(frozen=True)
class _Stored:
    """A row of a card's `early_exit`, as far as it is read here."""

    threshold: float
    shares: tuple[float, ...]
    macs: float
    top1: float


def exit_curve(
    network: str,
    bundle: Path,
    s0: tuple[int, Path] | None,
    run_on: RunOn,
    limits: TimingLimits,
    progress: Progress | None = None,
) -> ExitCurve:
    """Time the ways through a bundle's graphs, and join the times with the shares and accuracies in its card.

    Args:
        network: Name of S + A's row.
        bundle: S + A exported with early exit, its threshold chosen on held-out images, reported on test images.
        s0: MACs of the network of the same cost, and its bundle, which is timed in turn with S + A.
        run_on: Where.
        limits: How long each way is timed, image by image.
        progress: Told what is measured, and how far it is.

    Raises:
        BackendError: The backend cannot run the graphs here.
    """
    card = describe_model(bundle)
    report = card.early_exit
    held_out, test = (decode(tuple[_Stored, ...], report[name], name) for name in ("held_out", "test"))
    held_out_top1 = {stored.threshold: stored.top1 for stored in held_out}
    times_ms, s0_ms = _times(bundle, report["files"], None if s0 is None else s0[1], run_on, limits, progress)

    def point(stored: _Stored) -> ExitPoint:
        mean_ms = float(np.dot(stored.shares, times_ms))
        return ExitPoint(
            threshold=stored.threshold,
            chosen=stored.threshold == report["threshold"],
            assistant_share=1 - stored.shares[0],
            held_out_top1=held_out_top1[stored.threshold],
            top1=stored.top1,
            macs=stored.macs,
            macs_ratio=None if s0 is None else stored.macs / s0[0],
            mean_ms=mean_ms,
            time_ratio=None if s0_ms is None else mean_ms / s0_ms,
        )

    return ExitCurve(network=network, points=tuple(point(stored) for stored in test))


def _times(
    bundle: Path,
    files: Sequence[str],
    s0: Path | None,
    run_on: RunOn,
    limits: TimingLimits,
    progress: Progress | None,
) -> tuple[list[float], float | None]:
    """Median times t_0 .. t_k of one image that leaves after each step, and S0's."""
    preprocess = describe_model(bundle).preprocess
    x = np.random.default_rng(0).integers(0, 256, (1, *preprocess.input_shape)).astype(preprocess.input_dtype)
    with ExitStack() as opened:
        steps = [opened.enter_context(run_on.load(bundle / file, batches=(1,))) for file in files]
        ways = [
            EarlyExitBackend(steps, 0.0),
            *(EarlyExitBackend(steps[:end], _NEVER) for end in range(2, len(steps) + 1)),
        ]
        workloads = {f"early exit, {number} of {len(steps)}": Workload((way,), x) for number, way in enumerate(ways, 1)}
        names = list(workloads)
        if s0 is not None:
            workloads["S0"] = Workload((opened.enter_context(run_on.load(s0, batches=(1,))),), x)
        timings = measure_workloads(workloads, limits, progress=progress)
    return [timings[name].p50 for name in names], None if s0 is None else timings["S0"].p50
