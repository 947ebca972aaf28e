"""Records of a bench and of a comparison as JSON has them, written down by hand."""

from __future__ import annotations

from typing import Any

import numpy as np

NASTY = """a <b>"bold"</b> & 'net' $x_1$ </title><script>alert(1)</script>"""


def result(model: str, batch: int, p50: float, accuracy: float | None, part: str | None) -> dict[str, Any]:
    """What version 0.1 wrote of one measurement, its optional fields left out; one sample is an outlier."""
    drawn_N = p50 * np.random.default_rng(0).lognormal(0, 0.1, 60)
    samples = [*drawn_N.tolist(), 7 * p50]
    low, high = sorted(samples)[22], sorted(samples)[38]
    return {
        "model": model,
        "part": part,
        "fusion": None,
        "backend": "onnxruntime",
        "device": "cpu",
        "batch": batch,
        "threads": 1,
        "precision": "fp32",
        "transfers": True,
        "p50_ms": sorted(samples)[30],
        "p50_low_ms": low,
        "p50_high_ms": high,
        "p90_ms": sorted(samples)[54],
        "p99_ms": max(samples),
        "mean_ms": float(np.mean(samples)),
        "cv": 0.5,
        "throughput_per_s": 1000 * batch / p50,
        "first_run_ms": 3 * p50,
        "runs": len(samples),
        "accuracy": accuracy,
        "macs": 40_000_000,
        "file_bytes": 1_000_000,
        "samples_ms": samples,
        "a field of the future": 1,
    }


def make_record() -> dict[str, Any]:
    models = (("resnet20", 1.0, 70.0, "s0"), (NASTY, 2.0, 74.0, "fused"), ("slow & worse", 9.0, 69.0, "student"))
    results = [result(name, batch, p50 * batch**0.8, acc, part) for batch in (1, 8) for name, p50, acc, part in models]
    where = {"backend": "onnxruntime", "device": "cpu", "threads": 1}
    predictions = [
        {
            **where,
            "model": one["model"],
            "file_bytes": 1_000_000,
            "batch": one["batch"],
            "macs": 40_000_000 * one["batch"],
            "least_bytes": 1_100_000,
            "unfused_bytes": 9_000_000,
            "arithmetic": "float32",
            "macs_per_s": 5e10,
            "bytes_per_s": 1e10,
            "bound_ms": 0.8 * one["batch"],
            "limit": "compute",
        }
        for one in results
    ]
    ceilings = {**where, "arithmetic": "float32", "macs_per_s": 5e10}
    ceilings |= {"kernels": {"a <product>": 5e10}, "bytes_per_s": {"4194304": 1e10}}
    layers = [{"name": f"conv<{number}>", "op": "Conv", "ms": 0.1 * (1 + number % 5)} for number in range(20)]
    return {
        "schema": 1,
        "kind": "bench",
        "provenance": {
            "command": "rkd-deploy bench <x>",
            "time_utc": "2026-11-23T00:00:00+00:00",
            "cpu": "A processor & more",
            "versions": {"numpy": "2.0", "tensorrt": None},
            "gpus": [{"name": "A GPU", "driver_version": "1"}],
            "git": {"commit": "0123456789abcdef", "dirty": True},
        },
        "settings": {"batches": [1, 8], "transfers": True},
        "results": results,
        "roofline": {"ceilings": [ceilings], "predictions": predictions},
        "layers": [{**where, "model": NASTY, "file_bytes": 1_000_000, "batch": 1, "runs": 30, "layers": layers}],
    }


def make_comparison() -> dict[str, Any]:
    """A compare.json of five networks and a control that is missing, around the same measurements."""
    rows = [
        {
            "name": name,
            "part": part,
            "method": "none",
            "runs": ["runs/a-001"],
            "top1": top1,
            "deviation": None,
            "standard_error": 0.5,
            "test_images": 1000,
            "val_last": None,
            "val_best": None,
            "macs": 40_000_000,
            "parameters": 270_000,
            "seconds": 10.0,
            "over_s0": None,
            "over_student": None,
            "p50_ms": 1.0 + number,
            "p50_low_ms": 0.9,
            "p50_high_ms": 9.9,
            "p90_ms": 10.0,
        }
        for number, (name, part, top1) in enumerate(
            [
                ("T", "teacher", 75.0),
                ("S0", "s0", 69.0),
                (NASTY, "s0", 70.0),
                ("S", "student", 66.0),
                ("S + A", "fused", 70.5),
            ]
        )
    ]
    missing = ["runs/b has no <S0>."]
    return {
        **make_record(),
        "kind": "compare",
        "data": "digits <8>",
        "test_images": 1000,
        "rows": rows,
        "missing": missing,
    }
