"""Shows the state of the machine around a bench, and its pace beside it, as lines."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rkd_deploy.bench.machine import MachineState
from rkd_deploy.bench.results import Result

_NOTICED = 1.1
"""Ratio of two paces from which it is shown: a quiet machine's own turbo stays below that."""


def condition_lines(before: MachineState, after: MachineState) -> list[str]:
    """The machine before and after a bench, a line for the processor and one for each GPU.

    Args:
        before: The state before the first measurement.
        after: The state after the last one. What changed is shown as "from to", what is unknown is left out.
    """

    def text(key: str, form: Callable[[Any], str]) -> str:
        first, last = ("" if getattr(state, key) is None else form(getattr(state, key)) for state in (before, after))
        return first if first == last else f"{first or '?'} to {last or '?'}"

    facts = {
        "clock": text("clock_mhz", lambda mhz: _span(mhz, "MHz")),
        "allowed": text("clock_limits_mhz", lambda mhz: _span(mhz, "MHz")),
        "governor": text("governor", str),
        "turbo": text("turbo", lambda on: "on" if on else "off"),
        "power limit": text("power_limit_w", lambda watts: f"{watts:g} W"),
        "temperature": text("temperature_c", lambda degrees: f"{degrees:g} C"),
        "quota": text("quota_cores", lambda cores: f"{cores:g} cores"),
        "load": text("load_1min", lambda load: f"{load:g}"),
        "stolen": _grown(before, after, "steal_s", " s"),
        "preempted": _grown(before, after, "preempted", " times"),
    }
    lines = ["CPU: " + ", ".join(f"{name} {value}" for name, value in facts.items() if value)]
    pairs = zip(before.gpus or (), after.gpus or (), strict=False)
    for index, (first, last) in enumerate(pairs):
        changes = {
            key: first[key] if first[key] == last.get(key) else f"{first[key]} to {last.get(key)}" for key in first
        }
        name = changes.pop("name", "")
        lines.append(f"GPU {index} {name}: " + ", ".join(f"{key} {value}" for key, value in changes.items()))
    return lines


def _grown(before: MachineState, after: MachineState, key: str, unit: str) -> str:
    first, last = getattr(before, key), getattr(after, key)
    return "" if first is None or last is None else f"{last - first:g}{unit}"


def _span(ends: tuple[float, float], unit: str) -> str:
    low, high = ends
    return f"{low:.0f} {unit}" if round(low) == round(high) else f"{low:.0f}-{high:.0f} {unit}"


def pace_lines(results: Sequence[Result]) -> list[str]:
    """A sentence where the machine's own pace differed between the measurements of a bench; else nothing.

    Paces of other numbers of threads are other work: they are compared within each alone.
    """
    groups: dict[tuple[int | None, int], list[float]] = {}
    for result in results:
        groups.setdefault((result.threads, result.streams), []).extend(_paces(result))
    ratio = max((max(paces) / min(paces) for paces in groups.values() if paces), default=1.0)
    if ratio < _NOTICED:
        return []
    return [
        f"The machine itself was up to {ratio:.2f} times slower beside some of these measurements than beside others: "
        "something else ran on its cores. No figure allows for that; to tell two models apart, use bench-compare."
    ]


def _paces(result: Result) -> Iterable[float]:
    return (figures.pace_ms for figures in (result, result.device_only) if figures is not None and figures.pace_ms)
