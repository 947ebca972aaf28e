"""What would make room for S and A where a budget is too small: settings that were tried and fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

from rkd_deploy.errors import BudgetError
from rkd_deploy.models.separation.widths import WidthBudget
from rkd_deploy.models.staged import Widths

_FINER = (4, 2, 1)
"""Steps of the widths that are tried: coarse ones first, because odd widths are slow."""
_SHARES = (0.25, 0.3, 0.4, 0.5)
"""Shares that are tried where the least that could do does not: on a trunk it is another number."""


def way_out(limits: WidthBudget, steps: Callable[[int], Widths], cut: Callable[[WidthBudget], object]) -> str:
    """A sentence that names settings under which S and A fit: each was tried.

    Args:
        limits: The budget in which they do not.
        steps: Steps of the widths by `round_to`.
        cut: Finds the widths of S and A within a budget; raises BudgetError where there are none.
    """
    fewer = "student.assistants" if limits.assistants > 1 else ""
    share = next((share for share in _shares(limits) if _fits(limits, share, cut)), None)
    finer = ""
    for round_to in _FINER:
        stepped = replace(limits, steps=steps(round_to))
        if stepped.steps == limits.steps:
            continue
        wanted = next((share for share in (limits.share, *_shares(stepped)) if _fits(stepped, share, cut)), None)
        if wanted is not None:
            beside = "" if wanted == limits.share else f" with student.assistant_share = {wanted:g}"
            finer = f"student.round_to to {round_to}{beside}"
            break
    settings = []
    if lower := " or ".join(filter(None, (finer, fewer))):
        settings.append(f"lower {lower}")
    if share is not None:
        settings.append(f"set student.assistant_share = {share:g}")
    if not settings:
        return "No student.assistant_share and no student.round_to makes room: give a larger S0."
    sentence = ", ".join([*settings, "or give a larger S0."])
    return sentence[0].upper() + sentence[1:]


def _shares(limits: WidthBudget) -> Iterator[float]:
    """Shares that might do, the likeliest first: the least for the narrowest assistants, the most that leaves an S."""
    branch, limit = limits.assistants * limits.costs.branch(limits.narrowest), limits.limit
    most = 1 - (limits.costs.student(limits.narrowest)) / limit
    for digits in (100, 1000):
        least = math.ceil(digits * branch / limit) / digits
        likely = least if limits.share < least else math.floor(digits * most) / digits
        if 0 < likely < 1:
            yield likely
    yield from _SHARES


def _fits(limits: WidthBudget, share: float, cut: Callable[[WidthBudget], object]) -> bool:
    try:
        cut(replace(limits, share=share))
    except BudgetError:
        return False
    return True
