"""Values and files to break things with, and what a fault is; `faults.py` draws them."""

from __future__ import annotations

import itertools
import json
import os
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 46827520\n"
ESCAPE = "\x1b]0;owned\x07\x1b[31mError: all is well\n"
FORMATS = {"jpg": "JPEG", "png": "PNG", "bmp": "BMP", "gif": "GIF", "tiff": "TIFF", "webp": "WEBP", "ppm": "PPM"}

# What no value of a recipe, a card or a record should be, as JSON and TOML write it.
JSON_VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 1.5, 2**31, 2**63, 10**30, 1e308, -0.0, "", "nan", "\0", ESCAPE, "x" * 5000),
    *([], {}, [[]], [None], {"": 0}, list(range(50))),
)
TOML_VALUES = (
    *("nan", "inf", "-inf", "-1", "0", "1.5", "1e400", "1" * 5000, "true", "''", "'\\n'", '"\\u0000"', "[]", "{}"),
    *("[[]]", "[" * 3000, "2026-11-26", "'x' x", "\n[data]\nname='x'", "9223372036854775808", "'~/nothing'"),
)
CALL_VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 1.5, float("nan"), float("inf"), 2**31, 10**30, "", "x", "\0", ESCAPE, "x" * 5000, b"x"),
    *([], {}, (), [None], object(), Path("/dev/zero"), Path("absent"), (1, 2, 3)),
)


class WronglyAcceptedError(Exception):
    """Damage that ought to have been noticed gave a result."""


@dataclass(frozen=True)
class Material:
    """Whole files that faults are made from.

    Attributes:
        run: A finished run.
        bundle: Exported from it.
        record: A bench.json of it.
        photo: A JPEG.
    """

    run: Path
    bundle: Path
    record: Path
    photo: Path


@dataclass(frozen=True)
class Fault:
    """One thing that somebody may come with.

    Attributes:
        group: One of `faults.GROUPS`.
        name: What it is, in words.
        run: Prepares it in the current folder and runs it; raises what the package raises, and
            `WronglyAcceptedError` where a result is wrong.
        by_command: Whether it ends as a command does, with an exit code and text.
    """

    group: str
    name: str
    run: Callable[[], object]
    by_command: bool = False


def run_command(*words: object) -> None:
    """Run a command of the package in this process."""
    from rkd_deploy.cli import main

    sys.argv[:] = ["rkd-deploy", *map(str, words)]
    main()


# Damage of bytes and of files.


def damaged(content: bytes, chance: random.Random) -> tuple[bytes, str]:
    """Bytes that are damaged in one way, and which."""
    data, size = bytearray(content), len(content)
    way = chance.choice(("flipped bits", "cut off", "zeroed", "numbers at their ends", "garbage", "repeated", "empty"))
    if way == "flipped bits":
        for _ in range(chance.choice((1, 1, 1, 8, 64))):
            data[chance.randrange(size)] ^= 1 << chance.randrange(8)
    elif way == "cut off":
        del data[chance.randrange(size) :]
    elif way == "zeroed":
        start = chance.randrange(size)
        data[start : start + 4096] = bytes(len(data[start : start + 4096]))
    elif way == "numbers at their ends":
        start = chance.randrange(min(size, 256))
        data[start : start + 4] = chance.choice((b"\xff" * 4, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", bytes(4)))
    elif way == "garbage":
        data[:] = chance.randbytes(chance.choice((1, 100, 10_000)))
    elif way == "repeated":
        data += content
    else:
        data.clear()
    return bytes(data), way


def no_file(path: Path, chance: random.Random) -> str:
    """Put something at a path that is no regular file, or not the file that it stands for."""
    kinds: dict[str, Callable[[], object]] = {
        "a named pipe": lambda: os.mkfifo(path),
        "an endless device": lambda: path.symlink_to("/dev/zero"),
        "a link to nothing": lambda: path.symlink_to("absent"),
        "a link to itself": lambda: path.symlink_to(path.name),
        "a folder": path.mkdir,
        "a pointer of Git LFS": lambda: path.write_text(POINTER),
    }
    kind = chance.choice(list(kinds))
    kinds[kind]()
    return kind


def changed_json(content: Any, chance: random.Random) -> tuple[Any, str]:
    """JSON with one value replaced or one key removed, and where."""
    places: list[tuple[Any, Any, str]] = []

    def collect(node: Any, where: str) -> None:
        items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, value in itertools.islice(items, 50):
            places.append((node, key, f"{where}.{key}"))
            collect(value, f"{where}.{key}")

    copy = json.loads(json.dumps(content))
    collect(copy, "")
    node, key, where = chance.choice(places)
    if chance.random() < 0.25:
        del node[key]
        return copy, f"without {where[1:]}"
    node[key] = chance.choice(JSON_VALUES)
    return copy, f"{where[1:]} = {json.dumps(node[key])[:40]}"
