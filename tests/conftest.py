"""What every test shares: one thread, fixed seeds, the real images, one finished run."""

from __future__ import annotations

import fcntl
import json
import os
import random
import shutil
import signal
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import hypothesis
import numpy as np
import pytest
from headless_browser import Browser
from sharing import made_once

if TYPE_CHECKING:
    from rkd_deploy.data.sources import ImageSet
    from rkd_deploy.recipe import Recipe
    from rkd_deploy.train.runs import Run

pytest_plugins = ["model_files"]  # tests/support: tiny models with known answers, a simulated GPU

REPO = Path(__file__).parents[1]
DATA = Path(os.environ.get("RKD_TEST_DATA", REPO.parent / "shared" / "data"))

BROWSERS = ("chromium", "chromium-browser", "google-chrome")

PHOTOS = ("n01440764", "n02102040", "n02979186")

hypothesis.settings.register_profile("rkd", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("rkd")

# The least that is still the whole way: T, S0, S and A on 8x8 digits.
TINY = (
    "name=tiny",
    "data.image_size=8",
    "data.train_limit=100",
    "data.test_limit=50",
    "data.augment=['crop']",
    "data.crop_padding=1",
    "teacher.name=resnet8",
    "student.name=resnet8",
    "student.control=false",
    "train.epochs=2",
    "train.batch_size=16",
    "train.lr=0.05",
    "train.device=cpu",
    "train.threads=1",
    "train.curves=false",
    "train.tensorboard=false",
)


# Minutes each: begun first, so that no process is left alone with one in the end.
LONGEST = (
    "export/fusion/test_pruned.py",
    "train/test_phases.py",
    "test_cifar100.py",
    "test_cli.py",
    "test_docs.py",
    "export/fusion/test_families.py",
    "test_quickstart.py",
    "train/test_inherited.py",
    "train/test_recipes.py",
    "train/test_external.py",
)


def pytest_configure() -> None:
    """Ctrl-C can be tested: a shell starts its background commands with SIGINT ignored, and they would hand that on."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first (with --no-loadscope-reorder), the others as they were found."""
    ranks = {str(REPO / "tests" / name): rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(str(item.path), len(LONGEST)))


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Engines and paces that tests leave behind are none of the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RKD_DEPLOY_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random numbers and one thread for every test, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    if "torch" in sys.modules:  # not imported here: what runs a model is tested without it too
        import torch

        torch.manual_seed(0)
        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def absent() -> Callable[[str], NoReturn]:
    """Ends a test that lacks something: a skip with its reason, but a failure in CI, where a skip would pass unseen."""

    def end(reason: str) -> NoReturn:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)

    return end


@pytest.fixture(scope="session")
def shared_data(absent: Callable[[str], NoReturn]) -> Path:
    """The folder of real images and weights (its README says what is in it)."""
    if not DATA.is_dir():
        absent(f"{DATA} is not there: name the folder with RKD_TEST_DATA")
    return DATA


@pytest.fixture(scope="session")
def cifar_root(shared_data: Path, absent: Callable[[str], NoReturn]) -> Path:
    """The folder that holds cifar-100-python/, unpacked once and kept between test runs."""
    archive, root = shared_data / "cifar-100-python.tar.xz", REPO / ".data"
    if not archive.is_file():
        absent(f"{archive} is not there")
    root.mkdir(exist_ok=True)
    with (root / ".unpacking").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two test runs at once unpack once
        if not (root / "cifar-100-python").is_dir():
            for left_over in root.glob(".cifar-*.tmp"):  # by a run that was killed here
                shutil.rmtree(left_over)
            temporary = Path(tempfile.mkdtemp(prefix=".cifar-", suffix=".tmp", dir=root))
            with tarfile.open(archive) as content:
                content.extractall(temporary, filter="data")
            (temporary / "cifar-100-python").rename(root / "cifar-100-python")
            temporary.rmdir()
    return root


@pytest.fixture(scope="session")
def cifar100(cifar_root: Path) -> ImageSet:
    """CIFAR-100 as the package reads it, all training images in the order of the file."""
    from rkd_deploy.data.sources import load_images
    from rkd_deploy.recipe import DataRecipe

    return load_images(DataRecipe(name="cifar100", root=str(cifar_root), val_fraction=0), 0)


@pytest.fixture(scope="session")
def tiny_recipe() -> Callable[..., Recipe]:
    """Makes the recipe of a run that takes a second; arguments replace values as --set does."""
    from rkd_deploy.recipe import read_recipe

    return lambda *overrides: read_recipe(None, (*TINY, *overrides))


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory, tiny_recipe: Callable[..., Recipe]) -> Run:
    """A finished run, its T and S0 well above chance. All tests share it: copy its folder before writing into it."""
    from rkd_deploy.train.fitting import fit
    from rkd_deploy.train.runs import newest_run

    def train(root: Path) -> None:
        fit(tiny_recipe("data.train_limit=300", "data.test_limit=100", "teacher.epochs=4"), root=root)

    return newest_run(made_once(tmp_path_factory, "runs", train), finished=True)


@pytest.fixture(scope="session")
def photos_once(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/ with 6 photos of 3 classes each, val/ with 2; shared, not to be written into."""
    root = tmp_path_factory.mktemp("photos")
    wanted = {(split, one): count for split, count in (("train", 6), ("val", 2)) for one in PHOTOS}
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


class Outcome(NamedTuple):
    """What a command printed and how it ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Of the last line of standard output."""
        return json.loads(self.out.splitlines()[-1])


@pytest.fixture
def rkd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run a command in this process, in an empty working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    from rkd_deploy import cli

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["rkd-deploy", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        return Outcome(code, *capfd.readouterr())

    return run


@pytest.fixture
def runs(tiny_run: Run, tmp_path: Path) -> Path:
    """A copy of a finished run under runs/ of the working folder."""
    shutil.copytree(tiny_run.folder, tmp_path / "runs" / tiny_run.folder.name)
    return tmp_path / "runs" / tiny_run.folder.name


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory, absent: Callable[[str], NoReturn]) -> Iterator[Any]:
    """Chromium; where it is not, what to do is said."""
    program = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if program is None:
        absent(
            f"no Chromium to look at pages with ({', '.join(BROWSERS)}). "
            "Install it with: apt-get update && apt-get install -y --no-install-recommends chromium"
        )
    opened = Browser(program, tmp_path_factory.mktemp("browser"))
    yield opened
    opened.close()
