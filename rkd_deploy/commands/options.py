"""What the commands have in common: their options, and how they speak."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rkd_deploy.errors import UsageError, require, unknown_name
from rkd_deploy.storage import storage_error
from rkd_deploy.text import visible

if TYPE_CHECKING:
    from rich.console import Console

    from rkd_deploy.bench.results import Result
    from rkd_deploy.bench.timing import Progress

Json = Annotated[bool, typer.Option("--json", help="One JSON object on the last line of standard output.")]
Root = Annotated[Path, typer.Option("--runs", help="Folder of runs.", show_default=True)]
BackendName = Annotated[str, typer.Option("--backend", help="onnxruntime, pytorch, ...: see rkd-deploy backends.")]
DeviceName = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda or cuda:N. Default: cpu; cuda where a backend has only that.")
]
Threads = Annotated[int | None, typer.Option("--threads", help="CPU threads. Default: the runtime's choice.")]
Model = Annotated[Path, typer.Argument(help="A bundle folder or an ONNX file.", show_default=False)]
Newest = Annotated[Path | None, typer.Argument(help="Default: the newest.", show_default=False)]

RUNS = Path("runs")


def newest_bundle(root: Path) -> Path:
    """The bundle below a folder that was written last."""
    from rkd_deploy.backends.files import newest_bundle

    return newest_bundle(root)


def need(extra: str, *modules: str) -> None:
    """Say at once, with the install line, what a command lacks."""
    for module in modules:
        if find_spec(module) is None:
            require(module, extra)


def choose(option: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse what is none of the choices of an option."""
    if value not in choices:
        raise UsageError(unknown_name(f"--{option}", value, choices))


def whole(option: str, text: str) -> list[int]:
    """The whole numbers of a text such as 0,1,2."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(
            f"{option} {text!r} must be whole numbers, separated by commas, e.g. {option} 0,1,2."
        ) from error


@contextmanager
def output_folder(chosen: Path | None, root: Path, kind: str) -> Iterator[Path]:
    """The folder that a command writes into: the chosen one, or a new one that no other process writes into.

    Args:
        chosen: What --output or --report names.
        root: Folder of runs.
        kind: First part of a new folder's name, e.g. ``"bench"``; the time follows, and a number where two processes
            begin in one second.
    """
    if chosen is not None:
        yield chosen
        return
    name = f"{kind}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    folder = _claim(root, name)
    try:
        yield folder
    finally:
        with suppress(OSError):  # it holds something
            folder.rmdir()


def _claim(root: Path, name: str) -> Path:
    try:
        root.mkdir(parents=True, exist_ok=True)
        for number in itertools.count(1):
            folder = root / (name if number == 1 else f"{name}-{number}")
            with suppress(FileExistsError):
                folder.mkdir()  # fails where another process was first
                return folder
    except OSError as error:
        raise storage_error(root / name, error) from error
    raise AssertionError("unreachable")


def batch_sizes(text: str) -> list[int]:
    """The batch sizes of a text such as 1,8,32."""
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1:
        raise UsageError(f"--batch {text!r} must be whole numbers from 1, separated by commas, e.g. --batch 1,8,32.")
    return sizes


def emit(content: Any) -> None:
    """Print the JSON object of --json, the last line of standard output."""
    print(json.dumps(content, allow_nan=False), flush=True)


def brief(results: Iterable[Result]) -> list[dict[str, Any]]:
    """Results as a record has them, without their samples, which fill pages."""

    def cut(fields: dict[str, Any]) -> dict[str, Any]:
        kept = {key: value for key, value in fields.items() if key != "samples_ms"}
        return {key: cut(value) if isinstance(value, dict) else value for key, value in kept.items()}

    return [cut(result.to_row()) for result in results]


def plain(item: Any) -> dict[str, Any]:
    """A dataclass as JSON has it."""
    from dataclasses import asdict

    return asdict(item)


def console_for(as_json: bool) -> Console:
    """Where text for people goes: standard output, or standard error beside JSON.

    Strings are printed as they are: mark-up and control characters in them, of file or model names, do nothing.
    """
    from rich.console import Console

    class PlainConsole(Console):
        def print(self, *objects: Any, **how: Any) -> None:
            plain_objects = [visible(item) if isinstance(item, str) else item for item in objects]
            super().print(*plain_objects, **{"markup": False, **how})

    console = PlainConsole(stderr=as_json, highlight=False, soft_wrap=True)
    if console.width < _NARROWEST:
        console = PlainConsole(stderr=as_json, highlight=False, soft_wrap=True, width=_USUAL_WIDTH)
    return console


_NARROWEST, _USUAL_WIDTH = 20, 80
"""Columns below which a terminal cannot mean it (COLUMNS=0, a broken pipe's size), and what is taken instead."""


_COLUMN = 28
"""Room for a key; a longer one pushes its value aside."""


def fact_lines(content: Mapping[str, Any]) -> list[str]:
    """Every fact that is there, as ``key  value``.

    Args:
        content: What JSON can hold. Tables in tables get dotted keys, a list of tables a line for each; what is None
            or empty is left out; numbers have six significant digits.
    """
    facts = list(_flat(content))
    column = min(max((len(key) for key, _ in facts), default=0), _COLUMN)
    return [visible(f"{key:<{column}}  {value}") for key, value in facts]


def _flat(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in content.items():
        key = prefix + name
        if isinstance(value, Mapping):
            yield from _flat(value, f"{key}.")
        elif isinstance(value, list | tuple) and value and isinstance(value[0], Mapping):
            rows = (", ".join(f"{column} {text}" for column, text in _flat(row)) for row in value)
            yield from ((key, row) for row in rows if row)
        elif value not in (None, "", [], ()):
            yield key, _text(value)


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        return " ".join(map(_text, value))
    return str(value)


@contextmanager
def status(text: str) -> Iterator[Progress]:
    """A line on standard error that moves while the block runs; in anything but a terminal it says nothing.

    Args:
        text: What is being done.

    Yields:
        To be told which model is measured, and how far.
    """
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True)
    with console.status(Text(visible(text))) as line:

        def update(name: str, share: float) -> None:
            line.update(Text(visible(f"{text}: {name}, {share:.0%}")))

        yield update
