"""Real photos in a folder, few enough for tests."""

from __future__ import annotations

import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

CLASSES = ("n01440764", "n02102040", "n02979186")


@pytest.fixture(scope="session")
def photos_once(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/ with 6 photos of 3 classes each, val/ with 2; shared, not to be written into."""
    root = tmp_path_factory.mktemp("photos")
    wanted = {(split, one): count for split, count in (("train", 6), ("val", 2)) for one in CLASSES}
    with tarfile.open(shared_data / "imagenette-224-subset.tar") as archive:
        for member in archive:
            key = tuple(member.name.split("/")[1:3])
            if member.isfile() and wanted.get(key, 0) > 0:
                wanted[key] -= 1
                member.name = member.name.split("/", 1)[1]
                archive.extract(member, root, filter="data")
    return root


@pytest.fixture
def photos(photos_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy that may be written into; what is remembered of it is kept beside it."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(photos_once, tmp_path / "photos")
    return tmp_path / "photos"


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
                writer.write({"__key__": f"{number:06d}", "jpg": path.read_bytes(), "cls": label, "json": {"n": number}})
        return folder

    return written
