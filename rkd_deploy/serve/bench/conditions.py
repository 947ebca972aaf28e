"""The state of the machine before and after a measurement: what makes two honest tools disagree about one model.

Read from /proc and /sys (Linux), and from nvidia-smi; what a machine does not tell, as virtual ones do not tell
temperatures, is left out.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rkd_deploy.serve.bench.provenance import gpus

_CPU = "sys/devices/system/cpu"


def conditions(root: Path = Path("/")) -> dict[str, Any]:
    """Clocks, governor, power limit, temperature, load and stolen time, for JSON; None where one is not told.

    Args:
        root: Where proc and sys lie.

    Returns:
        ``clock_mhz``: lowest and highest clock of all cores now. ``governor``: of the cores' frequencies.
        ``clock_limits_mhz``: what the governor may choose from. ``turbo``: whether above the nominal clock.
        ``power_limit_w``: of the package (RAPL, long term). ``temperature_c``: of the hottest thermal zone.
        ``quota_cores``: what the container may use. ``load_1min``. ``steal_s``: CPU seconds that the hypervisor gave to
        others since the machine started. ``preempted``: how often this process was taken off a core. ``gpus``: a
        dictionary of nvidia-smi's fields for each.
    """
    return {
        "clock_mhz": _clocks(root),
        "governor": _governor(root),
        "clock_limits_mhz": _limits(root),
        "turbo": _turbo(root),
        "power_limit_w": _power_limit(root),
        "temperature_c": _hottest(root),
        "quota_cores": _quota(root),
        "load_1min": round(os.getloadavg()[0], 2),
        "steal_s": _steal(root),
        "preempted": _preempted(root),
        "gpus": gpus(),
    }


def describe(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """The two states as lines for people: what changed as from and to, what is not told left out."""

    def text(key: str, form: Callable[[Any], str]) -> str:
        first, last = ("" if state.get(key) is None else form(state[key]) for state in (before, after))
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
    pairs = zip(before.get("gpus") or (), after.get("gpus") or (), strict=False)
    for index, (first, last) in enumerate(pairs):
        changes = {
            key: first[key] if first[key] == last.get(key) else f"{first[key]} to {last.get(key)}" for key in first
        }
        name = changes.pop("name", "")
        lines.append(f"GPU {index} {name}: " + ", ".join(f"{key} {value}" for key, value in changes.items()))
    return lines


def _grown(before: Mapping[str, Any], after: Mapping[str, Any], key: str, unit: str) -> str:
    first, last = before.get(key), after.get(key)
    return "" if first is None or last is None else f"{last - first:g}{unit}"


def _span(ends: list[float], unit: str) -> str:
    low, high = ends
    return f"{low:.0f} {unit}" if round(low) == round(high) else f"{low:.0f}-{high:.0f} {unit}"


def _clocks(root: Path) -> list[float] | None:
    found = _numbers(root, f"{_CPU}/cpu[0-9]*/cpufreq/scaling_cur_freq", 1e-3)
    if not found:
        found = [
            float(mhz) for mhz in re.findall(r"^cpu MHz\s*:\s*([\d.]+)$", _text(root / "proc/cpuinfo"), re.MULTILINE)
        ]
    return [min(found), max(found)] if found else None


def _governor(root: Path) -> str | None:
    found = {_text(file) for file in root.glob(f"{_CPU}/cpu[0-9]*/cpufreq/scaling_governor")}
    return ", ".join(sorted(found - {""})) or None


def _power_limit(root: Path) -> float | None:
    return next(iter(_numbers(root, "sys/class/powercap/*:0/constraint_0_power_limit_uw", 1e-6)), None)


def _limits(root: Path) -> list[float] | None:
    low = _numbers(root, f"{_CPU}/cpu[0-9]*/cpufreq/scaling_min_freq", 1e-3)
    high = _numbers(root, f"{_CPU}/cpu[0-9]*/cpufreq/scaling_max_freq", 1e-3)
    return [min(low), max(high)] if low and high else None


def _turbo(root: Path) -> bool | None:
    off = _text(root / _CPU / "intel_pstate/no_turbo")
    on = _text(root / _CPU / "cpufreq/boost")
    return off == "0" if off else on == "1" if on else None


def _hottest(root: Path) -> float | None:
    return max(_numbers(root, "sys/class/thermal/thermal_zone*/temp", 1e-3), default=None)


def _quota(root: Path) -> float | None:
    words = _text(root / "sys/fs/cgroup/cpu.max").split()
    return int(words[0]) / int(words[1]) if len(words) == 2 and words[0].isdigit() else None


def _steal(root: Path) -> float | None:
    found = re.match(r"cpu +(?:\d+ ){7}(\d+)", _text(root / "proc/stat"))
    return int(found[1]) / os.sysconf("SC_CLK_TCK") if found else None


def _preempted(root: Path) -> int | None:
    # Of every thread: those of the runtime do the work.
    counts = [
        re.search(r"^nonvoluntary_ctxt_switches:\s+(\d+)", _text(file), re.MULTILINE)
        for file in root.glob("proc/self/task/*/status")
    ]
    return sum(int(count[1]) for count in counts if count) if any(counts) else None


def _numbers(root: Path, pattern: str, scale: float) -> list[float]:
    texts = [_text(file) for file in sorted(root.glob(pattern))]
    return [int(text) * scale for text in texts if text.lstrip("-").isdigit()]


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
