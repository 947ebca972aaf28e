"""How much memory this process holds, and the most it held; None where the system does not tell (only Linux does)."""

from __future__ import annotations

import re
from pathlib import Path

from rkd_deploy.serve.bench.provenance import gpus

_STATUS = Path("/proc/self/status")
_RESET_PEAK = "5"
"""What `proc(5)` says to write into clear_refs for that."""


def resident_bytes() -> int | None:
    """Resident memory of this process now (VmRSS; the kernel's sum lags by some pages for each CPU, see `proc(5)`)."""
    return _status("VmRSS")


def resident_peak_bytes() -> int | None:
    """The most it was since `reset_peak` (VmHWM)."""
    return _status("VmHWM")


def reset_peak() -> bool:
    """Start the peak anew; False where the kernel does not allow it, and the peak is that of the whole process."""
    try:
        Path("/proc/self/clear_refs").write_text(_RESET_PEAK)
    except OSError:
        return False
    return True


def available_bytes() -> int | None:
    """Memory that can be had without swapping (MemAvailable)."""
    return _kilobytes(Path("/proc/meminfo"), "MemAvailable")


def device_used_bytes(device: str) -> int | None:
    """Memory in use on a GPU, by every program there, as nvidia-smi tells it in whole MiB.

    Args:
        device: "cuda:N"; of "cpu" nothing is known here.
    """
    kind, _, index = device.partition(":")
    found = gpus() if kind == "cuda" else None
    number = int(index or 0)
    if not found or number >= len(found):
        return None
    mebibytes = re.match(r"(\d+) MiB", found[number].get("memory.used", ""))
    return int(mebibytes[1]) * 2**20 if mebibytes else None


def _status(name: str) -> int | None:
    return _kilobytes(_STATUS, name)


def _kilobytes(file: Path, name: str) -> int | None:
    try:
        found = re.search(rf"^{name}:\s+(\d+) kB", file.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None
