"""Runs the code blocks of a page as a reader would: shell commands, Python, files and shown output, in their order."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from sybil import Example, Sybil
from sybil.parsers.markdown import CodeBlockParser, SkipParser

REPO = Path(__file__).parents[2]

SHORTER = {
    "train": "--set train.epochs=1 --set teacher.epochs=3 --set train.threads=1 --set train.curves=false "
    "--set data.image_size=16 --set train.batch_size=8 --set train.lr=0.02 "
    "--set train.tensorboard=false --set train.device=cpu",
    "bench": "--seconds 0.01 --count 3 --warmup 0",
    "bench-compare": "--seconds 0.01",
    "compare": "--no-latency",
}
"""What is added to a page's command here, so that it takes a second; all else is run as it is shown."""

FEWER_DIGITS = "--set data.train_limit=200 --set data.test_limit=40"
"""The photos of the tests are few already."""

VERDICTS = {"bench-compare": (0, 3)}
"""Exit codes that are an answer."""

_FILE = re.compile(r"<!-- file: (\S+) -->\s*$")
_SHELL = re.compile(r"[&|<>;$*?`]")


@dataclass
class Reader:
    """Somebody who follows a page, in a folder, and sees what the last block printed."""

    folder: Path
    capture: Callable[[], tuple[str, str]]
    output: str = ""

    def shell(self, example: Example) -> None:
        """Run a block of commands: in this process where they are the package's own, else by bash."""
        commands = [line for line in example.parsed.replace("\\\n", " ").splitlines() if line.split("#")[0].strip()]
        self.output = ""
        if all(command.split()[0] == "rkd-deploy" and not _SHELL.search(_bare(command)) for command in commands):
            for command in commands:
                self._own(shlex.split(command, comments=True)[1:])
            return
        environment = {
            **os.environ,
            "PATH": f"{self.folder / '.bin'}:{os.environ['PATH']}",
            "PYTHONPATH": str(REPO),
            "CURL_HOME": str(self.folder / ".bin"),  # .curlrc: waits until a server that was started before answers
        }
        port = str(free_port())  # that of the page may be taken here
        script = example.parsed.replace("rkd-deploy serve", f"rkd-deploy serve --port {port}")
        script = script.replace(":8000", f":{port}")
        command = ["bash", "-euc", f"trap 'kill $(jobs -p) 2>/dev/null || true; wait' EXIT\n{script}"]
        result = subprocess.run(
            command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        self.output = result.stdout + result.stderr
        assert result.returncode == 0, self.output

    def _own(self, arguments: list[str]) -> None:
        from rkd_deploy import cli

        self.capture()
        code = 0
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["rkd-deploy", *shortened(arguments)])
            try:
                cli.main()
            except SystemExit as stop:
                code = int(stop.code or 0)
        self.output += "".join(self.capture())
        assert code in VERDICTS.get(arguments[0], (0,)), f"{shlex.join(arguments)} ended with {code}: {self.output}"

    def written(self, example: Example) -> None:
        """Write a block that is the content of a file, named in a comment above it."""
        name = _FILE.search(example.document.text[: example.start])
        assert name, "what is this file called? Say so above it: <!-- file: NAME -->"
        (self.folder / name[1]).write_text(example.parsed, encoding="utf-8")

    def shown(self, example: Example) -> None:
        """Hold a block of output against what was printed; "..." stands for anything."""
        parts = " ".join(example.parsed.split()).split("...")
        pattern = ".*?".join(map(re.escape, parts))
        printed = " ".join(self.output.split())
        assert re.search(pattern, printed), f"shown:\n{example.parsed}\nprinted:\n{self.output}"


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])


def _bare(command: str) -> str:
    """A command without what is quoted and without its comment."""
    return re.sub(r"'[^']*'|\"[^\"]*\"", "", command).split(" #")[0]


def shortened(arguments: list[str]) -> list[str]:
    """A command's arguments with what SHORTER adds."""
    few = FEWER_DIGITS if arguments[0] == "train" and "data.name=imagefolder" not in arguments else ""
    return [*arguments, *f"{SHORTER.get(arguments[0], '')} {few}".split()]


def blocks_run_by(reader: Reader) -> Sybil:
    """What reads a page and runs its blocks for a reader."""

    def python(example: Example) -> None:
        if _FILE.search(example.document.text[: example.start]):
            reader.written(example)
            return
        reader.capture()
        exec(compile(example.parsed, f"{example.path}:{example.line}", "exec"), example.namespace)
        reader.output = "".join(reader.capture())

    return Sybil(
        [
            CodeBlockParser("bash", reader.shell),
            CodeBlockParser("python", python),
            CodeBlockParser("toml", reader.written),
            CodeBlockParser("output", reader.shown),
            SkipParser(),
        ]
    )


if __name__ == "__main__":  # rkd-deploy, for what bash runs
    from rkd_deploy import cli

    sys.argv = ["rkd-deploy", *shortened(sys.argv[1:])]
    cli.main()
