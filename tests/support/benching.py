"""Settings of a bench from words, as the command makes them; a single value stands for a list of one."""

from __future__ import annotations

from typing import Any

from rkd_deploy.bench.settings import BenchSettings, combinations

SHORT = {"min_seconds": 0.01, "min_runs": 5, "warmup_seconds": 0.0}


def bench_settings(backend: Any = "onnxruntime", threads: Any = None, streams: Any = 1, **more: Any) -> BenchSettings:
    """`BenchSettings` of backends, threads and streams, one or several of each, and whatever else is named."""
    where = {name: more.pop(name) for name in ("device", "memory_limit", "cuda_graph") if name in more}
    run_on = combinations(
        [backend] if isinstance(backend, str) else backend,
        threads=[threads] if isinstance(threads, int) else threads,
        streams=[streams] if isinstance(streams, int) else streams,
        **where,
    )
    sequences = {name: tuple(more[name]) for name in ("batches", "shape") if more.get(name) is not None}
    return BenchSettings(run_on=run_on, **more | sequences)
