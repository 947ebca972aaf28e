from __future__ import annotations

import gc
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import webdataset

from rkd_deploy.data.loader import Normaliser, train_loader
from rkd_deploy.data.shards import GROUP, Shards, scan_shards
from rkd_deploy.data.sources import ImageSet, load_images
from rkd_deploy.errors import DataError
from rkd_deploy.recipe import DataRecipe

Write = Callable[..., Path]
CLASSES = ("n01440764", "n02102040", "n02979186")


def samples(photos: Path, split: str = "train") -> list[tuple[Path, int]]:
    files = [(path, CLASSES.index(path.parent.name)) for path in sorted((photos / split).glob("*/*"))]
    return [*files[::2], *files[1::2]]


def load(root: Path | str, **how: Any) -> ImageSet:
    settings: dict[str, Any] = {"image_size": 16, "val_fraction": 0, "cache": "off", "workers": 0}
    return load_images(DataRecipe(name="webdataset", root=str(root), **(settings | how)), 0)


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # the library leaves the last shard open
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_samples_are_those_that_the_library_streams(photos: Path, write_shards: Write, tmp_path: Path) -> None:
    folder = write_shards(samples(photos))
    layout, broken = scan_shards(str(folder), None, tmp_path)
    labelled = layout.splits["train"]
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    theirs = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
    gc.collect()
    assert len(urls) == 4
    assert len(labelled.labels_N) == len(theirs) == 18
    assert broken == []
    for position, sample in enumerate(theirs):
        with labelled.source.open(position) as stream:
            assert stream.read() == sample["jpg"]
        assert labelled.labels_N[position] == int(sample["cls"])
        assert labelled.source.name(position) == f"{sample['__url__']}:{sample['__key__']}.jpg"
    assert layout.classes == ("0", "1", "2")


def test_shards_and_a_folder_of_the_same_photos_train_on_the_same_images(photos: Path, write_shards: Write) -> None:
    train, test = write_shards(samples(photos), "a"), write_shards(samples(photos, "val"), "b")
    (train / "classes.txt").write_text("\n".join(CLASSES))
    shards = load(f"{train}/part-{{000..003}}.tar", test_root=str(test))
    folder = load_images(DataRecipe(name="imagefolder", root=str(photos), image_size=16, val_fraction=0), 0)
    assert shards.classes == folder.classes == CLASSES
    assert shards.sources == {
        "train": "4 shards",
        "test": "2 shards",
        "val": shards.sources["val"],
        "reading": "streamed",
    }
    for name in ("train", "test"):
        ours, theirs = getattr(shards, name), getattr(folder, name)
        images = {
            (label, image.numpy().tobytes())
            for label, image in zip(theirs.labels_N.tolist(), theirs.images_NCHW, strict=True)
        }
        streamed = torch.cat(list(ours.chunks(5)))
        pairs = zip(ours.labels_N.tolist(), streamed, strict=True)
        assert {(label, image.numpy().tobytes()) for label, image in pairs} == images
    assert shards.mean == pytest.approx(folder.mean, abs=1e-4)


def test_an_epoch_is_the_same_with_workers_and_from_any_batch_on(photos: Path, write_shards: Write) -> None:
    folder = write_shards(samples(photos))
    epochs = []
    for workers in (0, 2):
        images = load(folder, workers=workers)
        recipe = DataRecipe(name="webdataset", root=str(folder), image_size=16)
        normalise = Normaliser(images.mean, images.std, torch.device("cpu"))
        train = train_loader(recipe, images.train, normalise, classes=3, batch_size=4, seed=1)
        epochs.append(list(train.epoch(0)))
        rest = list(train.epoch(0, 2))
        assert all(torch.equal(a[0], b[0]) for a, b in zip(rest, epochs[0][2:], strict=True))
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(*epochs, strict=True))


def test_an_epoch_reads_from_few_shards_at_a_time_and_from_all_in_the_end() -> None:
    count, shards = 40 * 25, 40
    shard_N = torch.arange(count) // 25
    source = Shards([f"{n}.tar" for n in range(shards)], ["x"] * count, shard_N, shard_N, shard_N)
    index_N = torch.arange(count).flip(0)
    orders = [source.shuffled(index_N, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2])
    assert sorted(orders[0].tolist()) == list(range(count))
    groups = shard_N[index_N[orders[0]]].split(GROUP * 25)
    assert [len(group.unique()) for group in groups] == [16, 16, 8]  # all images of a group before the next begins
    assert all(len(group[:64].unique()) > 7 for group in groups)  # mixed within it
    assert sorted(groups[0].unique().tolist()) != list(range(16))


def test_a_share_of_the_images_is_tested_on_where_there_are_no_test_shards(photos: Path, write_shards: Write) -> None:
    images = load(write_shards(samples(photos)), test_fraction=0.3)
    assert (len(images.train), len(images.test)) == (12, 6)  # 2 of each 6
    assert "0.3 of every class" in images.sources["test"]


