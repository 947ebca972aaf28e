"""The log of a run: one JSON object a line, appended as things happen."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from rkd_deploy.storage import storage_error


class RunLog:
    """Appends to log.jsonl.

    Args:
        path: The file; made when it is not there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, event: str, **facts: Any) -> None:
        """Write one line.

        Raises:
            StorageError: The disk is full; lines written before are intact.
        """
        line = json.dumps({"event": event, **facts}) + "\n"
        try:
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write(line)
        except OSError as error:
            raise storage_error(self.path, error, needed=len(line)) from error

    def size(self) -> int:
        """Bytes written so far."""
        return self.path.stat().st_size if self.path.exists() else 0

    def rewind(self, size: int) -> None:
        """Forget what was written after a checkpoint: a resumed run writes it again."""
        if self.size() > size:
            os.truncate(self.path, size)

    def forget(self, phase: str) -> None:
        """Forget the last phase of the log, if that is its name, and a line that a kill cut off."""
        kept = 0
        for line in self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []:
            if not line.endswith(b"\n") or json.loads(line)["phase"] == phase:
                break
            kept += len(line)
        self.rewind(kept)


def read_log(path: Path, event: str = "epoch") -> list[dict[str, Any]]:
    """Every whole line of a log that tells of an event, ``"epoch"`` or ``"warning"``; one cut off by a kill is none."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return [row for row in rows if row["event"] == event]
