"""From one given model S0 to a student S and k assistants A that together cost no more than it.

With F the cost (MACs or parameters), w the widths, P_S and P_A the adapters to the teacher's channels C_T, h the head
and rho the assistants' share, of which each of the k gets the same part:

    w_A:  the widest with  F(A) + F(P_A)        <= rho F(S0) / k
    w_S:  the widest with  F(S) + F(P_S) + F(h) <= F(S0) - k (F(A) + F(P_A))

"Widest" is a search over multiples of r_i, the least common multiple of `round_to` and what width i must be a multiple
of anyway (`Staged.steps`), in two steps: the largest multiplier m whose widths max(r_i, floor(m w_i / r_i) r_i) fit,
then width by width one more step where it still fits, the relatively narrowest first. So no width of the result can
grow any further, and none exceeds S0's. Depth is kept. A network of a built-in family has the few widths of its paper;
any other is pruned, with a width for every layer that has channels of its own (`pruned.py`).
The paper's own separation formula is not public; this is the project's (method.md 1.4).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rkd_deploy.errors import BudgetError, UsageError, unknown_name
from rkd_deploy.models import zoo
from rkd_deploy.models.cost import count, count_head
from rkd_deploy.models.latency import Candidate, Stopwatch, fastest_fitting
from rkd_deploy.models.progressive import adapter_cost
from rkd_deploy.models.pruned import Pruned, inherit_weights, narrowable
from rkd_deploy.models.residual import ResidualStudent
from rkd_deploy.models.staged import FeatureNetwork, Staged

Widths = tuple[int, ...]

BUDGETS = ("macs", "params", "latency")


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
        parts: Cost of student, assistant, student_adapter, assistant_adapter and head; those of the assistants are of
            all k together.
        latency: Where the budget is latency, everything that was measured, and whether A is the narrowest there is: it
            may then take more than its share of what S and A cost.
    """

    student: Staged
    assistants: tuple[Staged, ...]
    given_widths: Widths
    cost: int
    budget: int
    unit: str
    parts: dict[str, int]
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
    _check(budget, assistants, fraction, weights, stopwatch)
    size = (input_size, input_size) if isinstance(input_size, int) else input_size
    given = zoo.create(model, num_classes) if isinstance(model, str) else model
    C_T = given.channels if channels is None else channels
    cut = _Cut(given, size, budget, num_classes, C_T, round_to, head, stage_channels)
    cut.share, cut.assistants = assistant_share, assistants
    records: dict[str, Any] = {}
    if fraction is not None:
        records |= cut.narrow_given(given, fraction, stopwatch)
    if stopwatch is None:
        student, assistant = cut.split(cut.limit)
    else:
        S0 = given if fraction is None else cut.network.rebuilt(cut.full, num_classes)
        found = fastest_fitting(cut.fused_candidate, stopwatch, S0, 1.0)
        (student, assistant), records["fused"] = found.widths, found.record
        records["fused"]["assistant_is_narrowest"] = assistant == tuple(map(min, cut.full, cut.steps))
    parts = cut.parts(student, assistant)
    made = Separation(
        student=cut.network.rebuilt(student, None),
        assistants=tuple(cut.network.rebuilt(assistant, None) for _ in range(assistants)),
        given_widths=cut.full,
        cost=sum(parts.values()),
        budget=cut.limit,
        unit=cut.unit,
        parts=parts,
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
    _check(budget, 1, fraction, "fresh", stopwatch)
    cut = _Cut(model, input_size, budget, num_classes, model.channels, round_to)
    cut.narrow_given(model, fraction, stopwatch)
    return cut.full


def _check(budget: str, assistants: int, fraction: float | None, weights: str, stopwatch: Stopwatch | None) -> None:
    if assistants < 1:
        raise UsageError(f"assistants = {assistants} must be at least 1: without one, train S0 alone.")
    if budget not in BUDGETS:
        raise UsageError(unknown_name("budget", budget, BUDGETS))
    if weights not in ("fresh", "inherited"):
        raise UsageError(unknown_name("weights", weights, ("fresh", "inherited")))
    if fraction is not None and not 0 < fraction <= 1:
        raise UsageError(f"fraction = {fraction} must lie above 0 and not above 1.")
    if (budget == "latency") != (stopwatch is not None):
        raise UsageError(
            f'budget = {budget!r} and a stopwatch {"is" if stopwatch else "is not"} given; the budget "latency" needs '
            "one and no other budget does: pass stopwatch=rkd_deploy.export.latency.ExportStopwatch(...)."
        )


class _Cut:
    """What is cut from one model, and within which budget."""

    share: float
    assistants: int

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
        self.prices = _Prices(self.network, classes, size, self.unit, channels, head, stage_channels)
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

    def split(self, limit: int) -> tuple[Widths, Widths]:
        """The widest S and A within a limit.

        Where that is less than S0 costs, because latency asks for it, the narrowest A may take more than its share of
        the limit, and no more than its share of S0: the limit alone leaves nothing that could be narrower.
        """
        share = self.share / self.assistants
        narrowest = self._price_branch(tuple(map(min, self.full, self.steps)))
        allowed = max(int(share * limit), min(narrowest, int(share * self.limit)))
        assistant = widest(self._price_branch, self.full, allowed, self.steps)
        if assistant is None:
            raise self._too_small(limit, "the assistant alone")
        rest = limit - self.assistants * self._price_branch(assistant)
        student = widest(self._price_student, self.full, rest, self.steps)
        if student is None:
            raise self._too_small(limit, "the student with what the assistant left")
        return student, assistant

    def given_candidate(self, fraction: float) -> Candidate:
        """The model at a fraction of its MACs."""
        widths = self.given_within(fraction)
        return Candidate((widths,), lambda: self.network.rebuilt(widths, self._classes))

    def fused_candidate(self, fraction: float) -> Candidate:
        """S and A at a fraction of the MACs of S0."""
        student, assistant = self.split(int(fraction * self.limit))
        return Candidate(
            (student, assistant),
            lambda: ResidualStudent(
                self.network.rebuilt(student, None),
                [self.network.rebuilt(assistant, None) for _ in range(self.assistants)],
                self._channels,
                self._classes,
                copy.deepcopy(self._head),
            ),
        )

    def parts(self, student: Widths, assistant: Widths) -> dict[str, int]:
        """The account."""
        prices, k = self.prices, self.assistants
        return {
            "student": prices.network(student, None),
            "assistant": k * prices.network(assistant, None),
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


def widest(price: Callable[[Widths], int], full: Widths, limit: int, round_to: int | Widths) -> Widths | None:
    """The widest widths whose price is within the limit (the search of this module's docstring).

    Args:
        price: Cost of a network of these widths; rises with every width.
        full: S0's widths, the upper bound.
        limit: What the price must not exceed.
        round_to: Step of every width, or that of each.

    Returns:
        The widths, or None when even the narrowest are too dear.
    """
    steps = (round_to,) * len(full) if isinstance(round_to, int) else round_to

    def scaled(numerator: int) -> Widths:
        return tuple(
            min(width, max(step, numerator * width // (1024 * step) * step))
            for width, step in zip(full, steps, strict=True)
        )

    if price(scaled(0)) > limit:
        return None
    low, high = 0, 1025  # multipliers in 1/1024: low fits, high does not (or is above 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if price(scaled(middle)) <= limit else (low, middle)
    widths = scaled(low)
    while True:
        before, stages = widths, set(range(len(full)))
        while stages:
            stage = min(stages, key=lambda index: (widths[index] / full[index], index))
            step = min(full[stage], widths[stage] + steps[stage])
            wider = (*widths[:stage], step, *widths[stage + 1 :])
            if step > widths[stage] and price(wider) <= limit:
                widths = wider
            else:
                stages.remove(stage)  # what does not fit now will not fit among wider stages
        if widths == before:  # every stage has been tried beside the final widths of the others
            return widths


class _Prices:
    """Costs in one unit; networks are built without data and each is counted once."""

    def __init__(
        self,
        given: Staged,
        num_classes: int,
        size: tuple[int, int],
        unit: str,
        channels: int,
        head: nn.Module | None,
        stage_channels: Sequence[int] | None,
    ) -> None:
        self._given, self._size, self._unit, self._channels = given, size, unit, channels
        self._stage_channels = stage_channels
        self._known: dict[tuple[Widths, int | None], tuple[int, int]] = {}
        with torch.no_grad():
            shadow = copy.deepcopy(given).to("meta").eval()
            last = shadow.features(torch.empty(1, 3, *size, device="meta"))[-1]
        self._positions = last.shape[-2] * last.shape[-1]
        self.head = num_classes * channels + (num_classes if unit == "params" else 0)
        if head is not None:
            cost = count_head(head, channels)
            self.head = cost.macs if unit == "macs" else cost.parameters

    def network(self, widths: Widths, num_classes: int | None) -> int:
        return self._counted(widths, num_classes)[0]

    def adapter(self, widths: Widths) -> int:
        if self._stage_channels is not None:
            with torch.device("meta"), torch.no_grad():
                maps = self._given.rebuilt(widths, None).eval().features(torch.empty(1, 3, *self._size))
            shapes = [(one.shape[1], one.shape[2], one.shape[3]) for one in maps]
            return adapter_cost(shapes, self._stage_channels, self._unit)
        weights = self._counted(widths, None)[1] * self._channels
        return weights * self._positions if self._unit == "macs" else weights + self._channels

    def _counted(self, widths: Widths, num_classes: int | None) -> tuple[int, int]:
        """The network's cost, and the channels of its last map."""
        key = (widths, num_classes)
        if key not in self._known:
            self._known[key] = self._pruned(*key) if isinstance(self._given, Pruned) else self._built(*key)
        return self._known[key]

    def _built(self, widths: Widths, num_classes: int | None) -> tuple[int, int]:
        with torch.device("meta"):
            network = self._given.rebuilt(widths, num_classes)
        cost = count(network, self._size)
        return cost.macs if self._unit == "macs" else cost.parameters, network.channels

    def _pruned(self, widths: Widths, num_classes: int | None) -> tuple[int, int]:
        assert isinstance(self._given, Pruned)
        macs, params = self._given.pruner.cost(widths)
        channels = self._given.channels_at(widths)
        head = 0 if num_classes is None else channels * num_classes
        bias = num_classes or 0
        return macs + head if self._unit == "macs" else params + head + bias, channels
