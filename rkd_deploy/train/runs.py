"""Run folders: where a training run keeps everything that is known of it.

recipe.toml              as resolved: it reproduces the run
environment.json         versions and hardware
facts.json               classes, normalisation, image size; where S and A are trained, their widths and the budget
log.jsonl                one line per epoch
curves.png               the log as a picture
tensorboard/             the log for TensorBoard, where that is installed
checkpoint.safetensors   state of the phase in progress; gone when the run is finished
weights/NAME.safetensors what each finished phase gave and ships; with train.ema_decay the other weights are beside it
                         as NAME_ema, or as NAME_last where the average ships
metrics.json             written last: a run that has it is finished; with the SHA-256 of facts.json and all weights
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from rkd_deploy.decoding import DecodingError, decode, read_json
from rkd_deploy.errors import CheckpointError, ModelFileError, UsageError, command_line
from rkd_deploy.recipe import Recipe, read_recipe
from rkd_deploy.storage import read_text, sha256_of, storage_error, write_text
from rkd_deploy.train.facts import RunFacts, RunMetrics
from rkd_deploy.train.log import RunLog

try:
    import fcntl

    _LOCKS = True
except ImportError:  # Windows: nothing holds two processes apart
    _LOCKS = False

_T = TypeVar("_T")


DEFAULT_ROOT = Path("runs")


@dataclass(frozen=True)
class Run:
    """A run folder, and what stands in it.

    Attributes:
        folder: Path of the folder.
    """

    folder: Path

    @cached_property
    def recipe(self) -> Recipe:
        """The recipe of the run, resolved, read once."""
        return read_recipe(self.folder / "recipe.toml")

    @property
    def log(self) -> RunLog:
        """The log of this run."""
        return RunLog(self.folder / "log.jsonl")

    @property
    def checkpoint(self) -> Path:
        """Path of the checkpoint, the state of the phase in progress."""
        return self.folder / "checkpoint.safetensors"

    @property
    def metrics_path(self) -> Path:
        """Path of the results; the file is there when the run is finished."""
        return self.folder / "metrics.json"

    @property
    def finished(self) -> bool:
        """Whether every phase and the final evaluation are done."""
        return self.metrics_path.exists()

    def weights(self, phase: str) -> Path:
        """Path of the weights that a phase gave, or will give."""
        return self.folder / "weights" / f"{phase}.safetensors"

    @cached_property
    def facts(self) -> RunFacts:
        """Facts of the run that building its networks needs, read once.

        Raises:
            ModelFileError: facts.json is missing or damaged.
            CheckpointError: facts.json is not the one that the run ended with.
        """
        self.check_file(self.folder / "facts.json")
        return self._read("facts.json", RunFacts)

    @cached_property
    def metrics(self) -> RunMetrics:
        """Results of the finished run, read once.

        Raises:
            ModelFileError: metrics.json is missing, because the run is not finished, or damaged.
        """
        return self._read("metrics.json", RunMetrics)

    def sealed_files(self) -> dict[str, str]:
        """SHA-256 of facts.json and of every weights file, by path in the folder, as they are now."""
        files = [self.folder / "facts.json", *sorted((self.folder / "weights").glob("*.safetensors"))]
        return {file.relative_to(self.folder).as_posix(): sha256_of(file) for file in files}

    def check_file(self, path: Path) -> None:
        """Refuse a file of a finished run that has changed since; older runs recorded no checksums.

        Raises:
            CheckpointError: The file is another than the one that the run ended with.
            ModelFileError: metrics.json is damaged.
        """
        if not self.finished or not path.is_file():
            return
        recorded = self.metrics.files.get(path.relative_to(self.folder).as_posix())
        if recorded is not None and (now := self._sha256_of(path)) != recorded:
            raise CheckpointError(
                f"{path} is not the file that this run ended with: its SHA-256 is {now[:12]}.., and metrics.json has "
                f"{recorded[:12]}... It was damaged or changed. Restore it from a copy, or train again."
            )

    def _sha256_of(self, path: Path) -> str:
        try:
            return sha256_of(path)
        except OSError as error:
            raise CheckpointError(
                f"{path} of a finished run cannot be read: {error.strerror}. Restore it from a copy, or train again."
            ) from error

    def read_json(self, name: str) -> dict[str, Any]:
        """The object in one of the run's JSON files.

        Raises:
            ModelFileError: The file is missing or damaged.
        """
        return self._read(name, dict[str, Any])

    def _read(self, name: str, kind: type[_T]) -> _T:
        path = self.folder / name
        try:
            return decode(kind, read_json(path))
        except DecodingError as error:
            go_on = command_line("train", self.folder, "--resume")
            hint = "" if self.finished else f" The run is not finished: {go_on}"
            raise ModelFileError(f"{path} cannot be read ({error}).{hint}") from error


class RunLock:
    """Keeps two processes from training one run: each would write its checkpoint over the other's, and log twice.

    The lock lies on recipe.toml, which is never written again, and ends with the process, however that ends.

    Args:
        run: The run.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._stream: BinaryIO | None = None

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            UsageError: Another process has it.
            StorageError: The run folder cannot be written into.
        """
        if not _LOCKS:
            return
        path = self._run.folder / "recipe.toml"
        try:
            # For writing, though nothing is written: NFS makes of flock a lock that needs it.
            stream = path.open("r+b")
        except OSError as error:
            raise storage_error(path, error) from error
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            stream.close()
            raise UsageError(
                f"{self._run.folder} is being trained by another process. Wait for it to end, or stop it first."
            ) from error
        except OSError:  # a file system without locks
            stream.close()
            return
        self._stream = stream

    def release(self) -> None:
        """Release the lock; does nothing where it was not taken."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None


