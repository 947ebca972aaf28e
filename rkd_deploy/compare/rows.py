"""Lists the networks of some runs, and what each gains over its controls.

A residual run always brings its own controls: T, S0 at the full cost (by cross-entropy, and S's base loss where there
is one) and S alone. So a gain of A can be told from the gain of more capacity, and of a better loss. What a recipe left
out is named.

Runs that differ in nothing but their seed are joined: mean and sample standard deviation. The same weights met in
several runs (one teacher, one S0) make one row.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rkd_deploy.bench.layers import LayerTimes
from rkd_deploy.bench.results import Result
from rkd_deploy.bench.roofline import Roofline
from rkd_deploy.bench.settings import BenchSettings
from rkd_deploy.compare.exits import ExitCurve
from rkd_deploy.compare.identity import (
    TrainedNetwork,
    check_same_test,
    distinct_networks,
    method_of,
    networks_of,
    phases_of,
    recipe_without_seed,
    row_names,
    row_order,
)
from rkd_deploy.errors import UsageError
from rkd_deploy.train.runs import Run
from rkd_deploy.train.verdict import CONTROLS, Gain, Verdict, gain_of_pairs, gain_of_samples, gain_of_seeds


@dataclass(frozen=True, kw_only=True)
class NetworkRow:
    """One network, or the same one trained with several seeds.

    Attributes:
        name: What it is and how it was trained, e.g. ``"S + A, sequential + at"``.
        part: fused, student, control, s0 or teacher.
        method: How it was trained: a scheme with its base loss, a baseline's loss, or ``"given"``.
        runs: Folders of the runs that hold it.
        top1: Accuracy on the test images in %, of the last epoch; the mean where there are several seeds.
        deviation: Sample standard deviation over the seeds, in points; None for one seed.
        standard_error: What drawing the test images leaves open, sqrt(p (1 - p) / n), in points: of one network.
        test_images: n.
        val_last: Accuracy on the held-out images after the last epoch in %, None without any.
        val_best: Accuracy on the held-out images after the best epoch: how much choosing it there would have given.
        macs: Multiply-adds of one image.
        parameters: Their number.
        seconds: Training time of its own phases; None where its weights were given.
        over_s0: Points above the control S0 of the same runs (mean over the seeds), for S alone, S + A and S0 with the
            same losses.
        over_control: Points above S0 with the same losses, for S alone and S + A: for S + A what A adds.
        over_student: Points that A adds to S, for S + A.
        graph_macs: Multiply-adds of one image in the exported graph, zeros included, once measured.
        graph_weights: Numbers that the exported graph stores, once measured.
        graph_zeros: Number of those that are zero.
        p50_ms: Median latency, its 95 % confidence interval and the 90th percentile, once measured (`timed`).
    """

    name: str
    part: str
    method: str
    runs: tuple[str, ...]
    top1: float
    deviation: float | None
    standard_error: float
    test_images: int
    val_last: float | None
    val_best: float | None
    macs: int
    parameters: int
    seconds: float | None
    over_s0: float | None = None
    over_control: float | None = None
    over_student: float | None = None
    graph_macs: int | None = None
    graph_weights: int | None = None
    graph_zeros: int | None = None
    p50_ms: float | None = None
    p50_low_ms: float | None = None
    p50_high_ms: float | None = None
    p90_ms: float | None = None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Rows, T first, then every S0, then S alone and S + A of each method.

    Attributes:
        data: Name of the data set whose test images all rows share.
        test_images: Their number.
        rows: The networks.
        networks: A run and part for each row: what its latency is measured on.
        missing: A sentence for every control that a recipe left out.
        results: Every measurement of the rows' networks, once timed; each has its row's name as its model.
        settings: How latency was measured; None where it was not.
        roofline: The bounds of the rows' networks, where asked for.
        layers: Times of their layers, where asked for.
        verdicts: For every S + A whether it beats the best control of these rows.
        exits: For every S + A that can leave early what that gives, where asked for.
    """

    data: str
    test_images: int
    rows: tuple[NetworkRow, ...]
    networks: tuple[tuple[Run, str], ...]
    missing: tuple[str, ...]
    results: tuple[Result, ...] = ()
    settings: BenchSettings | None = None
    roofline: Roofline | None = None
    layers: tuple[LayerTimes, ...] | None = None
    verdicts: tuple[Verdict, ...] = ()
    exits: tuple[ExitCurve, ...] = ()


