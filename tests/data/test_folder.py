from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

from rkd_deploy.data.files import ImageFiles
from rkd_deploy.data.folders import scan_folder, scan_imagenet
from rkd_deploy.errors import DataError


def fill(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True)
    for name in names:
        Image.new("RGB", (4, 4)).save(folder / name)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    fill(tmp_path / "train" / "cat", "1.jpg", "2.PNG")
    fill(tmp_path / "train" / "ant", "1.jpg", "3.webp")
    fill(tmp_path / "val" / "ant", "1.jpg")
    fill(tmp_path / "val" / "cat", "1.jpg")
    return tmp_path


def test_files_labels_and_classes_are_those_of_torchvision(photos: Path) -> None:
    layout = scan_folder(photos)
    for name, folder in (("train", "train"), ("test", "val")):
        theirs = ImageFolder(str(photos / folder))
        labelled = layout.splits[name]
        assert isinstance(labelled.source, ImageFiles)
        assert list(zip(labelled.source.paths, labelled.labels_N.tolist(), strict=True)) == theirs.samples
        assert list(layout.classes) == theirs.classes
    assert layout.origins == {"train": "folder train", "test": "folder val"}


@pytest.mark.parametrize("name", ["val", "valid", "test"])
def test_what_stands_beside_train_is_the_test_split(root: Path, name: str) -> None:
    if name != "val":
        (root / "val").rename(root / name)
    layout = scan_folder(root)
    assert layout.origins == {"train": "folder train", "test": f"folder {name}"}
    assert layout.splits["test"].labels_N.tolist() == [0, 1]


def test_with_test_and_val_each_is_what_it_is_called(root: Path) -> None:
    shutil.copytree(root / "val", root / "test")
    (root / "test" / "cat" / "1.jpg").unlink()
    (root / "test" / "cat").rmdir()
    layout = scan_folder(root)
    assert layout.origins == {"train": "folder train", "test": "folder test", "val": "folder val"}
    assert {name: len(split.labels_N) for name, split in layout.splits.items()} == {"train": 4, "test": 1, "val": 2}


def test_a_root_without_splits_is_all_train_and_hidden_folders_and_other_files_are_none(root: Path) -> None:
    (root / "train" / ".cache").mkdir()
    (root / "train" / "cat" / "notes.txt").write_text("no image")
    layout = scan_folder(root / "train")
    assert set(layout.splits) == {"train"}
    assert layout.classes == ("ant", "cat")
    assert len(layout.splits["train"].labels_N) == 4


def test_a_root_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"There is no folder .*nowhere.*--set data\.root=FOLDER"):
        scan_folder(tmp_path / "nowhere")


def test_an_empty_class_folder_is_named(root: Path) -> None:
    (root / "train" / "bee").mkdir()
    with pytest.raises(DataError, match=r"1 class folders of .*train hold no images \(bee\)"):
        scan_folder(root)


def test_one_class_is_none(root: Path) -> None:
    shutil.rmtree(root / "train" / "cat")
    with pytest.raises(DataError, match=r"train holds only ant/; there must be one folder for each of at least two"):
        scan_folder(root)
    shutil.rmtree(root / "train" / "ant")
    with pytest.raises(DataError, match=r"train holds no folders"):
        scan_folder(root)


def test_a_class_that_train_lacks_is_named(root: Path) -> None:
    fill(root / "val" / "dog", "1.jpg")
    with pytest.raises(DataError, match=r"val has 1 classes that train lacks \(dog\)"):
        scan_folder(root)


def test_train_alone_and_its_absence_are_refused(root: Path) -> None:
    (root / "train").rename(root / "learning")
    with pytest.raises(DataError, match=r"holds val/ and no train/"):
        scan_folder(root)
    (root / "learning").rename(root / "train")
    shutil.rmtree(root / "val")
    with pytest.raises(DataError, match=r"holds train/ and none of test/, val/, valid/.*data\.test_fraction"):
        scan_folder(root)


def test_an_empty_test_folder_is_refused(root: Path) -> None:
    shutil.rmtree(root / "val")
    (root / "val").mkdir()
    with pytest.raises(DataError, match=r"val holds no class folders, so there is nothing for test"):
        scan_folder(root)


# ImageNet


def test_imagenet_takes_its_names_from_a_words_file(photos: Path) -> None:
    assert scan_imagenet(photos).classes == ("n01440764", "n02102040", "n02979186")
    (photos / "words.txt").write_text("n01440764\ttench, Tinca tinca\nn02102040\tcrane\nn02979186\tcrane, lifter\n")
    assert scan_imagenet(photos).classes == ("tench", "crane (n02102040)", "crane (n02979186)")


def test_kaggles_words_are_read_too_and_must_be_whole(photos: Path) -> None:
    words = photos / "LOC_synset_mapping.txt"
    words.write_text("n01440764 tench, Tinca tinca\nn02102040 English springer, dog\nn02979186 cassette player\n")
    assert scan_imagenet(photos).classes == ("tench", "English springer", "cassette player")
    words.write_text("n01440764 tench, Tinca tinca\n")
    with pytest.raises(DataError, match=r"has no words for 2 of 3 classes \(n02102040, n02979186\)"):
        scan_imagenet(photos)


def test_what_is_not_laid_out_as_imagenet_is_refused(root: Path) -> None:
    with pytest.raises(DataError, match=r"does not hold train/ and val/ with a folder for each WNID"):
        scan_imagenet(root / "train")
