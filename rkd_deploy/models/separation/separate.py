"""Widths of S, of its assistants and of S0 within a budget; `separation.py` has the equations and the public names."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from rkd_deploy.errors import BudgetError, UsageError, unknown_name
from rkd_deploy.models import zoo
from rkd_deploy.models.cost import count
from rkd_deploy.models.residual import ResidualStudent
from rkd_deploy.models.separation.latency import MAX_SECONDS, Candidate, Fitting, Stopwatch, fastest_fitting
from rkd_deploy.models.separation.pruning import inherit_weights, narrowable
from rkd_deploy.models.separation.widths import Prices, Widths, widest
from rkd_deploy.models.staged import FeatureNetwork, Staged
from rkd_deploy.models.trunk import check_parting, trunk_widths

LEVELS = {"side_by_side": "wide", "branches": "tail", "trunk": "tail"}
"""Of fusion (`rkd_deploy.export.fusion`), by how S and A lie to each other."""
_MEASURED = ("side_by_side", "branches")
"""Layouts that a latency budget chooses from."""


class Cut:
    """What is cut from one model, and within which budget."""

    share: float
    assistants: int
    shared_stages: int = 0

    def __init__(
        self,
        given: FeatureNetwork,
        size: tuple[int, int],
        budget: str,
        classes: int,
        channels: int,
        round_to: int,
        head: nn.Module | None = None,
        stage_channels: Sequence[int] | None = None,
    ) -> None:
        self.network = narrowable(given, size)
        self.unit = "macs" if budget == "latency" else budget
        self.full, self.steps = self.network.widths, self.network.steps(round_to)
        self._classes, self._channels, self._head = classes, channels, head
        self.prices = Prices(self.network, classes, size, self.unit, channels, head, stage_channels)
        if isinstance(given, Staged):
            self.limit = self.prices.network(self.full, classes)
        else:  # with its own head, which may cost more than a linear layer: that of a VGG more than all the rest
            own = count(given, size)
            self.limit = own.macs if self.unit == "macs" else own.parameters

    def narrow_given(self, model: FeatureNetwork, fraction: float, stopwatch: Stopwatch | None) -> dict[str, Any]:
        """Let S0 be the model at a fraction of its cost; gives what was measured for that."""
        record: dict[str, Any] = {}
        if stopwatch is None:
            widths = self.given_within(fraction)
        else:
            found = fastest_fitting(self.given_candidate, stopwatch, model, fraction)
            [widths], record = found.widths, {"given": found.record}
        self.full, self.limit = widths, self.prices.network(widths, self._classes)
        return record

    def given_within(self, fraction: float) -> Widths:
        """The widest S0 that costs at most a fraction of the model."""
        found = widest(self._price_given, self.full, int(fraction * self.limit), self.steps)
        if found is None:
            narrowest = tuple(map(min, self.full, self.steps))
            raise BudgetError(
                f"The model costs {self.limit:,} {self.unit}, and fraction = {fraction} of it is "
                f"{int(fraction * self.limit):,}; at the narrowest widths it costs {self._price_given(narrowest):,}. "
                "Raise student.fraction, or lower student.round_to."
            )
        return found

    def within(self, layout: str) -> tuple[Widths, Widths]:
        """The widest S and A that cost no more than S0, as two branches, side by side, or on a trunk."""
        if layout == "side_by_side":
            student, assistant = self.side_by_side(1.0).widths
            return student, assistant
        return self.parted() if layout == "trunk" else self.split(self.limit)

    def parted(self) -> tuple[Widths, Widths]:
        """The widest S and A on one trunk that together cost no more than S0.

        A's end gets the widths that its share pays for behind a trunk as wide as S0's; then trunk and S get what is
        left, A's end priced behind that trunk, which is no wider: so it keeps its share.
        """
        shared = trunk_widths(self.network, self.shared_stages)
        ends = [index for index in range(len(self.full)) if index not in shared]

        def behind(trunk: Widths, end: Sequence[int]) -> Widths:
            widths = list(trunk)
            for index, width in zip(ends, end, strict=True):
                widths[index] = width
            return tuple(widths)

        def price_end(widths: Widths) -> int:
            return self._price_branch(widths) - self.prices.trunk(widths, self.shared_stages)

        full, steps = (tuple(values[index] for index in ends) for values in (self.full, self.steps))
        allowed = int(self.share / self.assistants * self.limit)
        end = widest(lambda own: price_end(behind(self.full, own)), full, allowed, steps)
        if end is None:
            narrowest = price_end(behind(self.full, tuple(map(min, full, steps))))
            raise BudgetError(
                f"The budget is too small for the assistant's end behind the trunk: S0 costs {self.limit:,}, of which "
                f"assistant_share = {self.share} gives {allowed:,} to each of {self.assistants}, and the narrowest end "
                f"(steps of {_few(tuple(dict.fromkeys(steps)))}) costs {narrowest:,}. Raise student.assistant_share, "
                "share more stages (student.shared_stages), or lower student.round_to."
            )
        student = widest(
            lambda own: self._price_student(own) + self.assistants * price_end(behind(own, end)),
            self.full,
            self.limit,
            self.steps,
        )
        if student is None:
            raise self._too_small(self.limit, "the trunk and the student with what the assistant left")
        return student, behind(student, end)

    def split(self, limit: int) -> tuple[Widths, Widths]:
        """The widest S and A within a limit.

        Where that is less than S0 costs, because latency asks for it, the narrowest A may take more than its share of
        the limit, and no more than its share of S0: the limit alone leaves nothing that could be narrower.
        """
        assistant = self._assistant(limit, self.full)
        rest = limit - self.assistants * self._price_branch(assistant)
        student = widest(self._price_student, self.full, rest, self.steps)
        if student is None:
            raise self._too_small(limit, "the student with what the assistant left")
        return student, assistant

    def _assistant(self, limit: int, room: Widths) -> Widths:
        share = self.share / self.assistants
        narrowest = self._price_branch(tuple(map(min, self.full, self.steps)))
        allowed = max(int(share * limit), min(narrowest, int(share * self.limit)))
        assistant = widest(self._price_branch, room, allowed, self.steps)
        if assistant is None:
            raise self._too_small(limit, "the assistant alone")
        return assistant

    def given_candidate(self, fraction: float) -> Candidate:
        """The model at a fraction of its MACs."""
        widths = self.given_within(fraction)
        return Candidate((widths,), lambda: self.network.rebuilt(widths, self._classes))

    def fastest(
        self, S0: nn.Module, stopwatch: Stopwatch, layout: str | None = None
    ) -> tuple[Widths, Widths, dict[str, Any]]:
        """The widest S and A no slower than S0, and what was measured.

        Of the two ways that there are: two branches, which cost little more than their MACs where layers are large, and
        layers side by side, of which there are no more than S0 has, each no larger. A given layout leaves one of them.
        """
        deadline = time.monotonic() + MAX_SECONDS
        layouts = {name: LEVELS[name] for name in (_MEASURED if layout is None else (layout,))}
        ways = {level: getattr(self, name) for name, level in layouts.items()}
        found: dict[str, Fitting] = {}
        refused: dict[str, str] = {}
        cost = 0
        for level, way in ways.items():
            try:
                fitting = fastest_fitting(way, stopwatch, S0, 1.0, above=cost / self.limit, deadline=deadline)
            except (BudgetError, UsageError) as error:
                refused[level] = str(error)
                if level == list(ways)[-1] and not found:
                    raise
            else:
                found[level], cost = fitting, sum(self.parts(*fitting.widths).values())
        level, best = list(found.items())[-1]  # the latter is wider, or not found
        others = {name: fitting.record for name, fitting in found.items() if name != level}
        narrowest = best.widths[1] == tuple(map(min, self.full, self.steps))
        record = {**best.record, "level": level, "assistant_is_narrowest": narrowest}
        student, assistant = best.widths
        return student, assistant, record | {"other_levels": others, "refused": refused}

    def branches(self, fraction: float) -> Candidate:
        """S and A that cost at most a fraction of the MACs of S0, as two branches."""
        return self._candidate(*self.split(int(fraction * self.limit)), "tail")

    def side_by_side(self, fraction: float) -> Candidate:
        """S and A whose layers, side by side, are as wide as those of an S0 of a fraction of its MACs.

        Merged into one they then take as long as that S0, zeros included. A has its share of that fraction, and is
        nowhere wider than S. Where S0 has no room even for the narrowest of each, they are wider than it.
        """
        merged = self.given_within(fraction)
        limit = self.prices.network(merged, self._classes)
        narrowest = tuple(map(min, self.full, self.steps))
        room = tuple(
            max(low, width // (self.assistants + 1) // step * step)
            for low, width, step in zip(narrowest, merged, self.steps, strict=True)
        )
        assistant = self._assistant(limit, room)
        rest = tuple(
            max(low, (width - self.assistants * own) // step * step)
            for low, width, own, step in zip(narrowest, merged, assistant, self.steps, strict=True)
        )
        student = widest(
            self._price_student, rest, self.limit - self.assistants * self._price_branch(assistant), self.steps
        )
        if student is None:
            raise self._too_small(limit, "the student with what the assistant left")
        return self._candidate(student, assistant, "wide")

    def _candidate(self, student: Widths, assistant: Widths, level: str) -> Candidate:
        return Candidate(
            (student, assistant),
            lambda: ResidualStudent(
                self.network.rebuilt(student, None),
                [self.network.rebuilt(assistant, None) for _ in range(self.assistants)],
                self._channels,
                self._classes,
                copy.deepcopy(self._head),
            ),
            level,
        )

    def parts(self, student: Widths, assistant: Widths) -> dict[str, int]:
        """The account."""
        prices, k = self.prices, self.assistants
        trunk = prices.trunk(assistant, self.shared_stages) if self.shared_stages else 0
        return {
            "student": prices.network(student, None),
            "assistant": k * (prices.network(assistant, None) - trunk),
            "student_adapter": prices.adapter(student),
            "assistant_adapter": k * prices.adapter(assistant),
            "head": prices.head,
        }

    def _price_given(self, widths: Widths) -> int:
        return self.prices.network(widths, self._classes)

    def _price_branch(self, widths: Widths) -> int:
        return self.prices.network(widths, None) + self.prices.adapter(widths)

    def _price_student(self, widths: Widths) -> int:
        return self._price_branch(widths) + self.prices.head

    def _too_small(self, limit: int, what: str) -> BudgetError:
        narrowest = tuple(map(min, self.full, self.steps))
        branch = self._price_branch(narrowest)
        k = self.assistants
        return BudgetError(
            f"The budget is too small for {what}: S0 costs {limit:,}, of which assistant_share = {self.share} "
            f"gives {'the assistant' if k == 1 else f'each of {k} assistants'} {int(self.share * limit / k):,}; "
            f"at the narrowest widths {_few(narrowest)} (steps of {_few(tuple(dict.fromkeys(self.steps)))}) an "
            f"assistant costs {branch:,} and a student with the head {branch + self.prices.head:,}. "
            f"Lower student.round_to{' or student.assistants' if k > 1 else ''}, change student.assistant_share, "
            "or give a larger S0."
        )


def _few(numbers: Widths) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    return f"({', '.join(map(str, numbers[:9]))}{', ...' if len(numbers) > 9 else ''})"


BUDGETS = ("macs", "params", "latency")
LAYOUTS = tuple(LEVELS)


@dataclass(frozen=True, kw_only=True)
class Separation:
    """S and its assistants, and the account of their cost.

    Attributes:
        student: S, without a head.
        assistants: A_1 .. A_k, all of the same widths, without a head.
        given_widths: Those of S0; where it is a model's fraction, what it was narrowed to.
        cost: F(S) + F(P_S) + k (F(A) + F(P_A)) + F(h), in the budget's unit.
        budget: F(S0), never exceeded by `cost`.
        unit: ``"macs"`` or ``"params"``; MACs where the budget is latency.
        level: Of fusion, that they were cut for.
        parts: Cost of student, assistant, student_adapter, assistant_adapter and head; those of the assistants are of
            all k together.
        shared_stages: j, first stages that are there once, as S's; 0 where S and A share none. The assistants' first
            stages are then of the same widths, and are left out by `rkd_deploy.models.trunk.parted`.
        latency: Where the budget is latency, everything that was measured, and whether A is the narrowest there is: it
            may then take more than its share of what S and A cost.
    """

    student: Staged
    assistants: tuple[Staged, ...]
    given_widths: Widths
    cost: int
    budget: int
    unit: str
    level: str
    parts: dict[str, int]
    shared_stages: int = 0
    latency: dict[str, Any] | None = None

    @property
    def assistant(self) -> Staged:
        """A_1, the only one where k = 1."""
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
        model: S0: any convolutional classifier (`External`), one of a built-in family, or a name
            (`rkd_deploy.models.zoo`).
        num_classes: K, of the head.
        input_size: Height and width of the images in pixels, or one number for both.
        budget: What must not exceed S0's: ``"macs"``, ``"params"``, or ``"latency"``, which `stopwatch` measures.
        layout: ``"branches"``; ``"side_by_side"``: widths of S and A add up to those of S0; ``"trunk"``: they share the
            first `shared_stages` stages. Default: branches; where the budget is latency, whichever of the first two
            leaves them more.
        shared_stages: j, for layout trunk. Default: all but the last.
        assistant_share: rho, the share of the budget that all assistants and their adapters may take; of the MACs where
            the budget is latency, and of S0's own where the narrowest assistant takes more of a faster S + A.
        assistants: k, how many of them share it equally.
        round_to: Every width that is narrowed becomes a multiple of this and of what the network asks for itself
            (`Staged.steps`); no width falls below one such step, and one that is smaller in S0 keeps its size.
        channels: C_T, the channels that the adapters lead to. Default: those of the model's last map.
        fraction: S0 is not the model itself but the model narrowed to this fraction of its cost.
        weights: ``"fresh"``, or ``"inherited"``: S and the assistants begin with weights of the model.
        stopwatch: Measures, where the budget is latency: `rkd_deploy.export.latency.ExportStopwatch`.
        head: h, from C_T channels. Default: a linear layer.
        stage_channels: C_T of every stage, where S and A exchange their maps at each (scheme progressive): P_S and P_A
            then stand for all the adapters of `rkd_deploy.models.progressive`, and `channels` is the last of these.

    Raises:
        BudgetError: Even the narrowest S and A cost more than S0; the message has the numbers.
        UsageError: Unknown name or unit, no assistant, or a model that cannot be narrowed; the message names the
            module and the operator.
    """
    _check(budget, layout, assistants, fraction, weights, stopwatch)
    _check_trunk(budget, layout, shared_stages, weights)
    size = (input_size, input_size) if isinstance(input_size, int) else input_size
    given = zoo.create(model, num_classes) if isinstance(model, str) else model
    C_T = given.channels if channels is None else channels
    cut = Cut(given, size, budget, num_classes, C_T, round_to, head, stage_channels)
    cut.share, cut.assistants = assistant_share, assistants
    if layout == "trunk":
        stages = len(cut.network.stages())
        cut.shared_stages = stages - 1 if shared_stages is None else shared_stages
        check_parting(cut.shared_stages, stages, type(cut.network).__name__)
    records: dict[str, Any] = {}
    if fraction is not None:
        records |= cut.narrow_given(given, fraction, stopwatch)
    if stopwatch is None:
        layout = layout or "branches"
        student, assistant, level = *cut.within(layout), LEVELS[layout]
    else:
        S0 = given if fraction is None else cut.network.rebuilt(cut.full, num_classes)
        student, assistant, records["fused"] = cut.fastest(S0, stopwatch, layout)
        level = records["fused"]["level"]
    parts = cut.parts(student, assistant)
    made = Separation(
        student=cut.network.rebuilt(student, None),
        assistants=tuple(cut.network.rebuilt(assistant, None) for _ in range(assistants)),
        given_widths=cut.full,
        cost=sum(parts.values()),
        budget=cut.limit,
        unit=cut.unit,
        level=level,
        parts=parts,
        shared_stages=cut.shared_stages,
        latency=records or None,
    )
    if weights == "inherited":
        inherit_weights([made.student, *made.assistants], given, size)
    return made


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
    """The widths at which a model costs a fraction of what it costs; arguments and errors as for `separate`."""
    _check(budget, None, 1, fraction, "fresh", stopwatch)
    cut = Cut(model, input_size, budget, num_classes, model.channels, round_to)
    cut.narrow_given(model, fraction, stopwatch)
    return cut.full


def _check_trunk(budget: str, layout: str | None, shared_stages: int | None, weights: str) -> None:
    if layout != "trunk":
        if shared_stages is not None:
            raise UsageError(f'shared_stages = {shared_stages} is read with layout = "trunk" only. Leave it out.')
        return
    if budget == "latency":
        raise UsageError('layout = "trunk" has no search by latency yet: set budget = "macs" or "params".')
    if weights == "inherited":
        raise UsageError(
            'layout = "trunk" begins with fresh weights: an assistant inherits the channels behind S\'s, and on a '
            'trunk it has S\'s own. Set weights = "fresh".'
        )


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
            "one and no other budget does: pass stopwatch=rkd_deploy.export.latency.ExportStopwatch(...)."
        )
