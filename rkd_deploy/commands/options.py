"""Options and output that the commands share."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer

from rkd_deploy.errors import UsageError, require, unknown_name
from rkd_deploy.storage import storage_error
from rkd_deploy.text import visible

if TYPE_CHECKING:
    from rich.console import Console

    from rkd_deploy.bench.results import Result

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


def require_all(extra: str, *modules: str) -> None:
    """Check that the libraries a command needs are installed, before it starts to work.

    Args:
        extra: The extra of this package that brings them.
        modules: Their import names.

    Raises:
        MissingDependencyError: With the install line.
    """
    for module in modules:
        if find_spec(module) is None:
            require(module, extra)


def one_of(option: str, value: str, choices: tuple[str, ...]) -> None:
    """Check the value of an option against its choices.

    Raises:
        UsageError: With the choices, and the nearest of them.
    """
    if value not in choices:
        raise UsageError(unknown_name(f"--{option}", value, choices))


def parse_ints(option: str, text: str) -> list[int]:
    """Whole numbers of an option, from text such as 0,1,2.

    Raises:
        UsageError: With an example.
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(
            f"{option} {text!r} must be whole numbers, separated by commas, e.g. {option} 0,1,2."
        ) from error


def report_folder(report: Path | None, output: Path | None) -> Path | None:
    """The folder that --report or --output names, None where neither does.

    Raises:
        UsageError: Both are given.
        MissingDependencyError: A report is wanted, and matplotlib is not installed.
    """
    if report is None:
        return output
    if output is not None:
        raise UsageError(
            f"--report {report} and --output {output}: the page stands beside the record. Give --report alone."
        )
    require_all("train", "matplotlib")
    return report


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
    """Batch sizes, from text such as 1,8,32.

    Raises:
        UsageError: Not whole numbers from 1.
    """
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1:
        raise UsageError(f"--batch {text!r} must be whole numbers from 1, separated by commas, e.g. --batch 1,8,32.")
    return sizes


def print_json(content: Any) -> None:
    """Print the JSON object of --json, the last line of standard output."""
    print(json.dumps(content, allow_nan=False), flush=True)


def without_samples(results: Iterable[Result]) -> list[dict[str, Any]]:
    """Results as a record has them, without their samples, which would fill pages."""

    def pruned(fields: dict[str, Any]) -> dict[str, Any]:
        return {
            key: pruned(value) if isinstance(value, dict) else value
            for key, value in fields.items()
            if key != "samples_ms"
        }

    return [pruned(result.to_row()) for result in results]


def as_dict(item: Any) -> dict[str, Any]:
    """A dataclass as a dictionary for JSON."""
    from dataclasses import asdict

    return asdict(item)


LEAST_WIDTH = 80
"""Columns that tables are laid out for at least: a narrower terminal wraps their lines, where cells squeezed into it
could not be read, and COLUMNS=0 would print nothing."""


def console_for(as_json: bool) -> Console:
    """The console for text for people: standard output, or standard error beside JSON.

    Strings are printed as they are: mark-up and control characters in them, of file or model names, do nothing.
    """
    from rich.console import Console

    class PlainConsole(Console):
        def print(self, *objects: Any, **how: Any) -> None:
            plain_objects = [visible(item) if isinstance(item, str) else item for item in objects]
            super().print(*plain_objects, **{"markup": False, **how})

    console = PlainConsole(stderr=as_json, highlight=False, soft_wrap=True)
    console.width = max(console.width, LEAST_WIDTH)
    return console


_COLUMN = 28
"""Width of the column of keys, in characters; a longer key pushes its value aside."""


def fact_lines(content: Mapping[str, Any]) -> list[str]:
    """Facts as lines of ``key  value``.

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


class StatusLine(Protocol):
    """Shows what is at work now."""

    def __call__(self, name: str, share: float | None = None) -> None:
        """The stage or the model, and how much of it is done, from 0 to 1, where that is known."""


@contextmanager
def status(text: str) -> Iterator[StatusLine]:
    """Shows a moving line on standard error while the block runs; prints nothing where that is no terminal.

    Args:
        text: What is being done.

    Yields:
        A function to call with the stage or the model that is at work, and its share that is done, where known.
    """
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True)
    console.width = max(console.width, LEAST_WIDTH)
    with console.status(Text(visible(text))) as line:

        def update(name: str, share: float | None = None) -> None:
            line.update(Text(visible(f"{text}: {name}" + ("" if share is None else f", {share:.0%}"))))

        yield update
