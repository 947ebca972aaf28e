"""Feeds faults to the package by seed: is each an error that a person can read?

    uv run python benchmarks/bad_input.py --count 1000 --seed 0

Each fault (`faults.py`) ends in one of three ways. Clear: a result, or one of the package's errors; of a command, a
documented exit code and a line that says what is wrong. Rough: a traceback, another exception, an exit without a word.
Bad: no end in time, memory beyond the limit, a process that dies, damage that gives a result, an escape sequence on the
terminal, temporary files left behind. The record has the counts by group and the first of each kind.

Processes are forked from one that has everything imported and nothing run: a fault then costs what it does, not the
seconds of imports.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from damage import Fault, Material, WronglyAcceptedError
from faults import GROUPS, draw
from record import Claim, save

SECONDS = 30.0
"""Time that a fault may take; on a busy machine a bundle that is loaded and verified takes a few."""
MEMORY = 3 * 2**30
"""Bytes of address space beyond those that the imports have taken."""
EXIT_CODES = (0, 1, 2, 3, 130)
KINDS = ("clear", "rough", "bad")

_LONGEST_MESSAGE = 4000
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\x80-\x9f]")


@dataclass(frozen=True)
class Outcome:
    """How a fault ended: clear, rough or bad, and why."""

    fault: Fault
    kind: str
    reason: str


def prepare(folder: Path) -> Material:
    """Train, export and measure the embedded example, in other processes: the parent of the forks runs nothing."""

    def command(*words: object) -> None:
        call = [sys.executable, "-m", "rkd_deploy.cli", *map(str, words)]
        subprocess.run(call, cwd=folder, check=True, capture_output=True)

    command("train", "--set", "train.epochs=1", "--set", "data.train_limit=200", "--set", "train.threads=1")
    command("export")
    command("bench", "--seconds", "0.02", "--batch", "1", "--output", "record")
    run = next((folder / "runs").glob("digits*"))
    photo = folder / "photo.jpg"
    command_line = f"from PIL import Image; Image.radial_gradient('L').convert('RGB').save({str(photo)!r})"
    subprocess.run([sys.executable, "-c", command_line], check=True)
    return Material(run, run / "bundle", folder / "record" / "bench.json", photo)


def import_everything() -> None:
    """What faults import, once. No model is loaded and no operator run: threads would not survive the fork."""
    import matplotlib.pyplot
    import onnx
    import onnxruntime
    import torch

    import rkd_deploy.bench.reading
    import rkd_deploy.cli
    import rkd_deploy.commands.bench
    import rkd_deploy.data.sources
    import rkd_deploy.pipeline
    import rkd_deploy.report.page
    import rkd_deploy.serve.classifier
    import rkd_deploy.train.runs
    import rkd_deploy.train.weights

    assert all((matplotlib.pyplot, onnx, onnxruntime, torch, rkd_deploy))


def judge(fault: Fault, *, seconds: float = SECONDS, memory: int = MEMORY) -> Outcome:
    """Run a fault in a process of its own and say how it ended."""
    folder = Path(tempfile.mkdtemp(prefix="rkd-fault-"))
    try:
        end, text = _run_apart(fault, folder, seconds, memory)
        if end["end"] == "late":  # on a machine that others load a start may take as long: what hangs is late again
            shutil.rmtree(folder)
            folder.mkdir()
            end, text = _run_apart(fault, folder, 4 * seconds, memory)
        left = [path.name for path in folder.rglob(".*.tmp")]
        return Outcome(fault, *_kind(fault, end, text, left, (folder / "executed").exists()))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _run_apart(fault: Fault, folder: Path, seconds: float, memory: int) -> tuple[dict[str, str], str]:
    """How the process ended, and what it wrote to its outputs."""
    reader, writer = os.pipe()
    with tempfile.TemporaryFile() as output:
        sys.stdout.flush()
        process = os.fork()
        if process == 0:
            os.close(reader)
            _child(fault, folder, writer, output.fileno(), seconds, memory)
        os.close(writer)
        with os.fdopen(reader, "rb") as stream:
            in_time = bool(select.select([stream], [], [], seconds)[0])
            if not in_time:
                os.killpg(process, signal.SIGKILL)
            answer = stream.read()
        _, status = os.waitpid(process, 0)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process, signal.SIGKILL)  # what it started and left behind
        output.seek(0)
        text = output.read(200_000).decode(errors="replace")
    if not in_time:
        return {"end": "late"}, text
    if not answer:
        name = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else f"status {status}"
        return {"end": "died", "message": name}, text
    end: dict[str, str] = json.loads(answer)
    return end, text


def _child(fault: Fault, folder: Path, writer: int, output: int, seconds: float, memory: int) -> None:
    os.setpgid(0, 0)
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))
    os.chdir(folder)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + memory,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    end = _end_of(fault.run)
    with contextlib.suppress(BaseException):
        sys.stdout.flush()
        sys.stderr.flush()
    os.write(writer, json.dumps(end).encode())
    os._exit(0)


def _end_of(run: Callable[[], object]) -> dict[str, str]:
    from rkd_deploy.errors import RkdError

    try:
        run()
    except RkdError as error:
        return {"end": "error", "message": str(error)}
    except SystemExit as error:
        return {"end": "exit", "message": str(error.code or 0)}
    except WronglyAcceptedError as error:
        return {"end": "accepted", "message": str(error)}
    except BaseException as error:  # whatever it is, it is what is looked for
        place = traceback.extract_tb(error.__traceback__)[-1]
        message = f"{type(error).__name__}: {str(error)[:200]} ({Path(place.filename).name}:{place.lineno})"
        return {"end": "memory" if isinstance(error, MemoryError) else "exception", "message": message}
    return {"end": "result"}


def _kind(fault: Fault, end: dict[str, str], text: str, left: list[str], executed: bool) -> tuple[str, str]:
    how, message = end["end"], end.get("message", "")
    if executed:
        return "bad", "code from a file was run"
    if how == "late":
        return "bad", "did not end in time"
    if how in ("died", "memory", "accepted"):
        return "bad", f"{how}: {message}"
    if "MemoryError" in message + text or "bad_alloc" in message + text:
        return "bad", f"memory: {message or text[-200:]}"
    if left:
        return "bad", f"left behind: {', '.join(left)}"
    if "Traceback (most recent call last)" in text:
        return "rough", f"traceback: {text.strip().splitlines()[-1][:200]}"
    if how == "exception":
        return "rough", message
    if how == "error":
        return (
            ("rough", "an empty or endless message") if not 20 < len(message) < _LONGEST_MESSAGE else ("clear", message)
        )
    if fault.by_command and (control := _CONTROL.search(text)):
        return "bad", f"{control[0]!r} reached the terminal"
    if how == "exit" and int(message) not in EXIT_CODES:
        return "rough", f"exit code {message}"
    silent = "standard output" in fault.name or "standard error" in fault.name
    if how == "exit" and message != "0" and not text.strip() and not silent:
        return "rough", f"exit code {message} without a word"
    return "clear", message


def run(material: Material, *, count: int, seed: int) -> Iterator[Outcome]:
    """The outcomes of the first faults of a seed."""
    for number in range(count):
        yield judge(draw(material, seed, number))


def table(outcomes: Iterable[Outcome]) -> dict[str, Counter[str]]:
    """Counts by group and kind."""
    counts = {group: Counter(dict.fromkeys(KINDS, 0)) for group in GROUPS}
    for outcome in outcomes:
        counts[outcome.fault.group][outcome.kind] += 1
    return counts


def main() -> None:
    """Run faults, list what was not clear, and write a record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=GROUPS, help="judge the faults of one group; no record is written")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rkd-faults-") as folder:
        material = prepare(Path(folder))
        import_everything()
        began, outcomes = time.monotonic(), []
        for number in range(options.count):
            fault = draw(material, options.seed, number)
            if options.only in (None, fault.group):
                outcomes.append(outcome := judge(fault))
                if outcome.kind != "clear":
                    print(
                        f"{outcome.kind:5}  {number:5}  {fault.group}: {fault.name!r}: {outcome.reason!r}", flush=True
                    )
    counts = table(outcomes)
    for group, kinds in counts.items():
        print(f"{group:12}" + "".join(f"{kinds[kind]:6} {kind}" for kind in KINDS))
    if options.only is not None:
        return
    unclear = [
        [outcome.fault.group, outcome.fault.name, outcome.kind, outcome.reason]
        for outcome in outcomes
        if outcome.kind != "clear"
    ]
    rough, bad = (sum(kinds[kind] for kinds in counts.values()) for kind in ("rough", "bad"))
    samples = {
        "seed": options.seed,
        "counts": {group: dict(kinds) for group, kinds in counts.items()},
        "unclear": unclear,
    }
    save(
        "bad_input",
        [
            Claim(f"bad outcomes of {len(outcomes)} faults", bad, "faults", 0, samples),
            Claim(f"rough outcomes of {len(outcomes)} faults", 100 * rough / len(outcomes), "%", 1),
            Claim("time of a fault", (time.monotonic() - began) / len(outcomes), "s", None),
        ],
    )


if __name__ == "__main__":
    main()
