"""Measures all that is to be measured on a GPU, by worth, and goes on where it was cut off.

    PYTHONPATH=. python3 benchmarks/gpu.py --minutes 12 --out FOLDER
    PYTHONPATH=. python3 benchmarks/gpu.py --minutes 12 --resume FOLDER [--out ANOTHER]

From a checkout, with nothing of it installed. Each part is a process of its own with its share of the time, two minutes
at most; FOLDER/gpu.json is written anew after each. What is not installed is a line of the record and not its end, and
so is what fails. `--device cpu --tiny` runs it all on any machine in a minute, which is how it is tested.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RECORD = "gpu.json"
LONGEST = 120.0
"""Seconds of one part."""
_GRACE = 8.0
"""Seconds that a part has to end by itself, before it is ended."""


@dataclass(frozen=True)
class Part:
    """One part of the record.

    Attributes:
        module: Of this folder, with a function that measures.
        weight: Its share of the time that is left, beside the weights of what comes after it.
        call: Name of the function.
        arguments: For it, after the rows.
    """

    module: str
    weight: float
    call: str = "run"
    arguments: tuple[str, ...] = ()


PARTS: Mapping[str, Part] = {
    "machine": Part("gpu_machine", 1.5),
    "training": Part("gpu_training", 4),
    "latency ResNet-20": Part("gpu_latency", 4, arguments=("ResNet-20",)),
    "latency ResNet-18": Part("gpu_latency", 4, arguments=("ResNet-18",)),
    "tests": Part("gpu_tests", 3),
    "rung": Part("gpu_tests", 2, call="run_rung"),
}
"""By worth."""


def main() -> None:
    """Run what is left of the parts; in a child process, one part."""
    options = _arguments()
    if options.part:
        _run_part(options)
        return
    began = time.monotonic()
    out: Path = options.out or options.resume or Path("gpu-record")
    out.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {"theme": "gpu", "device": options.device, "parts": {}}
    if options.resume and (options.resume / RECORD).exists():
        record = json.loads((options.resume / RECORD).read_text(encoding="utf-8"))
    names = [name for name in PARTS if not options.only or name in options.only]
    if options.tiny:
        names = [name for name in names if name != "latency ResNet-18"]
    left = [name for name in names if not record["parts"].get(name, {}).get("complete")]
    for place, name in enumerate(left):
        seconds = 60 * options.minutes - (time.monotonic() - began)
        if seconds < 2 * _GRACE:
            print(f"{name}: no time left; go on with --resume {out}", flush=True)
            break
        share = PARTS[name].weight / sum(PARTS[other].weight for other in left[place:])
        limit = min(LONGEST, max(25.0, share * seconds), seconds)
        rows = record["parts"].get(name, {}).get("rows", [])
        print(f"\n== {name}, at most {limit:.0f} s", flush=True)
        record["parts"][name] = _part(name, limit, rows, options)
        record["floors"] = _floors(record)
        _write(out / RECORD, record)
    print("\nMilliseconds, and in brackets what share of it the floor is.")
    _summary(record)
    print(json.dumps({"record": str(out / RECORD), "complete": all(_complete(record, name) for name in names)}))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=12.0, help="for everything")
    parser.add_argument("--out", type=Path, help="folder of gpu.json; default: that of --resume, else gpu-record")
    parser.add_argument("--resume", type=Path, help="folder of a record to go on with")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", action="append", choices=PARTS, help="this part, may be repeated")
    parser.add_argument("--tiny", action="store_true", help="the least of everything: figures mean nothing")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    return parser.parse_args()


def _part(name: str, limit: float, rows: list[dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    """Run a part in a process group of its own, and end that with all it started when its time is over."""
    began = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="rkd-gpu-"))
    file, errors = folder / "rows.jsonl", folder / "stderr"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    command = [sys.executable, str(Path(__file__).resolve()), "--part", name, "--rows", str(file)]
    command += ["--seconds", str(limit - _GRACE), "--device", options.device, *(["--tiny"] if options.tiny else [])]
    paths = [str(HERE.parent), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    environment["RKD_DEPLOY_CACHE"] = str(folder / "cache")
    with errors.open("w", encoding="utf-8") as stream:
        child = subprocess.Popen(command, stderr=stream, env=environment, start_new_session=True)
        try:
            code: int | None = child.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
    from gpu_rows import read_rows

    stderr = errors.read_text(encoding="utf-8", errors="replace").splitlines()
    rows_by_key = {row["key"]: row for row in read_rows(file)}
    shutil.rmtree(folder, ignore_errors=True)
    for line in stderr[-6:]:
        print(f"  {line[:200]}", flush=True)
    return {
        "complete": code == 0,
        "ended": "complete" if code == 0 else "out of time" if code in (None, 75) else f"failed, exit {code}",
        "seconds": round(time.monotonic() - began, 1),
        "rows": list(rows_by_key.values()),
        "stderr": {"lines": len(stderr), "kinds": _kinds(stderr), "last": [line[:300] for line in stderr[-25:]]},
    }


def _kinds(lines: list[str]) -> dict[str, int]:
    """Lines of standard error by what they begin with, times and numbers left out: runtimes repeat themselves."""
    starts = Counter("".join("#" if sign.isdigit() else sign for sign in line)[:90] for line in lines)
    return dict(starts.most_common(8))


def _run_part(options: argparse.Namespace) -> None:
    """In the child: exit code 0 when the part is complete, 75 when its time was over before."""
    from importlib import import_module

    from gpu_rows import OutOfTime, Rows

    part = PARTS[options.part]
    rows = Rows(options.rows, options.device, options.tiny, time.monotonic() + options.seconds)
    try:
        getattr(import_module(part.module), part.call)(rows, *part.arguments)
    except OutOfTime as end:
        print(end, file=sys.stderr)
        sys.exit(75)
    except Exception:
        traceback.print_exc()
        sys.exit(1)


def _floors(record: Mapping[str, Any]) -> dict[str, dict[str, list[float]]]:
    """By row and network or phase: milliseconds, the least that is possible, and the share of it (`floors.py`)."""
    from floors import Work

    rows = {name: part["rows"] for name, part in record["parts"].items()}
    machine = {row["key"]: row["value"] for row in rows.get("machine", []) if isinstance(row.get("value"), float)}
    if not {"flops_fp32", "bytes"} <= {*machine}:
        return {}
    floors: dict[str, dict[str, list[float]]] = {}
    for name, of_part in rows.items():
        work = {row["precision"]: row["work"] for row in of_part if row["key"].startswith("work, ")}
        for row in of_part:
            measured = row.get("device_ms") or row.get("ms_per_step") or {}
            line = {}
            for what, ms in measured.items():
                todo = work.get(row["precision"], {}).get(what)
                if todo is None:
                    continue
                step = Work(**(todo[str(row["batch"])] if "device_ms" in row else todo))
                if "ms_per_step" in row:  # counted of one image: what a batch does more is images, no launches
                    step = Work(step.flops * row["batch"], step.bytes * row["batch"], step.launches)
                least = step.floor_ms(machine, row["precision"])
                line[what] = [round(ms, 4), round(least, 4), round(least / ms, 3)]
            if line:
                floors[f"{name}: {row['key']}"] = line
    return floors


def _complete(record: Mapping[str, Any], name: str) -> bool:
    return bool(record["parts"].get(name, {}).get("complete"))


def _write(file: Path, record: Mapping[str, Any]) -> None:
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    temporary.replace(file)


def _summary(record: Mapping[str, Any]) -> None:
    for name, part in record["parts"].items():
        failed = [row["key"] for row in part["rows"] if "failed" in row or row.get("outcome") in ("failed", "error")]
        print(f"{name}: {part['ended']} in {part['seconds']} s, {len(part['rows'])} rows, {len(failed)} failed")
        for key in failed[:20]:
            print(f"  failed: {key}")
    for key, line in record.get("floors", {}).items():
        shown = ", ".join(f"{what} {ms:.3g} ({share:.0%})" for what, (ms, _, share) in line.items())
        print(f"{key}: {shown}")


if __name__ == "__main__":
    main()
