"""Writes the generated parts of the pages here: rooms, tree and trips of the code, keys of recipes.

    uv run python docs/pages.py           # write them
    uv run python docs/pages.py --check   # exit 1 when a page and the code differ

A part stands between `<!-- NAME -->` and `<!-- end -->`. The rooms are drawn from the imports (grimp), the tree from
the first line of each file, a trip from a run on tiny images, watched from inside, and the keys from their dataclasses.
"""

from __future__ import annotations

import ast
import inspect
import os
import re
import subprocess
import sys
import tempfile
import threading
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

REPO = Path(__file__).parents[1]
PACKAGE = REPO / "rkd_deploy"
PAGES = (REPO / "docs/reference/architecture.md", REPO / "docs/reference/recipe.md")
_BLOCK = re.compile(r"(<!-- (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)

# What these files are for stands nowhere inside them.
DESCRIPTIONS = {
    ".ci/run": "What CI runs.",
    ".gitignore": "What stays out of git.",
    ".pre-commit-config.yaml": "Linters before each commit.",
    "CHANGELOG.md": "What changed for users.",
    "CITATION.cff": "What to cite.",
    "CONTRIBUTING.md": "Rules of code, words and evidence.",
    "LICENSE": "Apache-2.0.",
    "README.md": "The front page.",
    "docs/method/explain.png": "T, S and A on one digit, by rkd-deploy explain (docs/method/how-it-works.md).",
    "docs/method/residual.svg": "The method as a picture (docs/method/how-it-works.md).",
    "docs/results/ladder.png": "S + A beside S0 by every loss, as a picture (docs/results/ladder.md).",
    "docs/results/photos.png": "Accuracy over latency on real photos, as a picture (docs/results/photos.md).",
    "examples/browser/icon.svg": "The icon of the page.",
    "examples/browser/index.html": "The page.",
    "pyproject.toml": "Package, extras, pins, every linter, the contracts of imports.",
    "rkd_deploy/py.typed": "Marks the package as typed.",
    "tests/conftest.py": "",
}
FOLDERS = {
    "benchmarks": "Every claim about speed or accuracy: a script each, and its records (`THEME_HARDWARE_DATE.json`).",
    "docs": "What the README is too short for; what a site is made of.",
    "docs/guides": "How to do one thing.",
    "docs/method": "Why it works.",
    "docs/reference": "To look up: much of it made from the code.",
    "docs/results": "What was measured.",
    "examples": "Small apps that embed a bundle.",
    "export": "Which export for what; run, not imported.",
    "rkd_deploy": "The package, a room a folder.",
    "serve": "How to serve a bundle; run, not imported.",
    "tests": "Mirrors rkd_deploy: the tests of a file have its name.",
    "train": "Recipes; run, not imported.",
}
DESCRIPTIONS_BY_NAME = {".npmrc": "No scripts of packages are run.", "package.json": "npm packages, pinned."}
_NOT_LISTED = re.compile(r"benchmarks/.*\.json|tests/(?!support/|conftest\.py).*")

# Counted by this script's own trace of commit ccc9a7a, before the rooms were made (issue 12 had counted 48, 57, 11 and
# 2 by reading, which leaves out what only a trace sees: checks, storage, errors, the machine).
FILES_BEFORE = {"fit": 53, "export": 38, "bench": 24, "predict": 4}

TINY = (
    "name=tiny",
    "data.image_size=8",
    "data.train_limit=64",
    "data.test_limit=32",
    "data.augment=['crop']",
    "data.crop_padding=1",
    "teacher.name=resnet8",
    "student.name=resnet8",
    "train.epochs=1",
    "train.batch_size=16",
    "train.device=cpu",
    "train.threads=1",
    "train.curves=false",
    "train.tensorboard=false",
)


# --- the rooms


def rooms() -> str:
    """Rooms and arrows as a Mermaid graph, floors as the import contract of pyproject.toml orders them."""
    arrows = imports_between_rooms()
    lines = ["```mermaid", "flowchart TD"]
    for number, floor in enumerate(floors()):
        lines.append(f'  subgraph floor{number}[" "]')
        lines += [f"    {room}" for room in floor]
        lines.append("  end")
    lines += [f"  {above} --> {below}" for above, below in sorted(_without_detours(arrows))]
    lines += ["```", ""]
    lines += ["| room | imports |", "| --- | --- |"]
    for floor in floors():
        for room in floor:
            below = sorted(target for source, target in arrows if source == room)
            lines.append(f"| {room} | {', '.join(below) or 'nothing of the package'} |")
    return "\n".join(lines) + "\n"


def floors() -> list[list[str]]:
    """The rooms of each floor, the highest first, as the contract in pyproject.toml has them."""
    settings = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))
    contract = next(one for one in settings["tool"]["importlinter"]["contracts"] if one["type"] == "layers")
    return [[name.strip().rpartition(".")[2] for name in layer.split("|")] for layer in contract["layers"]]


