"""The kinds of folders that people have: splits by other names, links, what systems keep beside people's files."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from rkd_deploy.data.files import ImageFiles
from rkd_deploy.data.folders import scan_folder
from rkd_deploy.errors import DataError
from rkd_deploy.image_folders import SUFFIXES, images_below, left_out_in_words, splits_below


def fill(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("L", (2, 2)).save(folder / name, "PNG")
    return folder


def classes_in(root: Path, *splits: str, of: tuple[str, ...] = ("ant", "bee")) -> Path:
    for split in splits:
        for name in of:
            fill(root / split / name, "1.png", "2.png")
    return root


@pytest.mark.parametrize(
    ("names", "origins"),
    [
        (("Training", "Testing"), {"train": "folder Training", "test": "folder Testing"}),
        (("TRAIN", "Val"), {"train": "folder TRAIN", "test": "folder Val"}),
        (("seg_train", "seg_test"), {"train": "folder seg_train", "test": "folder seg_test"}),
        (("flowers-train", "flowers-test"), {"train": "folder flowers-train", "test": "folder flowers-test"}),
        (("training_set", "test_set"), {"train": "folder training_set", "test": "folder test_set"}),
        (
            ("train2017", "validation", "test images"),
            {"train": "folder train2017", "test": "folder test images", "val": "folder validation"},
        ),
        (("train", "valid"), {"train": "folder train", "test": "folder valid"}),
    ],
)
def test_splits_of_other_names_are_no_classes(tmp_path: Path, names: tuple[str, ...], origins: dict[str, str]) -> None:
    on_disk = scan_folder(classes_in(tmp_path, *names))
    assert (on_disk.classes, on_disk.origins) == (("ant", "bee"), origins)
    assert all(split.labels_N.tolist() == [0, 0, 1, 1] for split in on_disk.splits.values())


@pytest.mark.parametrize(
    "names", [("train", "car"), ("valid", "invalid"), ("test tube", "flask"), ("train_dogs", "train_cats")]
)
def test_a_class_with_the_name_of_a_split_holds_images_and_is_none(tmp_path: Path, names: tuple[str, ...]) -> None:
    classes_in(tmp_path, "", of=names)
    assert splits_below(tmp_path) == {}
    assert scan_folder(tmp_path).classes == tuple(sorted(names))


def test_nested_folders_in_classes_are_part_of_them(tmp_path: Path) -> None:
    classes_in(tmp_path, "ant", "bee", of=("2023", "2024"))
    assert scan_folder(tmp_path).splits["train"].labels_N.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("splits", "of", "words"),
    [
        (("fold1", "fold2", "fold3"), ("ant", "bee"), "fold1, fold2, fold3: splits that do not say what they are for"),
        (("ant", "bee"), ("train", "test"), r"Each class folder of .* has splits of its own \(ant/train"),
        (("train", "training", "test"), ("ant", "bee"), "holds train/ and training/, and each may be the train split"),
    ],
)
def test_splits_that_cannot_be_told_apart_are_refused(
    tmp_path: Path, splits: tuple[str, ...], of: tuple[str, ...], words: str
) -> None:
    with pytest.raises(DataError, match=words):
        scan_folder(classes_in(tmp_path, *splits, of=of))


def test_folders_beside_splits_are_counted_as_left_out(tmp_path: Path) -> None:
    classes_in(tmp_path, "train", "test")
    fill(tmp_path / "unlabelled", "1.png")
    assert scan_folder(tmp_path).left_out == Counter({"unlabelled/": 1})


@pytest.mark.parametrize(("link", "target"), [("ant/latest", "."), ("ant/up", ".."), ("bee/more", "../ant")])
def test_a_link_to_a_folder_that_is_read_anyway_is_named(tmp_path: Path, link: str, target: str) -> None:
    classes_in(tmp_path, "")
    (tmp_path / link).symlink_to(target)
    with pytest.raises(DataError, match=rf"{link}\S* is a link to a folder that is read as .* Remove the link"):
        scan_folder(tmp_path)


@pytest.mark.parametrize(
    ("link", "target"), [("ant/3.png", "1.png"), ("ant/3.png", "../bee/1.png"), ("bee/3.png", "../ant/1.png")]
)
def test_a_link_to_an_image_that_is_read_anyway_is_named(tmp_path: Path, link: str, target: str) -> None:
    classes_in(tmp_path, "")
    (tmp_path / link).symlink_to(target)
    with pytest.raises(DataError, match=rf"{link} is a link to a file that is read as \S*1\.png already"):
        scan_folder(tmp_path)


def test_links_to_images_elsewhere_are_images_once(tmp_path: Path) -> None:
    classes_in(tmp_path / "root", "")
    elsewhere = fill(tmp_path / "elsewhere", "3.png")
    for name in ("ant", "bee"):
        (tmp_path / "root" / name / "dangling.png").symlink_to("absent.png")
    (tmp_path / "root" / "ant" / "3.png").symlink_to(elsewhere / "3.png")
    assert scan_folder(tmp_path / "root").splits["train"].labels_N.tolist() == [0] * 4 + [1] * 3
    (tmp_path / "root" / "bee" / "4.png").symlink_to(elsewhere / "3.png")
    with pytest.raises(DataError, match=r"bee/4\.png is a link to a file that is read as \S*ant/3\.png already"):
        scan_folder(tmp_path / "root")


def test_a_folder_around_the_class_folders_is_named(tmp_path: Path) -> None:
    classes_in(tmp_path, "data")
    with pytest.raises(DataError, match=rf"holds only data/.* Name the folder that holds them: {tmp_path}/data\."):
        scan_folder(tmp_path)


def test_a_link_to_a_folder_elsewhere_is_followed(tmp_path: Path) -> None:
    classes_in(tmp_path / "root", "")
    (tmp_path / "root" / "ant" / "more").symlink_to(fill(tmp_path / "elsewhere", "3.png"))
    assert scan_folder(tmp_path / "root").splits["train"].labels_N.tolist() == [0, 0, 0, 1, 1]


def test_what_systems_keep_is_neither_class_nor_image_nor_left_out(tmp_path: Path) -> None:
    classes_in(tmp_path, "")
    (tmp_path / "ant" / "._1.png").write_bytes(b"\0\5\x16\7")
    fill(tmp_path / "ant" / "@eaDir" / "1.png", "SYNOPHOTO_THUMB_M.png")
    fill(tmp_path / "__MACOSX" / "ant", "1.png")
    fill(tmp_path / ".cache", "1.png")
    (tmp_path / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    on_disk = scan_folder(tmp_path)
    assert on_disk.classes == ("ant", "bee")
    assert isinstance(on_disk.splits["train"].source, ImageFiles)
    assert [Path(path).name for path in on_disk.splits["train"].source.paths] == ["1.png", "2.png"] * 2
    assert on_disk.left_out == Counter()


def test_what_is_no_image_is_counted_by_suffix(tmp_path: Path) -> None:
    names = ["a.avif", "b.AVIF", "c.heic", "labels.txt", "README", "d.jfif", "e.gif", "f.TIFF"]
    below = images_below(fill(tmp_path / "x", *names))
    assert [Path(path).name for path in below.paths] == ["d.jfif", "e.gif", "f.TIFF"]
    assert left_out_in_words(below.left_out) == "2 .avif, 1 .heic, 1 .txt, 1 no suffix"


def test_a_class_of_other_files_says_what_it_holds(tmp_path: Path) -> None:
    classes_in(tmp_path, "")
    fill(tmp_path / "cat", "1.avif", "2.avif")
    with pytest.raises(DataError, match=r"hold no images \(cat\)\. Images end in \.jpg, .*instead: 2 \.avif\."):
        scan_folder(tmp_path)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_suffix_that_is_taken_can_be_read(tmp_path: Path, suffix: str) -> None:
    from rkd_deploy.images import decoded

    image = Image.new("1" if suffix == ".pbm" else "L" if suffix == ".pgm" else "RGB", (3, 2))
    image.save(tmp_path / f"x{suffix}", "JPEG" if suffix in (".jfif", ".jpe") else None)
    assert decoded(tmp_path / f"x{suffix}", "x").size == (3, 2)
