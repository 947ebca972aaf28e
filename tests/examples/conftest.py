"""A real bundle with a golden photo, and the examples beside the packages that they need."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import node_packages
import pytest
import torch
from sharing import made_once

from rkd_deploy.card import ModelCard, Preprocess
from rkd_deploy.export.bundle import export_bundle
from rkd_deploy.models.families.cifar_resnet import CifarResNet

REPO = Path(__file__).parents[2]
EXAMPLES = REPO / "examples"


class Golden(NamedTuple):
    """A bundle, its photo, and the answer that it says is right."""

    bundle: Path
    photo: Path
    label: str
    probability: float


def _network() -> CifarResNet:
    """Random weights and statistics, with a head so steep that a wrong resize shows in the third digit."""
    network, generator = CifarResNet(8, (16, 16, 32, 64), 5), torch.Generator().manual_seed(7)
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        if tensor.dtype.is_floating_point:
            low, high = (0.5, 1.5) if name.endswith("running_var") else (-0.4, 0.4)
            tensor.data.uniform_(low, high, generator=generator)
    network.fc.weight.data *= 8
    return network.eval()


@pytest.fixture(scope="session")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Golden:
    """A bundle whose input is a crop of the image, resized by Pillow's bicubic."""

    def make(folder: Path) -> None:
        rule = Preprocess(
            height=64, width=64, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225),
            interpolation="bicubic", crop_fraction=0.875,
        )  # fmt: skip
        labels = ("hill", "fence", "sun", "field", "sky")
        card = ModelCard(name="landscapes", labels=labels, preprocess=rule, metrics={"accuracy": 71.5, "split": "test"})
        export_bundle(_network(), card, folder / "bundle", with_pytorch=True)

    bundle = made_once(tmp_path_factory, "landscapes", make) / "bundle"
    answer = json.loads((bundle / "golden/photo.json").read_text())
    assert 0.3 < answer["probability"] < 0.99
    return Golden(bundle, bundle / "golden/photo.jpg", answer["label"], answer["probability"])


@pytest.fixture(scope="session")
def javascript() -> Iterator[Callable[[str], Path]]:
    """Gives an example's folder, copied to where the npm packages are found. Skips where they cannot be had."""
    packages = node_packages.install(pytest.skip)
    with tempfile.TemporaryDirectory(prefix="examples-", dir=packages) as copy:
        shutil.copytree(EXAMPLES, copy, ignore=shutil.ignore_patterns("node_modules"), dirs_exist_ok=True)
        yield lambda name: Path(copy) / name


@pytest.fixture(scope="session")
def variants(golden: Golden, tmp_path_factory: pytest.TempPathFactory) -> dict[Path, tuple[str, float]]:
    """The photo as other files, turned, grey, subsampled, with the answer of the package to each."""
    from PIL import Image

    import rkd_deploy

    folder, turned = tmp_path_factory.mktemp("variants"), Image.Exif()
    turned[0x0112] = 6
    with Image.open(golden.photo) as photo:
        photo.save(folder / "turned.jpg", exif=turned, subsampling=0)
        photo.convert("L").save(folder / "grey.png")
        photo.save(folder / "lossless.webp", lossless=True)
        for subsampling in ("4:2:2", "4:2:0"):
            photo.save(folder / f"{subsampling.replace(':', '')}.jpg", subsampling=subsampling)
        photo.resize((97, 1024)).save(folder / "strip.jpg")
    with rkd_deploy.load(golden.bundle) as classifier:
        best = {file: classifier.predict(file)[0] for file in sorted(folder.iterdir())}
    return {file: (guess.label, guess.probability) for file, guess in best.items()}
