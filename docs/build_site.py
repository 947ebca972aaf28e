"""Builds the documentation site of the pages here and checks every link of it.

    uv run python docs/build_site.py
    python -m http.server --directory build/docs/site      # and open http://localhost:8000

Pages are written for two readers: GitHub, where links lead to files of the repository, and the site, which has pages
alone. So they are staged first: a link to a page stays one, a file of the repository that is linked becomes a page that
shows it, equations become MathML, and diagrams are drawn here, so that no reader's browser asks anybody for anything.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from site_links import broken_links

DOCS = Path(__file__).resolve().parent
REPO = DOCS.parent
STAGE = REPO / "build" / "docs"
SITE = STAGE / "site"

FROM_OTHER_FOLDERS = {
    "README.md": "index.md",
    "train/README.md": "guides/recipes.md",
    "export/README.md": "guides/export.md",
    "serve/README.md": "guides/serve.md",
    "examples/README.md": "guides/examples.md",
    "examples/mobile/README.md": "guides/phones.md",
    "benchmarks/README.md": "results/benchmarks.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
"""Pages that lie beside what they speak of, and where the site has them. The README's place is docs/index.md's."""

_LINK = re.compile(r"`[^`\n]+`|\]\(([^)\s]+)\)")
"""A link's target, or inline code, which has none."""
_FENCE = re.compile(r"^( *)(`{3,})(\w*)\n(.*?)^\1\2$", re.MULTILINE | re.DOTALL)
_INLINE_EQUATION = re.compile(r"\$`([^`]+)`\$")
_NOT_RUN = re.compile(r'^<!-- skip: next "(.+?)" -->$', re.MULTILINE)
_FILE = re.compile(r"^<!-- file: (\S+) -->$", re.MULTILINE)


class Staging:
    """The folder that Zensical reads, filled page by page."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.places = {f"docs/{path.relative_to(DOCS)}": str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")}
        self.places |= {source: place for source, place in FROM_OTHER_FOLDERS.items() if source != "README.md"}
        self.drawings = 0

    def fill(self) -> None:
        """Write every page, what they show, and what is made from the code."""
        for source, place in list(self.places.items()):
            self.write(place, self.page(source, place, (REPO / source).read_text(encoding="utf-8")))
        for path in [*DOCS.rglob("*.png"), *DOCS.rglob("*.svg"), *DOCS.rglob("*.css")]:
            target = self.root / path.relative_to(DOCS)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        self.write("reference/commands.md", command_line())
        self.write("reference/python.md", python_names())

    def write(self, place: str, text: str) -> None:
        """Write one staged file."""
        path = self.root / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")

    def page(self, source: str, place: str, text: str) -> str:
        """A page as the site needs it: prose and code apart, because neither links nor equations stand in code."""
        parts, end = list[str](), 0
        for fence in _FENCE.finditer(text):
            parts += [self._prose(source, place, text[end : fence.start()]), self._fence(place, fence)]
            end = fence.end()
        return "".join([*parts, self._prose(source, place, text[end:])])

    def _prose(self, source: str, place: str, text: str) -> str:
        text = _INLINE_EQUATION.sub(lambda equation: math_ml(equation[1], "inline"), text)
        text = _LINK.sub(lambda link: f"]({self.link(source, place, link[1])})" if link[1] else link[0], text)
        text = _FILE.sub(r'<p class="above">\1</p>\n', text)
        return _NOT_RUN.sub(_not_run, text)

    def _fence(self, place: str, fence: re.Match[str]) -> str:
        if fence[3] == "math":
            return f'<div class="equation">{math_ml(fence[4], "block")}</div>'
        if fence[3] == "mermaid":
            self.drawings += 1
            drawing = f"drawings/{self.drawings}.svg"
            self.write(drawing, draw(fence[4]))
            return f"![Diagram]({relative(drawing, place)}){{ .drawing }}"
        return fence[0]

    def link(self, source: str, place: str, target: str) -> str:
        """Where a link of a page leads on the site.

        Raises:
            SystemExit: It leads to nothing in the repository.
        """
        path, hash_sign, anchor = target.partition("#")
        if not path or re.match(r"[a-z]+:", target):
            return target
        name = os.path.normpath(Path(source).parent / path)
        if name == "README.md":
            return relative("index.md", place)
        if (REPO / name).is_dir():
            name = f"{name}/README.md"
        if name not in self.places:
            if not (REPO / name).is_file():
                sys.exit(f"{source}: {target} leads to {name}, which is not there. Mend the link.")
            if name.startswith("docs/") and not name.endswith(".py"):
                return relative(name.removeprefix("docs/"), place)
            self.places[name] = f"files/{name}.md"
            self.write(self.places[name], show(name))
        return relative(self.places[name], place) + hash_sign + anchor


def _not_run(skip: re.Match[str]) -> str:
    """A line above a block that no test runs; where a test of its own does, the reader need not know."""
    if skip[1].startswith("tests/") or skip[1] == "installs packages":
        return ""
    return f'<p class="above">Not run by the tests: {skip[1]}</p>\n'


def relative(target: str, place: str) -> str:
    """The way from one page of the site to a file of it."""
    return os.path.relpath(target, Path(place).parent)


def show(name: str) -> str:
    """A file of the repository as a page; the search leaves it out."""
    text = (REPO / name).read_text(encoding="utf-8")
    language = {".py": "python", ".js": "js", ".mjs": "js", ".toml": "toml", ".cpp": "cpp", ".hpp": "cpp"}
    kind = language.get(Path(name).suffix, "text")
    head = f"---\ntitle: {name}\nsearch:\n  exclude: true\nhide:\n  - toc\n---\n\n# {name}\n\n"
    return f"{head}`````{kind}\n{text}\n`````\n"


def math_ml(latex: str, display: str) -> str:
    """An equation as MathML, which browsers set without any script."""
    from latex2mathml.converter import convert

    rows = latex.replace("{aligned}", "{split}")  # GitHub's name of it, and that of this library
    made: str = convert(" ".join(rows.split()), display=display)
    return made.replace("*", "&#42;").replace("_", "&#95;")  # no emphasis to Markdown


def draw(source: str) -> str:
    """A Mermaid diagram as SVG, by mermaid.js itself inside of QuickJS."""
    import mermaidx

    svg: str = mermaidx.render(source, theme="neutral", config={"htmlLabels": False}).svg()
    return svg


def command_line() -> str:
    """Every command with its arguments and options, from typer's own description of them."""
    import typer.main
    from typer.cli import get_docs_for_click

    from rkd_deploy.cli import app

    group = typer.main.get_command(app)
    text = get_docs_for_click(obj=group, ctx=typer.Context(group, info_name="rkd-deploy"), name="rkd-deploy")
    return "\n".join(_command_lines(text)) + "\n"