def test_the_index_is_made_once(photos: Path, write_shards: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_shards(samples(photos))
    first = load(folder)
    monkeypatch.setattr(tarfile, "open", lambda *a, **k: pytest.fail("indexed again"))
    assert load(folder).train.labels_N.tolist() == first.train.labels_N.tolist()


def add(path: Path, **members: bytes) -> None:
    with webdataset.TarWriter(str(path)) as writer:
        for key, extension, content in ((*name.split("__"), content) for name, content in members.items()):
            writer.write({"__key__": key, extension: content})


def test_samples_without_image_or_label_are_broken_images(photos: Path, write_shards: Write) -> None:
    folder = write_shards(samples(photos))
    add(folder / "part-900.tar", a__jpg=b"x", b__cls=b"1", c__txt=b"?")
    add(folder / "part-901.tar", d__cls=b"two")
    with pytest.raises(DataError) as caught:
        load(folder)
    message = str(caught.value)
    assert "4 of 22 images cannot be read" in message
    assert "part-900.tar:a has no .cls" in message
    assert "part-900.tar:b has no image, only cls" in message
    assert len(load(folder, broken="skip").skipped) == 4


def test_a_broken_photo_inside_a_shard_is_named(photos: Path, write_shards: Write) -> None:
    files = samples(photos)
    files[3][0].write_bytes(files[3][0].read_bytes()[:-3000])
    with pytest.raises(DataError, match=r"part-000\.tar:000003\.jpg cannot be read as an image: .*truncated"):
        load(write_shards(files))


def test_shards_that_are_missing_cut_off_or_compressed_are_named(photos: Path, write_shards: Write) -> None:
    folder = write_shards(samples(photos))
    with pytest.raises(DataError, match=r"1 of the 5 shards of .* are no files here \(first: .*part-004\.tar\)"):
        load(f"{folder}/part-{{000..004}}.tar")
    with pytest.raises(DataError, match=r"holds no \.tar files"):
        load(photos / "train" / "n01440764")
    content = (folder / "part-001.tar").read_bytes()
    (folder / "part-001.tar").write_bytes(content[:9000])
    with pytest.raises(DataError, match=r"part-001\.tar is no whole, uncompressed tar file"):
        load(folder)


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("a{0..99999999999}.tar", "stands for more than 1,000,000 shards"),
        ("a{0..9999}{0..9999}.tar", "stands for more than 1,000,000 shards"),
        ("a{{{{.tar", "is no brace pattern"),
        ("x" * 300, "are no files here"),
        ("a\0.tar", "are no files here"),
    ],
)
def test_patterns_that_stand_for_no_shards(pattern: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        load_images(DataRecipe(name="webdataset", root=pattern), 0)


def test_labels_beyond_the_names_are_refused(photos: Path, write_shards: Write) -> None:
    folder = write_shards(samples(photos))
    (folder / "classes.txt").write_text("tench\nspringer\n")
    with pytest.raises(DataError, match=r"The train shards have a label 2, and there are 2 classes, from 0"):
        load(folder)


def test_shards_without_one_usable_sample_list_what_they_have(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    add(tmp_path / "s" / "0.tar", a__avif=b"x", a__cls=b"1", b__avif=b"x", b__cls=b"0", c__jpg=b"x")
    for broken in ("stop", "skip"):
        with pytest.raises(DataError) as caught:
            load(tmp_path / "s", broken=broken)
        assert "None of the 3 samples in the 1 train shards" in str(caught.value)
        assert "has no image, only avif, cls" in str(caught.value)
        assert "1 has no .cls, so no label" in str(caught.value)


def test_labels_that_no_set_has_are_broken_samples(photos: Path, write_shards: Write) -> None:
    folder = write_shards(samples(photos))
    add(folder / "part-900.tar", a__jpg=b"x", a__cls=b"9" * 30, b__jpg=b"x", b__cls=b"1000000")
    skipped = load(folder, broken="skip").skipped
    assert len(skipped) == 2
    assert all("which is no class number" in line for line in skipped)


def test_companions_of_a_mac_in_shards_are_no_samples(photos: Path, write_shards: Write) -> None:
    folder = write_shards(samples(photos))
    with tarfile.open(folder / "part-900.tar", "w") as archive:
        for name in ("._a.jpg", "._a.cls", "__MACOSX/a.jpg"):
            archive.addfile(tarfile.TarInfo(name))
    (folder / "._part-000.tar").write_bytes(b"\0\5\x16\7")
    assert load(folder).skipped == ()


def test_an_index_that_is_damaged_is_made_again(photos: Path, write_shards: Write) -> None:
    folder = write_shards(samples(photos))
    first = load(folder)
    (index,) = Path(".data/remembered").glob("shards-*.npz")
    for content in (b"", index.read_bytes()[:300]):
        index.write_bytes(content)
        assert load(folder).train.labels_N.tolist() == first.train.labels_N.tolist()
