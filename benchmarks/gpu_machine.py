"""Part `machine` of gpu.py: what is there, how fast it multiplies, copies and launches."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from gpu_rows import Rows

from rkd_deploy.backends import available
from rkd_deploy.bench.machine import provenance

_DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def run(rows: Rows) -> None:
    """Say what is there, then measure the ceilings that floors are computed from."""
    facts: dict[str, Any] = {"provenance": asdict(provenance()), "torch": torch.__version__}
    facts["backends"] = [
        {
            "name": backend.name,
            "ok": backend.ok,
            "version": backend.version,
            "devices": backend.devices,
            "reason": backend.reason,
        }
        for backend in available()
    ]
    if rows.device == "cuda":
        facts |= {"gpu": torch.cuda.get_device_name(0), "cuda": torch.version.cuda}
        cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
        facts |= {"cudnn": cudnn, "capability": torch.cuda.get_device_capability(0)}
    rows.add("facts", **facts)
    for name in _DTYPES if rows.device == "cuda" else ("fp32",):
        if f"flops_{name}" not in rows:
            with rows.attempt(f"flops_{name}"):
                rows.add(f"flops_{name}", value=_flops(name, rows))
    if "bytes" not in rows:
        with rows.attempt("bytes"):
            rows.add("bytes", value=_bandwidth(rows))
    if rows.device == "cuda" and "kernel_s" not in rows:
        with rows.attempt("kernel_s"):
            rows.add("kernel_s", value=_kernel_seconds())
        with rows.attempt("launch_s"):
            rows.add("launch_s", value=_launch_seconds())


def _flops(name: str, rows: Rows) -> float:
    side = 256 if rows.tiny else 4096 if name == "fp32" else 8192
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
    a, b = (torch.randn(side, side, device=rows.device).to(_DTYPES[name]) for _ in range(2))
    out = torch.empty_like(a)
    try:
        seconds = _best(lambda: torch.mm(a, b, out=out), rows)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    return 2 * side**3 / seconds


def _bandwidth(rows: Rows) -> float:
    count = 1 << (18 if rows.tiny else 28)
    source = torch.ones(count, device=rows.device)
    target = torch.empty_like(source)
    return 8 * count / _best(lambda: target.copy_(source), rows)


def _best(call: Callable[[], object], rows: Rows) -> float:
    """Seconds of the fastest of ten calls."""
    times = []
    for _ in range(12):
        _wait(rows.device)
        began = time.perf_counter()
        call()
        _wait(rows.device)
        times.append(time.perf_counter() - began)
    return min(times[2:])


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _kernel_seconds() -> float:
    """Time from one kernel of a CUDA graph to the next, where each does next to nothing."""
    x, count = torch.zeros(1, device="cuda"), 1000
    aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        x.add_(1)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(count):
            x.add_(1)
    return _repeated(graph.replay) / count


def _launch_seconds() -> float:
    """Time of a kernel launched by PyTorch, one after the other."""
    x, count = torch.zeros(1, device="cuda"), 1000

    def launch() -> None:
        for _ in range(count):
            x.add_(1)

    return _repeated(launch) / count


def _repeated(call: Callable[[], object]) -> float:
    times = []
    for _ in range(6):
        torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])
