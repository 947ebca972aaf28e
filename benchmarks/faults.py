"""Draws faulty files, environments and calls by seed, as somebody may come with them.

A fault is prepared and run in a process of its own, in an empty folder (`bad_input.py`). Each is drawn from its number
and the seed alone, so that one can be repeated without those before it.
"""

from __future__ import annotations

import io
import os
import random
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from damage import CALL_VALUES, ESCAPE, Fault, Material, run_command
from faulty_files import faulty_bundle, faulty_checkpoint, faulty_image, faulty_recipe, faulty_record


def draw(material: Material, seed: int, number: int) -> Fault:
    """The fault of a number, whatever was drawn before it."""
    group = list(GROUPS)[number % len(GROUPS)]
    return GROUPS[group](random.Random(f"{seed}/{number}"), material)


def _environment(chance: random.Random, material: Material) -> Fault:
    commands: list[list[object]] = [
        ["--help"],
        ["backends"],
        ["info", material.bundle],
        ["info", material.bundle, "--json"],
        ["predict", material.bundle, material.photo],
        ["verify", material.bundle, "--backend", "onnxruntime"],
        ["bench-compare", material.record, material.record],
        ["bench", "--runs", ESCAPE],
        ["predict", material.bundle, f"{ESCAPE}.jpg"],
        ["train", f"{ESCAPE}.toml"],
    ]
    command = chance.choice(commands)
    changes: dict[str, Callable[[], object]] = {
        "standard output closed": _close_output,
        "standard output full": lambda: _output_to("/dev/full"),
        "standard output a broken pipe": _break_output,
        "standard output in Latin-1": _output_in_latin_1,
        "standard error closed": lambda: setattr(sys, "stderr", None),
        "a current folder that is gone": _leave_folder,
        "no home": lambda: os.environ.update(HOME="/nonexistent"),
        "no temporary folder": lambda: os.environ.update(TMPDIR="/nonexistent"),
        "terminated": lambda: threading.Timer(chance.random() / 4, os.kill, (os.getpid(), signal.SIGTERM)).start(),
        **{f"COLUMNS={width}": _set_columns(width) for width in ("0", "1", "10", "-5", "x", "100000")},
        "a dumb terminal": lambda: os.environ.update(TERM="dumb", NO_COLOR="1"),
        "few open files": _few_files,
    }
    change = chance.choice(list(changes))

    def run() -> None:
        changes[change]()
        run_command(*command)

    return Fault("environment", f"{change}: {' '.join(map(str, command))[:60]!r}", run, by_command=True)


def _set_columns(width: str) -> Callable[[], object]:
    return lambda: os.environ.update(COLUMNS=width)


def _output_in_latin_1() -> None:
    assert isinstance(sys.stdout, io.TextIOWrapper)
    sys.stdout.reconfigure(encoding="latin-1")


def _close_output() -> None:
    os.close(1)
    sys.stdout = None  # as the interpreter has it then


def _output_to(path: str) -> None:
    os.dup2(os.open(path, os.O_WRONLY), 1)


def _break_output() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)


def _leave_folder() -> None:
    Path("gone").mkdir()
    os.chdir("gone")
    os.rmdir("../gone")


def _few_files() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_NOFILE, (24, 24))


def _call(chance: random.Random, material: Material) -> Fault:
    import rkd_deploy
    from rkd_deploy.backends import RunOn
    from rkd_deploy.bench.settings import BenchSettings
    from rkd_deploy.card import Preprocess

    def predict(image: Any, top: Any) -> None:
        with rkd_deploy.load(material.bundle, threads=1) as classifier:
            classifier.predict(image, top)

    def predict_batch(images: Any, top: Any) -> None:
        with rkd_deploy.load(material.bundle, threads=1) as classifier:
            classifier.predict_batch(images, top)

    def load(**options: Any) -> None:
        rkd_deploy.load(options.pop("path", material.bundle), **options).close()

    calls: dict[str, tuple[Callable[..., object], dict[str, Any]]] = {
        "load": (
            load,
            {
                "path": material.bundle,
                "backend": "onnxruntime",
                "device": "cpu",
                "threads": 1,
                "max_batch": 4,
                "exit_threshold": None,
            },
        ),
        "predict": (predict, {"image": material.photo, "top": 2}),
        "predict_batch": (predict_batch, {"images": [material.photo], "top": 2}),
        "Preprocess": (
            Preprocess,
            {"height": 8, "width": 8, "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_fraction": 1.0},
        ),
        "RunOn": (RunOn, {"backend": "onnxruntime", "device": "cpu", "threads": 1, "streams": 1}),
        "BenchSettings": (BenchSettings, {"batches": (1,), "min_seconds": 0.1, "min_runs": 3, "seed": 0}),
        "verify": (rkd_deploy.verify, {"bundle_path": material.bundle, "run_on": "onnxruntime", "tolerance": 0.1}),
        "read_recipe": (
            rkd_deploy.read_recipe,
            {"path": material.run / "recipe.toml", "overrides": ["train.epochs=1"]},
        ),
    }
    name = chance.choice(list(calls))
    function, options = calls[name]
    key = chance.choice(list(options))
    value = chance.choice(CALL_VALUES)
    return Fault("calls", f"{name}({key}={value!r:.40})", lambda: function(**options | {key: value}))


GROUPS: dict[str, Callable[[random.Random, Material], Fault]] = {
    "recipes": faulty_recipe,
    "checkpoints": faulty_checkpoint,
    "images": faulty_image,
    "bundles": faulty_bundle,
    "records": faulty_record,
    "environment": _environment,
    "calls": _call,
}