def create_run(root: Path, recipe: Recipe) -> Run:
    """Make the next free folder `root/NAME-001`, and write the recipe into it."""
    number = 1 + max((int(path.name[-3:]) for path in root.glob(f"{recipe.name}-[0-9][0-9][0-9]")), default=0)
    while True:
        folder = root / f"{recipe.name}-{number:03d}"
        try:
            folder.mkdir(parents=True)
            break
        except FileExistsError:  # another process took it in between
            number += 1
        except OSError as error:
            raise storage_error(folder, error) from error
    write_text(folder / "recipe.toml", recipe.to_toml())
    return Run(folder)


def open_run(folder: Path) -> Run:
    """The run in a folder.

    Raises:
        UsageError: The folder is no run.
    """
    folder = Path(folder)
    if not os.path.isfile(folder / "recipe.toml"):
        raise UsageError(
            f"{folder} is no run folder: it holds no recipe.toml. Name a folder that rkd-deploy train made."
        )
    return Run(folder)


def newest_run(root: Path, *, finished: bool) -> Run:
    """The run that was begun last in a folder of runs.

    Args:
        root: Folder of runs.
        finished: Look for finished runs, or for unfinished ones.

    Raises:
        ModelFileError: There is none; the message says how to get one.
    """
    try:
        runs = [Run(path.parent) for path in root.glob("*/recipe.toml")]
    except OSError as error:
        raise ModelFileError(
            f"{root} cannot be read as a folder of runs: {error.strerror}. Name another with --runs."
        ) from error
    chosen = [run for run in runs if run.finished == finished]
    if not chosen:
        kind = "finished run" if finished else "unfinished run to resume"
        unfinished = [run for run in runs if not run.finished]
        hint = "Make one with: rkd-deploy train"
        if finished and unfinished:
            newest = max(unfinished, key=_begun)
            hint = f"{newest.folder} was begun: finish it with {command_line('train', newest.folder, '--resume')}"
        raise ModelFileError(f"There is no {kind} in {root}/. {hint}")
    return max(chosen, key=_begun)


def runs_of(root: Path, recipe: Recipe) -> list[Run]:
    """The runs of exactly this recipe, in the order they were begun in."""
    text = recipe.to_toml()
    runs = [Run(path.parent) for path in root.glob("*/recipe.toml") if _holds(path, text)]
    return sorted(runs, key=_begun)


def _holds(path: Path, text: str) -> bool:
    try:
        return read_text(path) == text
    except (OSError, UnicodeDecodeError):  # no run of ours
        return False


def _begun(run: Run) -> tuple[float, str]:
    # recipe.toml is never written again, so its time is when the run began; the name decides where a clock is coarse.
    return (run.folder / "recipe.toml").stat().st_mtime, run.folder.name


@dataclass(frozen=True)
class Series:
    """Finished runs that differ in their seed only.

    Attributes:
        seeds: In the order of the runs.
        runs: One for each seed.
        parts: For every network: `test_top1` of each run, their `mean` and sample standard deviation `std` in percent,
            its `macs` and `parameters`.
        path: The JSON file that says the same.
    """

    seeds: tuple[int, ...]
    runs: tuple[Run, ...]
    parts: dict[str, dict[str, Any]]
    path: Path

    def to_dict(self) -> dict[str, Any]:
        """The series for JSON, runs by their folders."""
        return {"seeds": list(self.seeds), "runs": [str(run.folder) for run in self.runs], "parts": self.parts}
