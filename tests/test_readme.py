"""The README is true: its tree, its commands, its links. Its code blocks run in test_docs.py."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import typer.main

from rkd_deploy import cli

REPO = Path(__file__).parents[1]
README = (REPO / "README.md").read_text(encoding="utf-8")
OTHERS = re.compile(r"(^|/)(\.|runs/|build/)")
PAGES = [path for path in REPO.rglob("*.md") if not OTHERS.search(path.relative_to(REPO).as_posix())]


def test_every_folder_has_its_line():
    block = README.split("## The tree")[1].split("\n\n")[1]
    named = {line.split("/")[0].strip() for line in block.splitlines()}
    rooms = {path.parent.name for path in (REPO / "rkd_deploy").glob("*/__init__.py")}
    listed = subprocess.run(["git", "ls-files", "*/*"], cwd=REPO, capture_output=True, text=True, check=True)
    folders = {name.split("/")[0] for name in listed.stdout.splitlines()} - {".ci"}
    assert named == rooms | folders


def test_every_command_and_option_named_in_a_page_exists():
    commands = typer.main.get_command(cli.app).commands
    observed = set()
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for name, rest in re.findall(r"rkd-deploy ([a-z]+(?:-[a-z]+)*)([^`#\n|;)]*)", text):
            if name in ("in", "as", "trains", "does"):
                continue
            assert name in commands, f"{page.name}: rkd-deploy {name}"
            options = {option for parameter in commands[name].params for option in parameter.opts}
            assert set(re.findall(r"--[a-z-]+", rest)) <= options | {"--help", "--debug"}, f"{page.name}: {name}{rest}"
            observed.add(name)
    assert observed == set(commands)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO)))
def test_every_link_between_pages_leads_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def test_the_two_commands_are_the_ones_that_ci_runs():
    assert "pip install uv && uv run rkd-deploy quickstart" in README
    assert "uv run pytest" in README
    assert "uv run pytest" in (REPO / ".ci/run").read_text(encoding="utf-8")
