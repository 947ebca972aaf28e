"""Photos laid out in other ways."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def flat(photos: Path) -> Path:
    """The training photos without splits: ROOT/CLASS."""
    return photos / "train"


@pytest.fixture
def write_shards(tmp_path: Path) -> Callable[..., Path]:
    """Writes image files into shards, by the webdataset library: a folder of so many in each."""
    from webdataset import ShardWriter

    def written(files: list[tuple[Path, int]], name: str = "shards", at_once: int = 5) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        with ShardWriter(str(folder / "part-%03d.tar"), maxcount=at_once, verbose=0) as writer:
            for number, (path, label) in enumerate(files):
                writer.write(
                    {"__key__": f"{number:06d}", "jpg": path.read_bytes(), "cls": label, "json": {"n": number}}
                )
        return folder

    return written
