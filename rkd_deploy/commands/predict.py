"""The command predict: classifies files, folders and standard input, to text, CSV or JSON."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from rkd_deploy.commands.options import BackendName, DeviceName, Json, Model, Threads, print_json
from rkd_deploy.errors import UsageError
from rkd_deploy.text import visible

if TYPE_CHECKING:
    from rkd_deploy.serve.bulk import ClassifiedImage
    from rkd_deploy.serve.classifier import Prediction

STANDARD_OUTPUT = Path("-")

Write: TypeAlias = "Callable[[ClassifiedImage], None]"
"""Writes the line of an image."""


def predict(
    model: Model,
    images: Annotated[
        list[str], typer.Argument(help="Files, folders, globs such as 'photos/**/*.jpg'; - is an image from stdin.")
    ],
    top: Annotated[int, typer.Option("--top", help="How many classes of each.")] = 5,
    csv_file: Annotated[
        Path | None, typer.Option("--csv", help="A row for each image, instead of the text; - is standard output.")
    ] = None,
    jsonl_file: Annotated[
        Path | None, typer.Option("--jsonl", help="A JSON object a line, instead of the text; - is standard output.")
    ] = None,
    backend: BackendName = "onnxruntime",
    device: DeviceName = None,
    threads: Threads = None,
    exit_threshold: Annotated[
        float | None,
        typer.Option("--exit-threshold", help="Run the assistants only where the student is less confident than this."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Classify images: thousands of them in bounded memory.

    What cannot be read is listed at the end, with exit code 1; all others are classified and written.
    """
    from rkd_deploy.serve.bulk import classify_all, find_images
    from rkd_deploy.serve.classifier import load

    if (csv_file, jsonl_file).count(STANDARD_OUTPUT) + as_json > 1:
        raise UsageError("Standard output is asked for twice. Name a file for one of --csv, --jsonl and --json.")
    sources = find_images(images)
    unreadable, answers = list(sources.unreadable), dict[str, list[dict[str, Any]]]()
    with load(model, backend=backend, device=device, threads=threads, exit_threshold=exit_threshold) as classifier:
        columns, texts = min(top, len(classifier.labels)), csv_file is None and jsonl_file is None
        with ExitStack() as opened:
            writers = [
                opened.enter_context(each(file, columns))
                for each, file in ((_csv_rows, csv_file), (_json_lines, jsonl_file))
                if file is not None
            ]
            if texts:
                writers.append(lambda image: typer.echo(visible(_in_words(image)), err=as_json))
            for image in _with_bar(classify_all(classifier, sources.names, top), len(sources.names), texts):
                if image.error is not None:
                    unreadable.append(image.error)
                    continue
                for write in writers:
                    write(image)
                if as_json:
                    answers[image.name] = [_fields(guess) for guess in image.predictions]
        exits = list(classifier.exits)
    _print_end(sources.left_out, exits, as_json or STANDARD_OUTPUT in (csv_file, jsonl_file))
    failure = _print_unreadable(unreadable, len(sources.names))
    if as_json:
        print_json({"predictions": answers, **({"exits": exits} if exits else {}), **failure})
    if failure:
        raise typer.Exit(1)


def _print_end(left_out: dict[str, int], exits: list[int], beside: bool) -> None:
    from rkd_deploy.image_folders import left_out_in_words

    if exits:
        typer.echo(f"{exits[0]} of {sum(exits)} images left after S alone.", err=beside)
    if left_out:
        typer.echo(visible(f"No images by their suffix, left out: {left_out_in_words(left_out)}."), err=True)


def _print_unreadable(messages: list[str], images: int) -> dict[str, Any]:
    """List what could not be read on standard error; the same for --json, nothing where all was read."""
    if not messages:
        return {}
    if len(messages) == images == 1:
        error = messages[0]
    else:
        for message in messages:
            typer.echo(visible(message), err=True)
        error = f"{len(messages):,} could not be read and are listed above; all others are classified."
    typer.echo(visible(f"Error: {error}"), err=True)
    return {"error": error, "exit_code": 1, "unreadable": messages}


def _with_bar(images: Iterator[ClassifiedImage], count: int, texts: bool) -> Iterator[ClassifiedImage]:
    """Pass images on, and show a bar on standard error where that is a terminal and no text goes to one."""
    if not sys.stderr.isatty() or (texts and sys.stdout.isatty()):
        yield from images
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("Classifying"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        yield from bars.track(images, total=count)


@contextmanager
def _csv_rows(file: Path, columns: int) -> Iterator[Write]:
    with _lines_to(file) as write_line:

        def write(cells: Iterable[object]) -> None:
            line = io.StringIO()
            csv.writer(line, lineterminator="\n").writerow(cells)
            write_line(line.getvalue())

        write(["image", *(f"{name}_{rank}" for rank in range(1, columns + 1) for name in ("label", "probability"))])
        yield lambda image: write(
            [image.name, *(cell for guess in image.predictions for cell in (guess.label, f"{guess.probability:.6g}"))]
        )


@contextmanager
def _json_lines(file: Path, columns: int) -> Iterator[Write]:
    with _lines_to(file) as write_line:
        yield lambda image: write_line(
            json.dumps({"image": image.name, "predictions": [_fields(guess) for guess in image.predictions]}) + "\n"
        )


@contextmanager
def _lines_to(file: Path) -> Iterator[Callable[[str], None]]:
    """Writes text to standard output at once, or to a file that appears whole when the block ends well."""
    from rkd_deploy.storage import new_file

    if file == STANDARD_OUTPUT:
        yield lambda text: typer.echo(text, nl=False)
        return
    with new_file(file) as stream:

        def write_line(text: str) -> None:
            stream.write(text.encode(errors="surrogateescape"))  # a file's name may hold bytes that are no text

        yield write_line


def _in_words(image: ClassifiedImage) -> str:
    guesses = ", ".join(f"{guess.label} {100 * guess.probability:.1f} %" for guess in image.predictions)
    return f"{image.name}: {guesses}"


def _fields(guess: Prediction) -> dict[str, Any]:
    return {"label": guess.label, "probability": guess.probability}
