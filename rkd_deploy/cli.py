"""The command line: options to function calls, results to text or JSON. No logic lives here.

Text for people goes to standard output; with --json one JSON object is the last line there, and people's text goes to
standard error. Exit codes: 0 done, 1 could not be done, 2 wrong usage, 3 a gate failed, 130 interrupted.
"""

from __future__ import annotations

import io
import os
import signal
import sys
from typing import Annotated

import typer

from rkd_deploy.commands import bench, explain, export, predict, serve, train, use
from rkd_deploy.commands.options import print_json
from rkd_deploy.commands.settings import SettingsCommand
from rkd_deploy.errors import RkdError, missing_package, shortened
from rkd_deploy.signals import handling
from rkd_deploy.text import visible

INTERRUPTED = 130
"""Exit code of a command that Ctrl-C or SIGTERM ended."""

app = typer.Typer(
    name="rkd-deploy",
    help="Residual knowledge distillation for image classifiers: train, export, measure, embed.",
    epilog="Start with: rkd-deploy quickstart. A traceback is shown only with --debug, which any command takes.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: rich alone would take half of the time that --help may take
)


@app.callback(invoke_without_command=True)
def _version(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False
) -> None:
    if version:
        from rkd_deploy import __version__

        typer.echo(f"rkd-deploy {__version__}")
        raise typer.Exit


app.command()(train.quickstart)
app.command()(train.train)
app.command(cls=SettingsCommand)(export.export)
app.command()(bench.bench)
app.command("bench-compare")(bench.bench_compare)
app.command()(train.compare)
app.command()(explain.explain)
app.command()(bench.report)
app.command()(predict.predict)
app.command(cls=SettingsCommand)(serve.serve)
app.command()(use.verify)
app.command()(use.info)
app.command()(use.backends)


def main() -> None:
    """Entry point of the `rkd-deploy` command: every way that a command ends passes here."""
    debug = "--debug" in sys.argv
    sys.argv[:] = [argument for argument in sys.argv if argument != "--debug"]
    try:
        _check_outputs()
        # SIGTERM ends a command as Ctrl-C does: what is open is closed, and temporary files go.
        with handling(signal.default_int_handler, (signal.SIGTERM,)):
            try:
                _run(debug)
            finally:
                sys.stdout.flush()  # here, and not when the interpreter ends, where an error has no handler
    except OSError as error:
        if error.filename is None:
            _give_up_output(error)
        elif debug:
            raise
        else:  # a file's error, which a room ought to have made one of its own
            name = error.filename if isinstance(error.filename, str) else os.fsdecode(error.filename)
            print(f"Error: {visible(shortened(name))} cannot be used: {error.strerror}.", file=sys.stderr)
        sys.exit(1)


def _run(debug: bool) -> None:
    try:
        try:
            app()
        except ModuleNotFoundError as error:  # whichever room met it first
            raise (missing_package(error) or error) from error
    except (RkdError, SystemExit, KeyboardInterrupt) as error:
        # Typer makes an exit of a KeyboardInterrupt once it is at work, and of its own errors, which it has shown then.
        if debug or (isinstance(error, SystemExit) and error.code != INTERRUPTED):
            raise
        code = error.exit_code if isinstance(error, RkdError) else INTERRUPTED
        message = " ".join(
            [str(error) if isinstance(error, RkdError) else "Interrupted.", *getattr(error, "__notes__", ())]
        )
        print(f"Error: {visible(message)}", file=sys.stderr)
        if "--json" in sys.argv:
            print_json({"error": message, "exit_code": code})
        sys.exit(code)


def _check_outputs() -> None:
    """Make sure that both outputs are there, and write as an escape what their encoding lacks."""
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (it stays open to the end)
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        raise OSError("it is closed")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _give_up_output(error: OSError) -> None:
    """Say what is wrong with standard output; a reader that went away, such as head, is no news."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # What is still buffered would be tried again when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if not isinstance(error, BrokenPipeError):
        print(f"Error: standard output cannot be written to: {error.strerror or error}.", file=sys.stderr)


if __name__ == "__main__":
    main()
