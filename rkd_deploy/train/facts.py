"""Facts and results of a run, typed: facts.json, metrics.json and headers of weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rkd_deploy.recipe import DataRecipe


@dataclass(frozen=True, kw_only=True)
class SplitSizes:
    """Numbers of images of the three splits."""

    train: int
    val: int
    test: int


@dataclass(frozen=True, kw_only=True)
class SeparationFacts:
    """What S and A were cut for, and what they cost.

    Attributes:
        unit: What `budget` and `cost` count: ``"macs"`` or ``"params"``.
        level: Level of fusion that S and A were cut for.
        budget: Cost of S0.
        cost: Cost of S + A, at most the budget.
        parts: Cost of S, the assistants, the adapters and the head, by name.
        latency: Where the budget is latency, everything that was measured (`rkd_deploy.models.separation`).
    """

    unit: str
    level: str
    budget: int
    cost: int
    parts: Mapping[str, int]
    latency: Mapping[str, Mapping[str, Any]] | None = None

    @property
    def measured_ratio(self) -> tuple[float, str] | None:
        """The latency of S + A over that of S0 at the worst batch size, and the level of fusion it was measured at."""
        fused = (self.latency or {}).get("fused")
        return None if fused is None else (float(fused["worst_ratio"]), str(fused["level"]))


@dataclass(frozen=True, kw_only=True)
class NamedFile:
    """A weights file that the recipe named: what it was called, and the SHA-256 of its bytes."""

    file: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """All that building a run's networks and feeding them needs and its recipe does not say; facts.json.

    Attributes:
        data: Name of the data set.
        classes: Names of the classes, in the order of the logits.
        mean: Mean that images are normalised with, per channel, in units of [0, 1].
        std: Standard deviation that images are normalised with, per channel, in units of [0, 1].
        image_size: Height and width in pixels.
        images: Sizes of the splits.
        crop_fraction: Share of the resized image that is kept outside training; None for sets without files.
        sources: Where each split of a set of files comes from, in words.
        skipped: How many broken files were left out.
        first_skipped: The first of them, with what is wrong.
        channels: C_T, channels of T's last map.
        teacher_stages: Where the stages of an external T end.
        student_stages: Where the stages of an external S0 end.
        stage_channels: Channels of T's stage maps that have a partner in S0, where maps are compared at several stages.
        given_widths: Widths of S0 (`Staged.widths`), where it is narrowed or S and A are cut from it.
        student_widths: Widths of S.
        assistant_widths: Widths of each A.
        shared_stages: How many stages of S0 S and A share, where their layout is a trunk.
        separation: The account of the budget, where S and A are trained.
        given: The weights files that the recipe named for T and S0 (``"teacher"``, ``"s0"``).
    """

    data: str
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: tuple[int, int]
    images: SplitSizes
    crop_fraction: float | None = None
    sources: Mapping[str, str] | None = None
    skipped: int | None = None
    first_skipped: tuple[str, ...] | None = None
    channels: int
    teacher_stages: tuple[str, ...] | None = None
    student_stages: tuple[str, ...] | None = None
    stage_channels: tuple[int, ...] | None = None
    given_widths: tuple[int, ...] | None = None  # the names are the keys of facts.json, which earlier runs have too
    student_widths: tuple[int, ...] | None = None
    assistant_widths: tuple[int, ...] | None = None
    shared_stages: int | None = None
    separation: SeparationFacts | None = None
    given: Mapping[str, NamedFile] = field(default_factory=dict)

    @property
    def fusion_level(self) -> str:
        """The level of fusion that S and A were cut for; tail where there is no separation."""
        return "tail" if self.separation is None else self.separation.level

    @property
    def test_split(self) -> str:
        """The test split in words."""
        origin = (self.sources or {}).get("test")
        return f"{self.data} test" if origin is None else f"{self.data} test: {origin}"

    def normalised(self, data: DataRecipe) -> DataRecipe:
        """Table `[data]` with the normalisation of this run, which was measured or read when it began."""
        return dataclasses.replace(data, mean=self.mean, std=self.std, normalisation="data")

    def to_json(self) -> dict[str, Any]:
        """The content of facts.json: what does not apply is left out."""
        return {key: value for key, value in dataclasses.asdict(self).items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class PartMetrics:
    """Results of one network of a run.

    Attributes:
        test_top1: Accuracy on the test images in percent.
        test_images: How many there are.
        parameters: Numbers that the network stores.
        macs: Multiply-adds for one image.
        unsupported_operators: Operators that `macs` does not count.
        test_top1_ema: Accuracy of the averaged weights in percent, where others ship.
        test_top1_last: Accuracy of the last weights in percent, where the average ships.
    """

    test_top1: float
    test_images: int
    parameters: int
    macs: int
    unsupported_operators: tuple[str, ...] = ()
    test_top1_ema: float | None = None
    test_top1_last: float | None = None


@dataclass(frozen=True, kw_only=True)
class PhaseMetrics:
    """A phase of training in short; accuracies are those on the held-out images in percent.

    Attributes:
        epochs: How many epochs the phase took.
        seconds: Time of its epochs.
        val_top1_last: Accuracy after the last epoch; None where nothing is held out or classified.
        val_top1_ema_last: Accuracy of the averaged weights after the last epoch.
        val_top1_best: The highest accuracy after any epoch.
        best_epoch: The epoch of the highest accuracy, from 1.
    """

    epochs: int
    seconds: float
    val_top1_last: float | None = None
    val_top1_ema_last: float | None = None
    val_top1_best: float | None = None
    best_epoch: int | None = None


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Numbers of test images that only one of two networks classifies right.

    Attributes:
        gained: Right by S + A alone.
        lost: Right by the control alone.
    """

    gained: int
    lost: int


@dataclass(frozen=True, kw_only=True)
class RunMetrics:
    """Results of a finished run; metrics.json.

    Attributes:
        parts: Results of every network, by its part (`networks.PARTS`).
        pairs: S + A against each control, image by image; empty where there is no S + A, and in older runs.
        phases: Every phase that was trained, by name.
        training_seconds: Time of all epochs.
        evaluation_seconds: Time of the evaluation at the end.
        peak_memory_mb: Largest memory of the device, or of the process on a CPU, in 10^6 bytes.
        test_sha256: Hash of the images that were judged (`evaluation.SplitHash`); empty in older runs.
        files: SHA-256 of facts.json and of every weights file, by path in the folder; empty in older runs.
    """

    parts: Mapping[str, PartMetrics]
    pairs: Mapping[str, Pairs] = field(default_factory=dict)
    phases: Mapping[str, PhaseMetrics]
    training_seconds: float
    evaluation_seconds: float
    peak_memory_mb: float
    test_sha256: str = ""
    files: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The content of metrics.json: what does not apply is left out, but for `val_top1_last`, which is null then."""
        content = dataclasses.asdict(self)
        for part in content["parts"].values():
            _drop_none(part)
        for phase in content["phases"].values():
            _drop_none(phase, but="val_top1_last")
        if not self.pairs:
            del content["pairs"]
        return content


@dataclass(frozen=True, kw_only=True)
class WeightsFacts:
    """Header of a weights file that this package wrote; all None in a file of others.

    Attributes:
        network: The phase, or the part, whose weights these are.
        classes: Names of the classes, in the order of the logits.
        mean: Mean that its images are normalised with, per channel, in units of [0, 1].
        std: Standard deviation that its images are normalised with.
    """

    network: str | None = None
    classes: tuple[str, ...] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


def _drop_none(content: dict[str, Any], but: str = "") -> None:
    for key in [key for key, value in content.items() if value is None and key != but]:
        del content[key]
