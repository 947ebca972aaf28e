"""The machine of a bench: versions, clocks, load and memory.

Clocks, limits and load are what makes two honest tools disagree about one model. They are read from /proc and /sys
(Linux) and from nvidia-smi; what a machine does not tell, as virtual ones do not tell temperatures, is None.
"""

from __future__ import annotations

import csv
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rkd_deploy.errors import installed_version

PACKAGES = (
    "rkd-deploy",
    "numpy",
    "onnxruntime",
    "onnxruntime-gpu",
    "torch",
    "torchvision",
    "onnx",
    "tensorrt",
    "tensorrt-rtx",
    "openvino",
)
_GPU_FIELDS = (
    "name",
    "driver_version",
    "memory.total",
    "memory.used",
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "power.limit",
    "power.draw",
    "temperature.gpu",
    "pstate",
)


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Command, time, versions and machine of a measurement; None where something is not known.

    Attributes:
        command: The command line, of each path the last component.
        time_utc: Date and time in ISO format.
        versions: Version of each of `PACKAGES`, None where it is not installed.
        python: Version of Python.
        platform: Operating system and C library.
        cpu: Name of the processor.
        cores: Number of cores that the process may use.
        memory_bytes: Memory of the machine.
        load_1min: Average number of running processes in the last minute.
        gpus: nvidia-smi's values for each GPU, with their units.
        git: ``commit`` and ``dirty`` of the checkout that the package runs from.
    """

    command: str | None = None
    time_utc: str | None = None
    versions: Mapping[str, str | None] = field(default_factory=dict)
    python: str | None = None
    platform: str | None = None
    cpu: str | None = None
    cores: int | None = None
    memory_bytes: int | None = None
    load_1min: float | None = None
    gpus: Sequence[Mapping[str, str]] | None = None
    git: Mapping[str, str | bool] | None = None


def provenance() -> Provenance:
    """The provenance of what this process measures now."""
    return Provenance(
        command=command_without_folders(sys.argv),
        time_utc=datetime.now(UTC).isoformat(timespec="seconds"),
        versions={name: installed_version(name) for name in PACKAGES},
        python=platform.python_version(),
        platform=platform.platform(),
        cpu=cpu_model(),
        cores=cores(),
        memory_bytes=_memory_bytes(),
        load_1min=round(os.getloadavg()[0], 2),
        gpus=gpus(),
        git=_git(Path(__file__).parent),
    )


def command_without_folders(argv: list[str]) -> str:
    """A command as one line without the machine's folders: of every path in it the last component is left."""
    if not argv:
        return ""
    arguments = [re.sub(r"(^|[=:,])[~/][^=:,]*", lambda path: path[1] + Path(path[0]).name, a) for a in argv[1:]]
    return " ".join([Path(argv[0]).name, *arguments])


def cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str | None:
    """The processor's name; None where the machine does not tell."""
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or None
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return name[1].strip() if name else platform.machine() or None


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None


def gpus() -> list[dict[str, str]] | None:
    """Facts of each GPU from nvidia-smi, values with their units; None where there is no nvidia-smi."""
    query = f"--query-gpu={','.join(_GPU_FIELDS)}"
    answer = _output(["nvidia-smi", query, "--format=csv,noheader"])
    return parse_gpus(answer) if answer else None


def parse_gpus(answer: str) -> list[dict[str, str]]:
    """Facts of each GPU from nvidia-smi's CSV answer, a line for each, values with their units."""
    rows = csv.reader(answer.strip().splitlines(), skipinitialspace=True)
    return [dict(zip(_GPU_FIELDS, row, strict=False)) for row in rows]


def _git(folder: Path) -> dict[str, Any] | None:
    # Tracked, not just inside: an installed copy can lie in the virtual environment of some other checkout.
    if _output(["git", "-C", str(folder), "ls-files", "--error-unmatch", Path(__file__).name]) is None:
        return None
    commit = _output(["git", "-C", str(folder), "rev-parse", "HEAD"])
    if commit is None:
        return None
    status = _output(["git", "-C", str(folder), "status", "--porcelain", "--untracked-files=no"])
    return {"commit": commit, "dirty": bool(status)}


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


_CPU = "sys/devices/system/cpu"


