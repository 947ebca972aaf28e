"""The README is true: its tree, its commands, its links, its Python."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import typer.main
from PIL import Image

from rkd_deploy import cli
from rkd_deploy.pipeline import export_run

REPO = Path(__file__).parents[1]
README = (REPO / "README.md").read_text(encoding="utf-8")
PAGES = [path for path in REPO.rglob("*.md") if not re.search(r"(^|/)(\.|runs/)", path.relative_to(REPO).as_posix())]


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


def test_the_python_of_the_readme_runs(tiny_run, tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    shutil.copytree(tiny_run.folder, tmp_path / "runs/digits-001")
    export_run(tiny_run, folder=tmp_path / "runs/digits-001/bundle")
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(tmp_path / "photo.png")
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    label, probability = result.stdout.split()
    assert label in "0123456789"
    assert 0 < float(probability) <= 1


def test_the_two_commands_are_the_ones_that_ci_runs():
    assert "pip install uv && uv run rkd-deploy quickstart" in README
    assert "uv run pytest" in README
    assert "uv run pytest" in (REPO / ".ci/run").read_text(encoding="utf-8")
