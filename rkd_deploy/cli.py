"""The command line: options to function calls, results to text or JSON. No logic lives here.

Text for people goes to standard output; with --json one JSON object is the last line there, and people's text goes to
standard error. Exit codes: 0 done, 1 could not be done, 2 wrong usage, 3 a gate failed, 130 interrupted.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from rkd_deploy.commands import bench, export, train, use
from rkd_deploy.commands.options import print_json
from rkd_deploy.commands.settings import SettingsCommand
from rkd_deploy.errors import RkdError
from rkd_deploy.text import visible

app = typer.Typer(
    name="rkd-deploy",
    help="Residual knowledge distillation for image classifiers: train, export, measure, embed.",
    epilog="Start with: rkd-deploy quickstart. A traceback is shown only with --debug, which any command takes.",
    no_args_is_help=True,
    add_completion=False,
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
app.command()(bench.report)
app.command()(use.predict)
app.command()(use.verify)
app.command()(use.info)
app.command()(use.backends)


def main() -> None:
    """Entry point of the `rkd-deploy` command."""
    debug = "--debug" in sys.argv
    sys.argv[:] = [argument for argument in sys.argv if argument != "--debug"]
    try:
        app()
    except (RkdError, KeyboardInterrupt) as error:
        if debug:
            raise
        code = error.exit_code if isinstance(error, RkdError) else 130
        message = " ".join([str(error) or "Interrupted.", *getattr(error, "__notes__", ())])
        print(f"Error: {visible(message)}", file=sys.stderr)
        if "--json" in sys.argv:
            print_json({"error": message, "exit_code": code})
        sys.exit(code)


if __name__ == "__main__":
    main()
