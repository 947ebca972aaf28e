"""From one given model S0 to a student S and k assistants A that together cost no more than it.

With F the cost (MACs or parameters), w the widths, P_S and P_A the adapters to the teacher's channels C_T, h the head
and rho the assistants' share, of which each of the k gets the same part:

    w_A:  the widest with  F(A) + F(P_A)        <= rho F(S0) / k
    w_S:  the widest with  F(S) + F(P_S) + F(h) <= F(S0) - k (F(A) + F(P_A))

as two branches. Side by side, w_S + k w_A <= w(S0) in every layer besides: level `wide` of fusion then has S0's own
operators and shapes, and its speed on any machine.

"Widest" is the search of `prices.py`. Depth is kept. A network of a built-in family has the few widths of its paper;
any other is pruned, with a width for every layer that has channels of its own (`pruned.py`).
The paper's own separation formula is not public; this is the project's (method.md 1.4).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from rkd_deploy.errors import UsageError, unknown_name
from rkd_deploy.models import zoo
from rkd_deploy.models.cut import LEVELS, Cut
from rkd_deploy.models.latency import Stopwatch
from rkd_deploy.models.pruned import inherit_weights
from rkd_deploy.models.staged import FeatureNetwork, Staged

Widths = tuple[int, ...]

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
        layout: ``"branches"``, or ``"side_by_side"``: widths of S and A add up to those of S0. Default: branches; where
            the budget is latency, whichever leaves them more.
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
    size = (input_size, input_size) if isinstance(input_size, int) else input_size
    given = zoo.create(model, num_classes) if isinstance(model, str) else model
    C_T = given.channels if channels is None else channels
    cut = Cut(given, size, budget, num_classes, C_T, round_to, head, stage_channels)
    cut.share, cut.assistants = assistant_share, assistants
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