def _command_lines(text: str) -> Iterator[str]:
    yield "# Command line\n\nMade from the commands themselves; `rkd-deploy COMMAND --help` shows the same.\n"
    for line in text.splitlines()[2:]:
        yield re.sub(r"^\* `(.*?) <(.*?)>`:", r"* `\1` *\2*:", line)


SUBJECTS = {
    "Train": ("Recipe", "read_recipe", "fit", "Separation", "separate"),
    "Export": ("fuse", "export_bundle", "verify", "ModelCard", "Preprocess"),
    "Embed": ("load", "Classifier", "Prediction"),
    "Measure": ("load_backend", "RunOn", "Backend", "measure"),
    "Errors": ("RkdError",),
}
"""The public names, as a reader looks for them."""


def python_names() -> str:
    """What `import rkd_deploy` offers, from its docstrings."""
    import rkd_deploy

    left_out = set(rkd_deploy.__all__) ^ {name for names in SUBJECTS.values() for name in names}
    if left_out:
        sys.exit(f"SUBJECTS of docs/build_site.py and rkd_deploy.__all__ differ: {', '.join(sorted(left_out))}")
    parts = [
        "# Python\n\nEvery public name; `import rkd_deploy` loads none of them until it is used, and PyTorch for few."
    ]
    for subject, names in SUBJECTS.items():
        parts.append(f"## {subject}")
        for name in names:
            value = getattr(rkd_deploy, name)
            parts.append(f"::: {value.__module__}.{value.__qualname__}")
    return "\n\n".join(parts) + "\n"


def without_a_place(stage: Path) -> list[str]:
    """Staged pages that the navigation does not lead to; those that show a file need no place in it."""
    settings = (stage / "zensical.toml").read_text(encoding="utf-8")
    names = (path.relative_to(stage / "pages").as_posix() for path in (stage / "pages").rglob("*.md"))
    return sorted(name for name in names if f'"{name}"' not in settings and not name.startswith("files/"))


def build() -> None:
    """Stage the pages, run Zensical strictly, check the links of what it wrote."""
    shutil.rmtree(STAGE, ignore_errors=True)
    staging = Staging(STAGE / "pages")
    staging.fill()
    shutil.copyfile(DOCS / "zensical.toml", STAGE / "zensical.toml")
    if strangers := without_a_place(STAGE):
        sys.exit(f"docs/zensical.toml has no place in nav for {', '.join(strangers)}. Give each one.")
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--config-file", str(STAGE / "zensical.toml")]
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if result.returncode:
        sys.exit(f"{result.stdout}{result.stderr}")
    if broken := broken_links(SITE):
        sys.exit("\n".join([*broken, f"{len(broken)} links of the site lead nowhere."]))
    print(f"{SITE.relative_to(REPO)}/index.html")


if __name__ == "__main__":
    sys.path.insert(0, str(REPO))
    build()
