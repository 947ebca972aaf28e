"""The command that shows what T, S and A make of one image."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rkd_deploy.commands.options import Json, console_for, print_json, require_all
from rkd_deploy.errors import UsageError


def explain(
    run: Annotated[Path, typer.Argument(help="A finished run folder.", show_default=False)],
    image: Annotated[Path, typer.Argument(help="An image file.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", help="The page; a Markdown file goes beside it.")] = Path(
        "explain.html"
    ),
    as_json: Json = False,
) -> None:
    """Draw the feature maps of T, S and A for one image, and what A corrects."""
    if output.suffix != ".html":
        raise UsageError(f"--output {output} must end in .html: it is a page. For example: --output {output}.html")
    require_all("train", "torch", "safetensors", "matplotlib")
    from rkd_deploy.compare.explanation import write_explanation
    from rkd_deploy.report.tables import print_line
    from rkd_deploy.train.explanation import explain as explained
    from rkd_deploy.train.runs import open_run

    explanation = explained(open_run(run), image)
    pages = write_explanation(explanation, {"Run": run.name, "Image": image.name}, output)
    console = console_for(as_json)
    for name, share in explanation.explained.items():
        print_line(f"{name} explains {100 * share:.1f} % of T's map", console)
    print_line(f"Page     {pages.page}", console)
    if as_json:
        answers = {name: dict(top) for name, top in explanation.answers.items()}
        print_json({"page": str(pages.page), "explained": dict(explanation.explained), "answers": answers})
