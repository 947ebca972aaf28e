"""Writes the rows of a part of gpu.py one by one, so that what is cut off leaves them."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class OutOfTime(Exception):
    """The part's time is over; the rows so far stand, and --resume goes on."""


@dataclass
class Rows:
    """The rows of one part in a file, a JSON object a line; those that are there already are not measured again.

    Attributes:
        file: Where they are.
        device: cuda or cpu.
        tiny: Whether settings are as small as they can be: a test on a CPU.
        ends: When the part must be over, by `time.monotonic`.
    """

    file: Path
    device: str
    tiny: bool
    ends: float
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rows = {row["key"]: row for row in read_rows(self.file)}

    def __contains__(self, key: str) -> bool:
        return key in self.rows

    @property
    def seconds_left(self) -> float:
        """Until the part must be over."""
        return self.ends - time.monotonic()

    def add(self, key: str, **facts: Any) -> None:
        """Write a row and show it."""
        row = {"key": key, **facts}
        self.rows[key] = row
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")
        print(json.dumps(row)[:240], flush=True)

    @contextmanager
    def attempt(self, key: str) -> Iterator[None]:
        """What fails inside becomes a row with its traceback, and the next thing is tried."""
        try:
            yield
        except OutOfTime:
            raise
        except Exception as error:
            lines = traceback.format_exc().splitlines()
            self.add(key, failed=f"{type(error).__name__}: {str(error)[:400]}", traceback=lines[-12:])


def check_time(rows: Rows, needed: float) -> None:
    """End the part where less than this many seconds are left.

    Raises:
        OutOfTime: They are not there.
    """
    if rows.seconds_left < needed:
        raise OutOfTime(f"{rows.seconds_left:.0f} s left, {needed:.0f} s needed for the next step")


def read_rows(file: Path) -> list[dict[str, Any]]:
    """All whole rows of a file; a line that was cut off is none."""
    if not file.exists():
        return []
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]
