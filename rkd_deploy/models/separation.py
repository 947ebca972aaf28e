"""From one given model S0 to a student S and k assistants A that together cost no more than it.

With F the cost (MACs or parameters), w the widths, P_S and P_A the adapters to the teacher's channels C_T, h the head
and rho the assistants' share, of which each of the k gets the same part:

    w_A:  the widest with  F(A) + F(P_A)        <= rho F(S0) / k
    w_S:  the widest with  F(S) + F(P_S) + F(h) <= F(S0) - k (F(A) + F(P_A))

"Widest" is a search over multiples of r, the least common multiple of `round_to` and what the family's widths must be
multiples of (`Staged.multiple_of`), in two steps: the largest multiplier m whose widths max(r, floor(m w_0 / r) r) fit,
then stage by stage one more step where it still fits, the relatively narrowest stage first. So no stage of the result
can be widened any further, and no width exceeds S0's. Depth is kept.
The paper's own separation formula is not public; this is the project's (method.md 1.4).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from rkd_deploy.errors import BudgetError, UsageError, unknown_name
from rkd_deploy.models import zoo
from rkd_deploy.models.cost import count, count_head
from rkd_deploy.models.staged import Staged

Widths = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Separation:
    """S and its assistants with fresh weights, and the account of their cost.

    Attributes:
        student: S, without a head.
        assistants: A_1 .. A_k, all of the same widths, without a head.
        cost: F(S) + F(P_S) + k (F(A) + F(P_A)) + F(h), in the budget's unit.
        budget: F(S0), never exceeded by `cost`.
        unit: ``"macs"`` or ``"params"``.
        parts: Cost of student, assistant, student_adapter, assistant_adapter and head; those of the assistants are of
            all k together.
    """

    student: Staged
    assistants: tuple[Staged, ...]
    cost: int
    budget: int
    unit: str
    parts: dict[str, int]

    @property
    def assistant(self) -> Staged:
        """A_1, the only one where k = 1."""
        return self.assistants[0]


def separate(
    model: Staged | str,
    *,
    num_classes: int,
    input_size: int | tuple[int, int],
    budget: str = "macs",
    assistant_share: float = 0.2,
    assistants: int = 1,
    round_to: int = 8,
    channels: int | None = None,
    head: nn.Module | None = None,
) -> Separation:
    """Cut S and A from the cost of S0.

    Args:
        model: S0, or its name (`rkd_deploy.models.zoo.names`).
        num_classes: K, of the head.
        input_size: Height and width of the images in pixels, or one number for both.
        budget: What must not exceed S0's: ``"macs"`` or ``"params"``.
        assistant_share: rho, the share of the budget that all assistants and their adapters may take.
        assistants: k, how many of them share it equally.
        round_to: Every width is a multiple of this (or S0's own width, where that is smaller), and of what the family
            asks for: `Staged.multiple_of`.
        channels: C_T, the channels that the adapters lead to. Default: those of S0's last map.
        head: h, from C_T channels. Default: a linear layer.

    Raises:
        BudgetError: Even the narrowest S and A cost more than S0; the message has the numbers.
        UsageError: Unknown name or unit, or no assistant.
    """
    if assistants < 1:
        raise UsageError(f"assistants = {assistants} must be at least 1: without one, train S0 alone.")
    given = zoo.create(model, num_classes) if isinstance(model, str) else model
    if budget not in ("macs", "params"):
        raise UsageError(unknown_name("budget", budget, ("macs", "params")))
    if not isinstance(given, Staged):
        raise UsageError(f"{model!r} is no network of a family: S and A cannot be cut from it by widths.")
    C_T = given.channels if channels is None else channels
    prices = _Prices(given, num_classes, input_size, budget, C_T, head)
    limit = prices.network(given.widths, num_classes)
    step = math.lcm(round_to, given.multiple_of)

    assistant_widths = widest(
        lambda widths: prices.network(widths, None) + prices.adapter(widths),
        given.widths,
        int(assistant_share * limit / assistants),
        step,
    )
    too_small = functools.partial(_too_small, prices, given, limit, assistant_share, assistants, step)
    if assistant_widths is None:
        raise too_small("the assistant alone")
    rest = limit - assistants * (prices.network(assistant_widths, None) + prices.adapter(assistant_widths))
    student_widths = widest(
        lambda widths: prices.network(widths, None) + prices.adapter(widths) + prices.head,
        given.widths,
        rest,
        step,
    )
    if student_widths is None:
        raise too_small("the student with what the assistant left")

    parts = {
        "student": prices.network(student_widths, None),
        "assistant": assistants * prices.network(assistant_widths, None),
        "student_adapter": prices.adapter(student_widths),
        "assistant_adapter": assistants * prices.adapter(assistant_widths),
        "head": prices.head,
    }
    return Separation(
        student=given.rebuilt(student_widths, None),
        assistants=tuple(given.rebuilt(assistant_widths, None) for _ in range(assistants)),
        cost=sum(parts.values()),
        budget=limit,
        unit=budget,
        parts=parts,
    )


def widest(price: Callable[[Widths], int], full: Widths, limit: int, round_to: int) -> Widths | None:
    """The widest widths whose price is within the limit (the search of this module's docstring).

    Args:
        price: Cost of a network of these widths; rises with every width.
        full: S0's widths, the upper bound.
        limit: What the price must not exceed.
        round_to: Step of every width.

    Returns:
        The widths, or None when even the narrowest are too dear.
    """

    def scaled(numerator: int) -> Widths:
        return tuple(min(width, max(round_to, numerator * width // (1024 * round_to) * round_to)) for width in full)

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
            step = min(full[stage], widths[stage] + round_to)
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
        input_size: int | tuple[int, int],
        unit: str,
        channels: int,
        head: nn.Module | None,
    ) -> None:
        self._given, self._input_size, self._unit, self._channels = given, input_size, unit, channels
        self._known: dict[tuple[Widths, int | None], tuple[int, int]] = {}
        height, width = (input_size, input_size) if isinstance(input_size, int) else input_size
        with torch.device("meta"), torch.no_grad():
            last = given.rebuilt(given.widths, None).eval().features(torch.empty(1, 3, height, width))[-1]
        self._positions = last.shape[-2] * last.shape[-1]
        self.head = num_classes * channels + (num_classes if unit == "params" else 0)
        if head is not None:
            cost = count_head(head, channels)
            self.head = cost.macs if unit == "macs" else cost.parameters

    def network(self, widths: Widths, num_classes: int | None) -> int:
        return self._counted(widths, num_classes)[0]

    def adapter(self, widths: Widths) -> int:
        weights = self._counted(widths, None)[1] * self._channels
        return weights * self._positions if self._unit == "macs" else weights + self._channels

    def _counted(self, widths: Widths, num_classes: int | None) -> tuple[int, int]:
        """The network's cost, and the channels of its last map."""
        key = (widths, num_classes)
        if key not in self._known:
            with torch.device("meta"):
                network = self._given.rebuilt(widths, num_classes)
            cost = count(network, self._input_size)
            self._known[key] = (cost.macs if self._unit == "macs" else cost.parameters, network.channels)
        return self._known[key]


def _too_small(
    prices: _Prices, given: Staged, limit: int, assistant_share: float, assistants: int, step: int, what: str
) -> BudgetError:
    narrowest = tuple(min(width, step) for width in given.widths)
    branch = prices.network(narrowest, None) + prices.adapter(narrowest)
    return BudgetError(
        f"The budget is too small for {what}: S0 costs {limit:,}, of which assistant_share = {assistant_share} "
        f"gives {'the assistant' if assistants == 1 else f'each of {assistants} assistants'} "
        f"{int(assistant_share * limit / assistants):,}; at the narrowest widths {narrowest} "
        f"(steps of {step}) an assistant costs {branch:,} and a student with the head {branch + prices.head:,}. "
        f"Lower student.round_to{' or student.assistants' if assistants > 1 else ''}, change student.assistant_share, "
        "or give a larger S0."
    )
