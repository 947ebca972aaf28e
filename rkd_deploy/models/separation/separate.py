"""Cuts S and its assistants from one network S0, so that together they cost no more.

`widths.py` says which widths fit into a budget of MACs or parameters; where the budget is latency, `latency.py`
searches for the widest that are no slower than S0. Any network that can be built at other widths can be cut
(`Staged`), and by structural pruning any convolutional classifier (`pruning.py`).
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from rkd_deploy.errors import BudgetError, UsageError, unknown_name
from rkd_deploy.models import zoo
from rkd_deploy.models.cost import count
from rkd_deploy.models.residual import ResidualStudent
from rkd_deploy.models.separation.inheritance import inherit_weights
from rkd_deploy.models.separation.latency import MAX_SECONDS, Candidate, Fitting, Stopwatch, fastest_fitting
from rkd_deploy.models.separation.pruning import narrowable
from rkd_deploy.models.separation.ways_out import way_out
from rkd_deploy.models.separation.widths import CostModel, WidthBudget
from rkd_deploy.models.staged import FeatureNetwork, Staged, Widths
from rkd_deploy.models.trunk import check_parting, parted

FUSION_LEVELS = {"side_by_side": "wide", "branches": "tail", "trunk": "tail"}
"""The level of fusion (`rkd_deploy.export.fusion`) that each layout of S and A is cut for."""
_MEASURED = ("side_by_side", "branches")
"""Layouts that a latency budget chooses from; the first is searched first."""

BUDGETS = ("macs", "params", "latency")
LAYOUTS = tuple(FUSION_LEVELS)


@dataclass(frozen=True, kw_only=True)
class Separation:
    """S and its assistants, and the account of their cost.

    Attributes:
        student: S, without a head.
        assistants: A_1 .. A_k, all of the same widths, without a head.
        s0_widths: Widths of S0; where S0 is a fraction of a model, the widths that it was narrowed to.
        cost: F(S) + F(P_S) + k (F(A) + F(P_A)) + F(h), in `unit`.
        budget: F(S0), never exceeded by `cost`.
        unit: ``"macs"`` or ``"params"``; MACs where the budget is latency.
        level: The level of fusion that S and A were cut for.
        parts: Cost of student, assistant, student_adapter, assistant_adapter and head; those of the assistants are of
            all k together.
        shared_stages: j, first stages that are there once, as S's; 0 where S and A share none. The assistants' first
            stages have the same widths then, and `rkd_deploy.models.trunk.parted` leaves them out.
        latency: Where the budget is latency, everything that was measured, and whether A is the narrowest there is: it
            may then take more than its share of what S and A cost.
    """

    student: Staged
    assistants: tuple[Staged, ...]
    s0_widths: Widths
    cost: int
    budget: int
    unit: str
    level: str
    parts: dict[str, int]
    shared_stages: int = 0
    latency: dict[str, Any] | None = None

    @property
    def assistant(self) -> Staged:
        """A_1, the only assistant where k = 1."""
        return self.assistants[0]


def separate(
    model: FeatureNetwork | str,
    *,
    num_classes: int,
    input_size: int | tuple[int, int],
    budget: str = "macs",
    layout: str | None = None,
    shared_stages: int | None = None,
    assistant_share: float = 0.2,
    assistants: int = 1,
    round_to: int = 8,
    channels: int | None = None,
    fraction: float | None = None,
    weights: str = "fresh",
    stopwatch: Stopwatch | None = None,
    head: nn.Module | None = None,
    stage_channels: Sequence[int] | None = None,
) -> Separation:
    """Cut S and A from the cost of S0.

    Args:
        model: S0: any convolutional classifier (`External`), a network of a built-in family, or a name
            (`rkd_deploy.models.zoo`).
        num_classes: K, of the head.
        input_size: Height and width of the images in pixels, or one number for both.
        budget: What must not exceed S0's: ``"macs"``, ``"params"``, or ``"latency"``, which `stopwatch` measures.
        layout: ``"branches"``; ``"side_by_side"``: widths of S and A add up to those of S0; ``"trunk"``: they share the
            first `shared_stages` stages. Default: branches; where the budget is latency, whichever of the first two
            leaves them more.
        shared_stages: j, for layout trunk. Default: all but the last.
        assistant_share: rho, the share of the budget that all assistants and their adapters may take; of the MACs where
            the budget is latency, and of S0's where the narrowest assistant takes more of a faster S + A.
        assistants: k, how many of them share it equally.
        round_to: Every width that is narrowed becomes a multiple of this and of what the network asks for itself
            (`Staged.steps`); no width falls below one such step, and a width that is smaller in S0 stays as it is.
        channels: C_T, the channels that the adapters lead to. Default: those of the model's last map.
        fraction: S0 is not the model itself but the model narrowed to this fraction of its cost.
        weights: ``"fresh"``, or ``"inherited"``: S and the assistants begin with weights of the model.
        stopwatch: Measures, where the budget is latency: an `rkd_deploy.export.stopwatch.ExportStopwatch`.
        head: h, from C_T channels. Default: a linear layer.
        stage_channels: C_T of every stage, where S and A exchange their maps at each (scheme progressive): P_S and P_A
            then stand for all the adapters of `rkd_deploy.models.progressive`, and `channels` is the last of these.

    Raises:
        BudgetError: Even the narrowest S and A cost more than S0; the message has the numbers.
        UsageError: Unknown name or unit, no assistant, or a model that cannot be narrowed; the message names the
            module and the operator.
    """
    _check(budget, layout, assistants, fraction, weights, stopwatch)
    _check_trunk(layout, shared_stages)
    size = (input_size, input_size) if isinstance(input_size, int) else input_size
    model = zoo.create(model, num_classes) if isinstance(model, str) else model
    C_T = model.channels if channels is None else channels
    network, limits = _budget_of(
        model, num_classes, size, budget, round_to, assistant_share, assistants, C_T, head, stage_channels
    )
    records: dict[str, Any] = {}
    if fraction is not None:
        limits, record = _narrowed(limits, network, model, fraction, stopwatch)
        records |= {} if record is None else {"given": record}
    level, shared = FUSION_LEVELS[layout or "branches"], 0
    if layout == "trunk":
        shared = _shared_stages(network, shared_stages)
    student, assistant = _cut(limits, network, layout, shared)
    if stopwatch is not None:  # what S0's MACs have no room for, its latency has none for either
        s0 = model if fraction is None else network.rebuilt(limits.full, num_classes)
        fastest = _Fastest(limits, network, C_T, head, s0, stopwatch, shared).run(layout)
        (student, assistant), level = fastest.widths, fastest.record["level"]
        records["fused"] = fastest.record
    parts = limits.account(student, assistant, shared_stages=shared)
    separation = Separation(
        student=network.rebuilt(student, None),
        assistants=tuple(network.rebuilt(assistant, None) for _ in range(assistants)),
        s0_widths=limits.full,
        cost=sum(parts.values()),
        budget=limits.limit,
        unit=limits.unit,
        level=level,
        parts=parts,
        shared_stages=shared,
        latency=records or None,
    )
    if weights == "inherited":
        inherit_weights([separation.student, *separation.assistants], model, size, shared)
    return separation


def _cut(limits: WidthBudget, network: Staged, layout: str | None, shared: int) -> tuple[Widths, Widths]:
    """Widths of S and A in a layout; where there are none, the error names settings that do."""

    def cut(limits: WidthBudget) -> tuple[Widths, Widths]:
        if layout == "side_by_side":
            return limits.side_by_side(1.0)
        if layout == "trunk":
            return limits.parted(limits.limit, shared, network.widths_before(shared))
        return limits.split(limits.limit)

    try:
        return cut(limits)
    except BudgetError as error:
        raise BudgetError(f"{error} {way_out(limits, network.steps, cut)}") from error


def _shared_stages(network: Staged, shared_stages: int | None) -> int:
    """j: what was asked for, or all stages but the last."""
    stages = len(network.stages())
    shared = stages - 1 if shared_stages is None else shared_stages
    check_parting(shared, stages, type(network).__name__)
    return shared


def narrow(
    model: FeatureNetwork,
    fraction: float,
    *,
    num_classes: int,
    input_size: tuple[int, int],
    budget: str = "macs",
    round_to: int = 8,
    stopwatch: Stopwatch | None = None,
) -> Widths:
    """Widths at which a model costs a fraction of its full cost; arguments and errors as for `separate`."""
    _check(budget, None, 1, fraction, "fresh", stopwatch)
    network, limits = _budget_of(model, num_classes, input_size, budget, round_to)
    return _narrowed(limits, network, model, fraction, stopwatch)[0].full


def _check_trunk(layout: str | None, shared_stages: int | None) -> None:
    if layout != "trunk" and shared_stages is not None:
        raise UsageError(f'shared_stages = {shared_stages} is read with layout = "trunk" only. Leave it out.')


def _check(
    budget: str,
    layout: str | None,
    assistants: int,
    fraction: float | None,
    weights: str,
    stopwatch: Stopwatch | None,
) -> None:
    if assistants < 1:
        raise UsageError(f"assistants = {assistants} must be at least 1: without one, train S0 alone.")
    if budget not in BUDGETS:
        raise UsageError(unknown_name("budget", budget, BUDGETS))
    if layout is not None and layout not in LAYOUTS:
        raise UsageError(unknown_name("layout", layout, LAYOUTS))
    if weights not in ("fresh", "inherited"):
        raise UsageError(unknown_name("weights", weights, ("fresh", "inherited")))
    if fraction is not None and not 0 < fraction <= 1:
        raise UsageError(f"fraction = {fraction} must lie above 0 and not above 1.")
    if (budget == "latency") != (stopwatch is not None):
        raise UsageError(
            f'budget = {budget!r} and a stopwatch {"is" if stopwatch else "is not"} given; the budget "latency" needs '
            "one and no other budget does: pass stopwatch=rkd_deploy.export.stopwatch.ExportStopwatch(...)."
        )


def _budget_of(
    model: FeatureNetwork,
    num_classes: int,
    size: tuple[int, int],
    budget: str,
    round_to: int,
    share: float = 0.0,
    assistants: int = 1,
    channels: int | None = None,
    head: nn.Module | None = None,
    stage_channels: Sequence[int] | None = None,
) -> tuple[Staged, WidthBudget]:
    """The network of a model that can be built at other widths, and the budget of an S0 that is this model."""
    network, unit = narrowable(model, size), "macs" if budget == "latency" else budget
    channels = model.channels if channels is None else channels
    costs = CostModel(network, num_classes, size, unit, channels, head, stage_channels)
    if isinstance(model, Staged):
        limit = costs.network(network.widths, num_classes)
    else:  # with the model's head, which may cost more than a linear layer: that of a VGG more than all the rest
        cost = count(model, size)
        limit = cost.macs if unit == "macs" else cost.parameters
    steps = network.steps(round_to)
    return network, WidthBudget(costs, num_classes, unit, network.widths, steps, limit, share, assistants)


def _narrowed(
    limits: WidthBudget, network: Staged, model: FeatureNetwork, fraction: float, stopwatch: Stopwatch | None
) -> tuple[WidthBudget, dict[str, Any] | None]:
    """The budget of an S0 that is the model at a fraction of its cost or latency, and the measurements for that."""
    if stopwatch is None:
        return limits.narrowed_to(limits.s0_within(fraction)), None

    def candidate(part: float) -> Candidate:
        widths = limits.s0_within(part)
        return Candidate((widths,), lambda: network.rebuilt(widths, limits.num_classes))

    fitting = fastest_fitting(candidate, stopwatch, model, fraction)
    return limits.narrowed_to(fitting.widths[0]), fitting.record


@dataclass(frozen=True)
class _Fastest:
    """The search for the widest S and A that are no slower than S0.

    Attributes:
        limits: The budget of MACs along which candidates are numbered.
        network: A network of S0's topology, of which candidates are built.
        channels: C_T.
        head: h; None: a linear layer.
        s0: The network that candidates are timed against.
        stopwatch: Measures latencies.
        shared_stages: j, for layout trunk.
    """

    limits: WidthBudget
    network: Staged
    channels: int
    head: nn.Module | None
    s0: nn.Module
    stopwatch: Stopwatch
    shared_stages: int = 0

    def run(self, layout: str | None) -> Fitting:
        """Search in one layout, or in both for the one that leaves S and A more.

        Two branches cost little more than their MACs where layers are large; layers side by side are no more than S0
        has, each no larger. Which is faster depends on the machine, so both are measured; so are both kinds of ends
        behind a trunk.
        """
        deadline = time.monotonic() + MAX_SECONDS
        ways = [(name, FUSION_LEVELS[name]) for name in (_MEASURED if layout is None else (layout,))]
        if layout == "trunk":
            ways = [("trunk", "wide"), ("trunk", "tail")]
        fittings: dict[str, Fitting] = {}
        refused: dict[str, str] = {}
        cost = 0
        for name, level in ways:
            try:
                # Only what is wider than the first layout's result is of any use: the second search starts above it.
                fittings[level] = fastest_fitting(
                    self._candidates(name, level),
                    self.stopwatch,
                    self.s0,
                    1.0,
                    above=cost / self.limits.limit,
                    deadline=deadline,
                )
                account = self.limits.account(*fittings[level].widths, shared_stages=self.shared_stages)
                cost = sum(account.values())
            except (BudgetError, UsageError) as error:
                refused[level] = str(error)
                if (name, level) == ways[-1] and not fittings:
                    raise
        level, best = list(fittings.items())[-1]  # a second one is there only where it is wider than the first
        return Fitting(
            best.widths,
            {
                **best.record,
                "level": level,
                "assistant_is_narrowest": best.widths[1] == self.limits.narrowest,
                "other_levels": {name: fitting.record for name, fitting in fittings.items() if name != level},
                "refused": refused,
            },
        )

    def _candidates(self, layout: str, level: str) -> Callable[[float], Candidate]:
        limits, trunk = self.limits, self.network.widths_before(self.shared_stages) if layout == "trunk" else ()

        def candidate(fraction: float) -> Candidate:
            if layout == "side_by_side":
                widths = limits.side_by_side(fraction)
            elif layout == "trunk" and level == "wide":
                widths = limits.side_by_side_behind(fraction, trunk, self.shared_stages)
            elif layout == "trunk":
                widths = limits.parted(int(fraction * limits.limit), self.shared_stages, trunk)
            else:
                widths = limits.split(int(fraction * limits.limit))
            return Candidate(widths, lambda: self._fused(*widths), level)

        return candidate

    def _fused(self, student: Widths, assistant: Widths) -> ResidualStudent:
        S = self.network.rebuilt(student, None)
        As = [self.network.rebuilt(assistant, None) for _ in range(self.limits.assistants)]
        head, classes = copy.deepcopy(self.head), self.limits.num_classes
        if self.shared_stages:
            return parted(S, As, self.shared_stages, self.channels, classes, head)
        return ResidualStudent(S, As, self.channels, classes, head)
