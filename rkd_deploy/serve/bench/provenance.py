"""Where a measurement comes from: enough to repeat it, nothing that tells who ran it or where.

No host name, no user name and no path of the machine: arguments that are paths keep their last component only.
"""

from __future__ import annotations

import csv
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

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


def provenance() -> dict[str, Any]:
    """Command, time, versions, machine and commit, for JSON; None where something cannot be known."""
    return {
        "command": command_line(sys.argv),
        "time_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_model(),
        "cores": cores(),
        "memory_bytes": _memory_bytes(),
        "load_1min": round(os.getloadavg()[0], 2),
        "gpus": gpus(),
        "git": _git(Path(__file__).parent),
    }


def command_line(argv: list[str]) -> str:
    """The command without the machine's folders: of every path in it the last component is left."""
    if not argv:
        return ""
    arguments = [re.sub(r"(^|[=:,])[~/][^=:,]*", lambda found: found[1] + Path(found[0]).name, a) for a in argv[1:]]
    return " ".join([Path(argv[0]).name, *arguments])


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str | None:
    """The processor's name; None where the machine does not tell."""
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or None
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.machine() or None


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None


def gpus() -> list[dict[str, str]] | None:
    """What nvidia-smi tells of each GPU, values with their units; None where there is no nvidia-smi."""
    query = f"--query-gpu={','.join(_GPU_FIELDS)}"
    answer = _output(["nvidia-smi", query, "--format=csv,noheader"])
    return parse_gpus(answer) if answer else None


def parse_gpus(answer: str) -> list[dict[str, str]]:
    """One dictionary for each line of nvidia-smi's CSV answer, values with their units."""
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