@dataclass(frozen=True, kw_only=True)
class MachineState:
    """Clocks, limits, temperature and load of the machine at one moment; None where the machine does not tell.

    Attributes:
        clock_mhz: Lowest and highest clock of all cores.
        governor: Governor of the cores' frequencies.
        clock_limits_mhz: Lowest and highest clock that the governor may choose.
        turbo: Whether clocks above the nominal one are allowed.
        power_limit_w: Long-term limit of the processor package (RAPL).
        temperature_c: Temperature of the hottest thermal zone.
        quota_cores: Number of cores that the container may use.
        load_1min: Average number of running processes in the last minute.
        steal_s: CPU seconds that the hypervisor gave to others since the machine started.
        preempted: How often this process was taken off a core.
        gpus: nvidia-smi's values for each GPU, with their units.
    """

    clock_mhz: tuple[float, float] | None = None
    governor: str | None = None
    clock_limits_mhz: tuple[float, float] | None = None
    turbo: bool | None = None
    power_limit_w: float | None = None
    temperature_c: float | None = None
    quota_cores: float | None = None
    load_1min: float | None = None
    steal_s: float | None = None
    preempted: int | None = None
    gpus: Sequence[Mapping[str, str]] | None = None


def machine_state(root: Path = Path("/")) -> MachineState:
    """The state that the machine is in now.

    Args:
        root: Folder in which proc and sys lie.
    """
    return MachineState(
        clock_mhz=_clocks(root),
        governor=_governor(root),
        clock_limits_mhz=_limits(root),
        turbo=_turbo(root),
        power_limit_w=_power_limit(root),
        temperature_c=_hottest(root),
        quota_cores=_quota(root),
        load_1min=round(os.getloadavg()[0], 2),
        steal_s=_steal(root),
        preempted=_preempted(root),
        gpus=gpus(),
    )


def _clocks(root: Path) -> tuple[float, float] | None:
    mhz = _numbers(root, f"{_CPU}/cpu[0-9]*/cpufreq/scaling_cur_freq", 1e-3)
    if not mhz:  # a virtual machine without cpufreq; x86 tells a clock there too
        mhz = [
            float(text) for text in re.findall(r"^cpu MHz\s*:\s*([\d.]+)$", _text(root / "proc/cpuinfo"), re.MULTILINE)
        ]
    return (min(mhz), max(mhz)) if mhz else None


def _governor(root: Path) -> str | None:
    governors = {_text(file) for file in root.glob(f"{_CPU}/cpu[0-9]*/cpufreq/scaling_governor")}
    return ", ".join(sorted(governors - {""})) or None


def _power_limit(root: Path) -> float | None:
    return next(iter(_numbers(root, "sys/class/powercap/*:0/constraint_0_power_limit_uw", 1e-6)), None)


def _limits(root: Path) -> tuple[float, float] | None:
    low = _numbers(root, f"{_CPU}/cpu[0-9]*/cpufreq/scaling_min_freq", 1e-3)
    high = _numbers(root, f"{_CPU}/cpu[0-9]*/cpufreq/scaling_max_freq", 1e-3)
    return (min(low), max(high)) if low and high else None


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
    ticks = re.match(r"cpu +(?:\d+ ){7}(\d+)", _text(root / "proc/stat"))  # the eighth number of all cores
    return int(ticks[1]) / os.sysconf("SC_CLK_TCK") if ticks else None


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


_STATUS = Path("/proc/self/status")
_RESET_PEAK = "5"
"""Written into /proc/self/clear_refs it resets the peak of resident memory (`proc(5)`)."""


def resident_bytes() -> int | None:
    """Resident memory of this process now (VmRSS; the kernel's sum lags by some pages for each CPU, see `proc(5)`)."""
    return _status("VmRSS")


def resident_peak_bytes() -> int | None:
    """Largest resident memory of this process since `reset_peak` (VmHWM)."""
    return _status("VmHWM")


def reset_peak() -> bool:
    """Reset the peak of resident memory; False where the kernel does not allow it: it is then of the whole process."""
    try:
        Path("/proc/self/clear_refs").write_text(_RESET_PEAK)
    except OSError:
        return False
    return True


def available_bytes() -> int | None:
    """Memory of the machine that can be had without swapping (MemAvailable)."""
    return _kilobytes(Path("/proc/meminfo"), "MemAvailable")


def device_used_bytes(device: str) -> int | None:
    """Memory in use on a GPU, by every program there, as nvidia-smi tells it in whole MiB.

    Args:
        device: "cuda:N"; of "cpu" nothing is known here.
    """
    kind, _, index = device.partition(":")
    facts = gpus() if kind == "cuda" else None
    number = int(index or 0)
    if not facts or number >= len(facts):
        return None
    # nvidia-smi and not the runtime's own count: memory of other processes and of the driver's contexts is in use as
    # well.
    mebibytes = re.match(r"(\d+) MiB", facts[number].get("memory.used", ""))
    return int(mebibytes[1]) * 2**20 if mebibytes else None


def _status(name: str) -> int | None:
    return _kilobytes(_STATUS, name)


def _kilobytes(file: Path, name: str) -> int | None:
    try:
        line = re.search(rf"^{name}:\s+(\d+) kB", file.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(line[1]) * 1024 if line else None
