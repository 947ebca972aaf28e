"""Every code block of every page runs, in its order, and prints what the page shows."""

from __future__ import annotations

import re
import shutil
import sys
import unittest
from pathlib import Path

import pytest
from doc_blocks import REPO, Reader, blocks_run_by
from PIL import Image
from sharing import made_once
from sybil import Document

from rkd_deploy.pipeline import export_run
from rkd_deploy.train.runs import Run, open_run

PAGES = sorted(
    path
    for path in (REPO / "README.md", REPO / "CONTRIBUTING.md", *REPO.glob("docs/**/*.md"), *REPO.glob("*/README.md"))
    if "```" in path.read_text(encoding="utf-8")
)
RUN = {"bash", "python", "toml", "output"}
DRAWN = {"math", "mermaid", ""}
"""Blocks that show what is, and not what to do: equations, diagrams, trees of files."""

CLASSES = {"n01440764": "tench", "n02102040": "english_springer", "n02979186": "cassette_player"}

REASONS = {
    "needs a GPU",
    "needs several GPUs",
    "needs Slurm",
    "needs Docker",
    "needs a Triton server",
    "needs an OpenVINO Model Server",
    "needs Ray",
    "installs packages",
    "takes hours",
}
"""Why a block is not run here; any other reason is the test that runs it."""


@pytest.fixture(scope="module")
def examples_of_pages(tiny_run: Run, photos_once: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages speak of: photos, a finished run and its bundle, recipes, apps."""

    def make(root: Path) -> None:
        shutil.copytree(tiny_run.folder, root / "runs/digits-001")
        export_run(open_run(root / "runs/digits-001"), folder=root / "runs/digits-001/bundle")
        for folder in photos_once.glob("*/*"):
            shutil.copytree(folder, root / "photos" / folder.parent.name / CLASSES[folder.name])
        for name in ("train", "examples", "benchmarks"):
            (root / name).symlink_to(REPO / name)
        photo = next((photos_once / "val").glob("*/*"))
        shutil.copyfile(photo, root / "photo.jpg")
        Image.open(photo).save(root / "photo.png")
        command = root / ".bin/rkd-deploy"
        command.parent.mkdir()
        command.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{REPO}/tests/support/doc_blocks.py" "$@"\n')
        command.chmod(0o755)
        (root / ".bin/.curlrc").write_text("silent\nshow-error\nfail\nretry = 60\nretry-delay = 1\nretry-connrefused\n")

    return made_once(tmp_path_factory, "pages", make)


@pytest.fixture
def reader(examples_of_pages, tmp_path, monkeypatch, capfd) -> Reader:
    shutil.copytree(examples_of_pages, tmp_path / "work", symlinks=True)
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.syspath_prepend(tmp_path / "work")
    monkeypatch.setenv("COLUMNS", "120")
    return Reader(tmp_path / "work", capfd.readouterr)


def run(document: Document) -> list[str]:
    """Run the blocks of a page; the reasons of those that were not run."""
    reasons = []
    for example in document.examples():
        try:
            example.evaluate()
        except unittest.SkipTest as skipped:
            reasons.append(str(skipped))
    return reasons


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO)))
def test_the_blocks_of_a_page_run(page, reader):
    for reason in run(blocks_run_by(reader).parse(page)):
        test = re.fullmatch(r"(tests/\S+\.py) runs it", reason)
        assert (REPO / test[1]).is_file() if test else reason in REASONS, reason


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO)))
def test_every_block_says_what_it_is(page):
    """A fence of another language would be passed over in silence."""
    languages = re.findall(r"^ *```(\w*)\n.*?^ *```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert set(languages) <= RUN | DRAWN


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("```bash\nrkd-deploy info runs/none\n```", "runs/none"),
        ("```bash\necho mist; false\n```", "mist"),
        ("```bash\nrkd-deploy info\n```\n\n```output\na card of ... another world\n```", "another world"),
        ("```python\nimport rkd_deploy\nrkd_deploy.nothing\n```", "nothing"),
        ("```toml\n[data]\n```", "what is this file called"),
    ],
    ids=["command", "shell", "output", "python", "file"],
)
def test_a_block_that_is_wrong_is_noticed(reader, tmp_path, text, wrong):
    (tmp_path / "page.md").write_text(text)
    with pytest.raises((AssertionError, AttributeError), match=wrong):
        run(blocks_run_by(reader).parse(tmp_path / "page.md"))


def test_a_block_is_left_out_with_its_reason_only(reader, tmp_path):
    (tmp_path / "page.md").write_text('<!-- skip: next "needs a GPU" -->\n\n```bash\nfalse\n```\n\n```bash\ntrue\n```')
    assert run(blocks_run_by(reader).parse(tmp_path / "page.md")) == ["needs a GPU"]