def compare_runs(runs: Sequence[Run]) -> Comparison:
    """Put every network of finished runs side by side.

    Args:
        runs: At least one; all evaluated on the same test images.

    Raises:
        UsageError: No run, or runs whose test images differ.
        ModelFileError: A run is not finished.
    """
    if not runs:
        raise UsageError("compare was given no run. Name run folders: rkd-deploy compare runs/digits-001 ...")
    runs = list(dict.fromkeys(runs))
    check_same_test(runs)
    networks = distinct_networks(network for run in runs for network in networks_of(run))
    groups: dict[str, list[TrainedNetwork]] = {}
    for network in networks:
        groups.setdefault(recipe_without_seed(network), []).append(network)
    ordered = sorted(groups.values(), key=lambda group: row_order(group[0]))
    names = row_names([group[0] for group in ordered])
    facts = runs[0].facts
    rows = [_row(name, group) for name, group in zip(names, ordered, strict=True)]
    return Comparison(
        data=facts.data,
        test_images=facts.images.test,
        rows=tuple(rows),
        networks=tuple((group[0].run, group[0].part) for group in ordered),
        missing=tuple(_missing(runs)),
        verdicts=tuple(_verdicts(rows, ordered)),
    )


def _verdicts(rows: Sequence[NetworkRow], groups: Sequence[Sequence[TrainedNetwork]]) -> Iterable[Verdict]:
    controls = [pair for pair in zip(rows, groups, strict=True) if pair[0].part in CONTROLS]
    for row, group in zip(rows, groups, strict=True):
        if row.part == "fused" and controls:
            # The strictest of the controls: S + A must beat the best network of the same cost, not the plainest.
            control, others = max(controls, key=lambda pair: pair[0].top1)
            yield Verdict(
                network=row.name,
                control=control.part,
                control_name=control.name,
                gain=_gain(group, others),
                cost_ratio=row.macs / control.macs,
            )


def _gain(ours: Sequence[TrainedNetwork], others: Sequence[TrainedNetwork]) -> Gain:
    """By seeds that both have, where there are several; else by the test images of one run, or of two."""
    accuracies = [
        {network.run.recipe.train.seed: network.results.test_top1 for network in group} for group in (ours, others)
    ]
    seeds = sorted(accuracies[0].keys() & accuracies[1].keys())
    # Seeds tell most: they vary all that training varies. Of one run, its pairs of right and wrong images tell more
    # than two accuracies do, because both networks saw the same images.
    if len(seeds) > 1:
        return gain_of_seeds(*([by_seed[seed] for seed in seeds] for by_seed in accuracies))
    images = ours[0].results.test_images
    for network in ours:
        pairs = network.metrics.pairs.get(others[0].part)
        if pairs is not None and any(network.run == other.run for other in others):
            return gain_of_pairs(pairs.gained, pairs.lost, images)
    return gain_of_samples(ours[0].results.test_top1, others[0].results.test_top1, images)


def _row(name: str, group: Sequence[TrainedNetwork]) -> NetworkRow:
    results = [network.results for network in group]
    accuracies = [result.test_top1 for result in results]
    top1, images = statistics.fmean(accuracies), results[0].test_images
    phases = [phases_of(network) for network in group]
    part = group[0].part
    return NetworkRow(
        name=name,
        part=part,
        method=method_of(group[0].run.recipe, part),
        runs=tuple(str(network.run.folder) for network in group),
        top1=top1,
        deviation=statistics.stdev(accuracies) if len(group) > 1 else None,
        standard_error=math.sqrt(top1 * (100 - top1) / images),
        test_images=images,
        val_last=_mean(trained[-1].val_top1_last if trained else None for trained in phases),
        val_best=_mean(trained[-1].val_top1_best if trained else None for trained in phases),
        macs=results[0].macs,
        parameters=results[0].parameters,
        seconds=_mean(sum(phase.seconds for phase in trained) if trained else None for trained in phases),
        over_s0=_mean(_over(network, "s0") for network in group) if part not in ("teacher", "s0") else None,
        over_control=_mean(_over(network, "control") for network in group) if part in ("student", "fused") else None,
        over_student=_mean(_over(network, "student") for network in group) if part == "fused" else None,
    )


def _over(network: TrainedNetwork, control: str) -> float | None:
    other = network.metrics.parts.get(control)
    return None if other is None else network.results.test_top1 - other.test_top1


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _missing(runs: Sequence[Run]) -> Iterable[str]:
    for run in runs:
        if run.recipe.method.residual and not run.recipe.student.baseline:
            yield (
                f"{run.folder} has no S0: its recipe says student.baseline = false, so nothing there tells what S + A "
                "gain over one network of the same cost."
            )
        elif run.recipe.method.residual and not run.recipe.has_control:
            yield (
                f"{run.folder} has no S0 with the same losses (student.control = false, or scheme progressive): what A "
                "adds cannot be told there from what the losses do for any network."
            )
    if not any(run.recipe.method.residual for run in runs):
        yield "None of these runs trains S and A: they are baselines only."
