"""A run's log.jsonl: a JSON object a line, appended while it trains, and read back typed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rkd_deploy.decoding import DecodingError, decode, parse_object
from rkd_deploy.errors import ModelFileError
from rkd_deploy.storage import RECORD_LIMIT, read_text, storage_error

_MOST_SECONDS = 1e12
_MOST_EPOCHS = 10**9


@dataclass(frozen=True, kw_only=True)
class EpochRow:
    """An epoch as the log has it.

    Attributes:
        phase: Name of the phase.
        epoch: Number of the epoch within the phase, from 1.
        lr: Learning rate of the last step.
        val_top1: Accuracy on the held-out images in percent; None where nothing is held out or classified.
        val_top1_ema: Accuracy of the averaged weights in percent, where there are some.
        train_top1: Accuracy on the training images in percent, where they are classified.
        seconds: Time of the epoch.
        images_per_s: Training images a second.
        values: The loss and its parts, by name, as means over the images.
    """

    phase: str
    epoch: int
    lr: float
    val_top1: float | None = None
    val_top1_ema: float | None = None
    train_top1: float | None = None
    seconds: float
    images_per_s: float
    values: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> EpochRow:
        """The epoch of a line of the log.

        Raises:
            DecodingError: A key is missing, or a value is none that an epoch can have.
        """
        known = cls.__dataclass_fields__.keys() - {"values"} | {"event"}
        values = {name: value for name, value in row.items() if name not in known}
        epoch = decode(cls, {**{name: row[name] for name in row if name in known}, "values": values})
        if not (1 <= epoch.epoch <= _MOST_EPOCHS and 0 <= epoch.seconds <= _MOST_SECONDS):
            raise DecodingError(f"epoch {epoch.epoch} of {epoch.seconds} seconds cannot be")
        for name in ("val_top1", "val_top1_ema", "train_top1"):
            if (share := getattr(epoch, name)) is not None and not 0 <= share <= 100:
                raise DecodingError(f"{name} is {share} where a percentage is expected")
        return epoch

    def to_json(self) -> dict[str, Any]:
        """The line of the log, without what does not apply."""
        shares = {"train_top1": self.train_top1, "val_top1_ema": self.val_top1_ema}
        row = {"phase": self.phase, "epoch": self.epoch, "lr": self.lr, "val_top1": self.val_top1}
        row |= {name: share for name, share in shares.items() if share is not None}
        return {**self.values, **row, "seconds": self.seconds, "images_per_s": self.images_per_s}


class RunLog:
    """The log of a run, log.jsonl.

    Args:
        path: The file; made when it is not there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, event: str, **facts: Any) -> None:
        """Append one line to the log.

        Raises:
            StorageError: The disk is full, or no file stands there; lines written before are intact.
        """
        line = json.dumps({"event": event, **facts}) + "\n"
        try:
            with open(self.path, "a", encoding="utf-8", opener=_open_at_once) as stream:
                stream.write(line)
        except OSError as error:
            raise storage_error(self.path, error, needed=len(line)) from error

    def size(self) -> int:
        """Size of the log in bytes."""
        return self.path.stat().st_size if self.path.exists() else 0

    def rewind(self, size: int) -> None:
        """Cut the log back to a size in bytes, that of a checkpoint: a resumed run writes the rest again.

        Raises:
            StorageError: The log cannot be cut.
        """
        if self.size() > size:
            try:
                os.truncate(self.path, size)
            except OSError as error:
                raise storage_error(self.path, error) from error

    def forget(self, phase: str) -> None:
        """Drop the lines of a phase from the log's end, and a last line that a kill cut off.

        Raises:
            ModelFileError: The log is damaged.
        """
        size = 0
        for line in _lines(self.path):
            if not line.endswith("\n") or _row(self.path, line).get("phase") == phase:
                break
            size += len(line.encode())
        self.rewind(size)


def read_log(path: Path, event: str = "epoch") -> list[dict[str, Any]]:
    """Lines of a log about an event, ``"epoch"`` or ``"warning"``, but for a last line that a kill cut off.

    Raises:
        ModelFileError: The log cannot be read, or a line of it is no JSON object.
    """
    rows = [_row(path, line) for line in _lines(path) if line.endswith("\n")]
    return [row for row in rows if row.get("event") == event]


def read_epochs(path: Path) -> list[EpochRow]:
    """The epochs of a log; those of one phase have the same values.

    Raises:
        ModelFileError: The log is damaged.
    """
    epochs: list[EpochRow] = []
    first_of: dict[str, frozenset[str]] = {}
    for number, row in enumerate(read_log(path), 1):
        try:
            epochs.append(epoch := EpochRow.from_json(row))
        except DecodingError as error:
            raise _damaged(path, f"epoch {number} in it: {error}") from error
        keys = frozenset(name for name, value in row.items() if value is not None)
        if first_of.setdefault(epoch.phase, keys) != keys:
            raise _damaged(path, f"epoch {number} in it has other values than the first of phase {epoch.phase}")
    return epochs


def _open_at_once(path: str, flags: int) -> int:
    """Open a file, and do not wait where a named pipe without a reader stands in its place."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0), 0o666)


def _lines(path: Path) -> list[str]:
    """The lines of a log with their ends; none where there is no log yet."""
    if not os.path.lexists(path):
        return []
    try:
        text = read_text(path, limit=RECORD_LIMIT)
    except OSError as error:
        raise _damaged(path, error.strerror or str(error)) from error
    except UnicodeDecodeError as error:
        raise _damaged(path, "it is not UTF-8 text") from error
    lines = text.split("\n")  # not splitlines(): the log has no other line ends, and JSON may hold them
    return [f"{line}\n" for line in lines[:-1]] + [line for line in lines[-1:] if line]


def _row(path: Path, line: str) -> dict[str, Any]:
    try:
        return parse_object(line)
    except DecodingError as error:
        raise _damaged(path, str(error)) from error


def _damaged(path: Path, reason: str) -> ModelFileError:
    return ModelFileError(
        f"{path}, the log of a run, cannot be read: {reason}. Restore it from a copy, or begin the run anew."
    )