def imports_between_rooms() -> set[tuple[str, str]]:
    """(importing room, imported room); what is imported for type checkers alone is left out."""
    import grimp

    graph = grimp.build_graph("rkd_deploy", exclude_type_checking_imports=True)
    found = set()
    for module in graph.modules:
        for target in graph.find_modules_directly_imported_by(module):
            pair = (_room(module), _room(target))
            if pair[0] != pair[1] and "rkd_deploy" not in pair:
                found.add(pair)
    return found


def _room(module: str) -> str:
    return ".".join(module.split(".")[1:2]) or module


def _without_detours(arrows: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """Arrows that no longer path implies: the least that has the same order."""
    below: dict[str, set[str]] = {}
    for source, target in arrows:
        below.setdefault(source, set()).add(target)

    def reached(room: str) -> set[str]:
        found, left = set[str](), [room]
        while left:
            new = below.get(left.pop(), set()) - found
            found |= new
            left += new
        return found

    return {
        (source, target)
        for source, target in arrows
        if not any(target in reached(other) for other in below[source] - {target})
    }


# --- the tree


def tree() -> str:
    """Every file with what it is for, as an indented list."""
    lines, shown = ["```"], set[str]()
    for path in sorted(_files(), key=_order):
        for depth, folder in reversed(list(enumerate(path.parents))[:-1]):
            if str(folder) not in shown:
                shown.add(str(folder))
                level = len(path.parents) - depth - 2
                lines.append(_line(level, folder.name + "/", folder_description(folder)))
        if path.name != "__init__.py":
            lines.append(_line(len(path.parents) - 1, path.name, description(path)))
    return "\n".join([*lines, "```"]) + "\n"


def _files() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=REPO, capture_output=True, text=True, check=True
    )
    names = sorted(set(listed.stdout.splitlines()))
    return [Path(name) for name in names if (REPO / name).is_file() and not _NOT_LISTED.fullmatch(name)]


def _order(path: Path) -> tuple[Any, ...]:
    """Files of a folder before the folders in it; the package first of the folders."""
    return tuple((part != path, part.name != "rkd_deploy", part.name) for part in _steps(path))


def _steps(path: Path) -> list[Path]:
    return [*list(path.parents)[-2::-1], path]


def _line(level: int, name: str, text: str) -> str:
    return f"{'  ' * level + name:<30}  {text}".rstrip()


def folder_description(folder: Path) -> str:
    """The first line of a package's docstring, or what FOLDERS says."""
    if str(folder) in FOLDERS:
        return FOLDERS[str(folder)]
    package = REPO / folder / "__init__.py"
    return docstring_line(package) if package.is_file() else ""


def description(path: Path) -> str:
    """What a file is for, from its own first line or from DESCRIPTIONS."""
    if text := DESCRIPTIONS.get(str(path)) or DESCRIPTIONS_BY_NAME.get(path.name):
        return text
    if path.suffix == ".py":
        return docstring_line(REPO / path)
    text = (REPO / path).read_text(encoding="utf-8")
    first = re.sub(r"^#!.*\n", "", text).split("\n", 1)[0]
    return re.sub(r"^(#|//|/\*|<!--)\s*|\s*(\*/|-->)$", "", first).strip()


def docstring_line(path: Path) -> str:
    """The first line of a module's docstring."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    return text.split("\n", 1)[0] if text else ""


# --- four trips


@dataclass
class Trip:
    """The files that a call enters, and by which of their functions, in the order of the first time."""

    package: Path = PACKAGE
    doors: dict[str, list[str]] = field(default_factory=dict)
    """File, from the package on, to the public functions of it that another file called."""
    importing: int = 0
    """How many imports are in progress."""

    def watch(self, call: Callable[[], Any]) -> Any:
        """Runs a call and writes down where it goes; work of other threads is not followed."""
        assert threading.current_thread() is threading.main_thread()
        sys.setprofile(self._entered)
        try:
            return call()
        finally:
            sys.setprofile(None)

    def _entered(self, frame: FrameType, event: str, _: object) -> None:
        if frame.f_code.co_name == "<module>":  # an import on the way: what it does was nobody's errand
            self.importing += {"call": 1, "return": -1}.get(event, 0)
        if event != "call" or self.importing or (file := self._file(frame)) is None:
            return
        doors, name = self.doors.setdefault(file, []), frame.f_code.co_qualname
        public = not any(part.startswith(("_", "<")) for part in name.split("."))
        if public and name not in doors and frame.f_back is not None and self._file(frame.f_back) != file:
            doors.append(name)

    def _file(self, frame: FrameType) -> str | None:
        """The frame's file below the package; None for other code and for what is no function."""
        name = frame.f_code.co_filename
        if not frame.f_code.co_flags & inspect.CO_OPTIMIZED or not name.startswith(f"{self.package}{os.sep}"):
            return None
        return name[len(str(self.package)) + 1 :]


def trips() -> str:
    """The four trips as lists."""
    titles = {
        "fit": ("recipe to run", "fit(read_recipe(path))"),
        "export": ("run to bundle", "export_run(run)"),
        "bench": ("model to bench record", "record_bench(...)"),
        "predict": ("image to label", "classifier.predict(image)"),
    }
    lines = []
    for name, trip in watched().items():
        what, call = titles[name]
        lines += [f"### {what[0].upper()}{what[1:]}", ""]
        lines += [f"`{call}` enters {len(trip.doors)} files; before the rooms, {FILES_BEFORE[name]}.", ""]
        for number, (file, doors) in enumerate(trip.doors.items(), 1):
            lines.append(f"{number}. `{file}`" + (f": {', '.join(doors)}" if doors else ""))
        lines.append("")
    return "\n".join(lines)


def watched() -> dict[str, Trip]:
    """The four trips, made for real on 8x8 digits; takes some seconds."""
    made = {name: Trip() for name in FILES_BEFORE}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["RKD_DEPLOY_CACHE"] = f"{folder}/cache"  # nothing that earlier runs left shortens the way
        run = made["fit"].watch(lambda: _fit(Path(folder)))
        bundle = made["export"].watch(lambda: _export(run))
        made["bench"].watch(lambda: _bench(bundle, Path(folder) / "bench"))
        _predict(bundle, made["predict"])
    return made


def _fit(root: Path) -> Any:
    from rkd_deploy.recipe import read_recipe
    from rkd_deploy.train.fitting import fit

    return fit(read_recipe(None, TINY), root=root)


def _export(run: Any) -> Path:
    from rkd_deploy.pipeline import export_run

    export_run(run)
    return Path(run.folder) / "bundle"


def _bench(bundle: Path, folder: Path) -> None:
    from rkd_deploy.bench import BenchSettings
    from rkd_deploy.bench.records import record_bench

    settings = BenchSettings(batches=(1,), min_seconds=0.01, min_runs=5, warmup_seconds=0.01)
    record_bench([bundle], settings, folder)


def _predict(bundle: Path, trip: Trip) -> None:
    import numpy as np

    from rkd_deploy.serve.classifier import load

    with load(bundle) as classifier:  # loading is a trip of its own
        trip.watch(lambda: classifier.predict(np.zeros((20, 30, 3), np.uint8)))


# --- the keys of recipes


def keys() -> str:
    """Every key of a recipe as tables."""
    from rkd_deploy.recipe.keys import recipe_keys

    lines, table = list[str](), ""
    for key in recipe_keys():
        if key.table != table:
            table = key.table
            lines += ["", f"## [{table}]", "", "| key | default | meaning |", "| --- | --- | --- |"]
        default = "" if key.default is None else f"`{key.default}`"
        lines.append(f"| `{key.name}` | {default} | {key.sentences.replace('|', chr(92) + '|')} |")
    return "\n".join(lines[1:]) + "\n"


# --- the pages


PARTS: dict[str, Callable[[], str]] = {"rooms": rooms, "tree": tree, "trips": trips, "keys": keys}


def made(page: Path) -> str:
    """A page as it should be, its generated parts made anew."""
    return _BLOCK.sub(lambda match: match[1] + PARTS[match[2]]() + match[4], page.read_text(encoding="utf-8"))


def main() -> None:
    """Write the pages, or with --check say which are not as they should be."""
    sys.path.insert(0, str(REPO))
    for page in PAGES:
        text = made(page)
        if "--check" not in sys.argv:
            page.write_text(text, encoding="utf-8")
        elif text != page.read_text(encoding="utf-8"):
            sys.exit(f"{page.relative_to(REPO)} is not what the code says. Write it: uv run python docs/pages.py")


if __name__ == "__main__":
    main()
