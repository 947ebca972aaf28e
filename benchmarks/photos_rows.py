"""What is trained on real photos by photos.py: networks, losses and their weights, as data."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ladder_rows import Row as Losses

LAYOUTS = ("branches", "side_by_side", "trunk")
OWN_HEAD = ("T", "cross-entropy", "distilled", "narrowed")
"""Kinds whose networks keep a head of their own; the others have an adapter and T's head, which learns along."""
FRACTIONS = (0.7, 0.5, 0.3)
"""Shares of S0's MACs that narrowed S0s have, beside early exit."""
TITLES = {
    "T": "T",
    "cross-entropy": "S0, cross-entropy",
    "distilled": "S0 + best loss",
    "control": "S0, same losses",
    "branches": "S + A, branches",
    "side_by_side": "S + A, side by side",
    "trunk": "S + A, trunk",
    "early branches": "S + A, branches, early exit",
    "early trunk": "S + A, trunk, early exit",
    "narrowed": "S0 narrowed + best loss",
}
"""Kinds in words."""


@dataclass(frozen=True)
class Row:
    """What one network is and how it learns.

    Attributes:
        network: Name of T, S0, or of what a reader would take instead.
        kind: One of `TITLES`: what it competes as. Each kind of a network has its own best settings.
        task: ce, kd, dkd or lskd.
        x: Weight of the task loss on the sum.
        x_student: Weight of the task loss on S, as a share of x.
        distance: Weight of D.
        lr: Peak learning rate.
        mixed: Whether its images and labels are mixed (mixup, cutmix).
        fraction: S0 is narrowed to this share of its MACs.
    """

    network: str
    kind: str
    task: str = "dkd"
    x: float = 1.0
    x_student: float = 0.0
    distance: float = 1.0
    lr: float = 0.1
    mixed: bool = False
    fraction: float | None = None

    @property
    def own_head(self) -> bool:
        """Whether the network keeps its head."""
        return self.kind in OWN_HEAD

    @property
    def layout(self) -> str | None:
        """How S and A lie; None for a network without A."""
        layout = self.kind.removeprefix("early ")
        return layout if layout in LAYOUTS else None

    @property
    def place(self) -> str:
        """What the row competes for, as a key: the network as it ships."""
        return f"{self.network}, {self.kind}" + (f" {self.fraction:g}" if self.fraction else "")

    @property
    def name(self) -> str:
        """Place and settings."""
        mixed = ", mixed" if self.mixed else ""
        return f"{self.place}: {self.task}, x {self.x:g}, lr {self.lr:g}{mixed}"

    @property
    def losses(self) -> Losses:
        """The settings of the losses as the ladder has them."""
        settings = {key: getattr(self, key) for key in ("own_head", "task", "x", "x_student", "distance")}
        return Losses(self.name, **settings)


@dataclass(frozen=True)
class Group:
    """Rows that learn at the same time in one process, and share their batches and T's pass over them.

    Attributes:
        key: Name in the record.
        rows: At most a dozen.
        seed: Of weights, order and augmentation.
        of_teacher: Whether these are candidates for T, which learn longer.
    """

    key: str
    rows: tuple[Row, ...]
    seed: int
    of_teacher: bool = False

    @property
    def needs_teacher(self) -> bool:
        """Whether a row is taught."""
        return any(row.task != "ce" for row in self.rows)


@dataclass(frozen=True)
class Study:
    """The networks of the study.

    Attributes:
        teachers: Candidates for T.
        s0: Networks that are cut into S and A.
        others: What a reader would take instead.
        seeds: Of every row that was chosen; the first also chooses.
    """

    teachers: tuple[str, ...] = ("tv:resnet34", "tv:resnet50")
    s0: tuple[str, ...] = ("tv:resnet18", "timm:mobilenetv4_conv_small")
    others: tuple[str, ...] = (
        "tv:mobilenet_v3_small",
        "timm:fasternet_t0",
        "timm:efficientvit_b0",
        "timm:ghostnet_100",
    )
    seeds: tuple[int, ...] = (0, 1, 2)


TINY = Study(("resnet8",), ("tv:mobilenet_v3_small",), ("timm:lcnet_050",), (0, 1))
"""A study that tries the whole path in minutes on a CPU."""


def candidates(network: str, kind: str) -> tuple[Row, ...]:
    """The settings among which held-out photos choose."""
    if kind in ("T", "cross-entropy"):
        return tuple(Row(network, kind, "ce", mixed=mixed) for mixed in (False, True))
    if kind == "distilled":
        return tuple(Row(network, kind, task) for task in ("kd", "dkd", "lskd"))
    return tuple(Row(network, kind, x=x) for x in (1.0, 3.0))


def best(lines: Iterable[Mapping[str, Any]], place: str) -> Row | None:
    """The row of a place with the highest held-out accuracy with the first seed; None where nothing was trained."""
    rivals = [line for line in lines if line["seed"] == 0 and line.get("held_out") is not None]
    rivals = [line for line in rivals if row_of(line).place == place]
    return row_of(max(rivals, key=lambda line: float(line["held_out"]))) if rivals else None


def row_of(line: Mapping[str, Any]) -> Row:
    """The row of a line of the record."""
    return Row(**{key: value for key, value in line["row"].items() if key in Row.__dataclass_fields__})


def groups(study: Study, lines: Sequence[Mapping[str, Any]], done: Container[str]) -> Iterator[Group]:
    """What is to be trained, by worth, as far as the lines so far allow to say it.

    Args:
        study: The networks.
        lines: Of the record.
        done: Keys of groups that are done. Those of the first seed choose; what they have not chosen yet is not trained
            with others.
    """
    yield Group("T", tuple(row for name in study.teachers for row in candidates(name, "T")), 0, of_teacher=True)
    networks = (*study.s0, *study.others)
    alone = []
    for start in range(0, len(networks), 3):
        rows = tuple(row for name in networks[start : start + 3] for row in candidates(name, "cross-entropy"))
        alone.append(Group(f"cross-entropy {start // 3}", rows, 0))
    yield from alone
    baselines = all(group.key in done for group in alone)
    kinds = ("distilled", "control", *LAYOUTS)
    searched = []
    for name in study.s0:
        whole = Group(f"{name} whole", tuple(row for kind in kinds[:2] for row in candidates(name, kind)), 0)
        cut = Group(f"{name} cut", tuple(row for kind in kinds[2:] for row in candidates(name, kind)), 0)
        yield from (whole, cut)
        if whole.key in done and cut.key in done:
            searched.append(name)
    for seed in study.seeds[1:]:
        for name in searched if baselines else ():
            yield from _chosen(
                f"{name} seed {seed}", lines, [Row(name, kind) for kind in ("cross-entropy", *kinds)], seed
            )
    others = Group("others", tuple(row for name in study.others for row in candidates(name, "distilled")[:2]), 0)
    yield others
    for seed in study.seeds:
        for name in searched:
            yield from _early(name, lines, seed)
    if others.key in done and baselines:
        places = [Row(name, kind) for name in study.others for kind in ("cross-entropy", "distilled")]
        for seed in study.seeds[1:]:
            yield from _chosen(f"others seed {seed}", lines, places, seed)
    if T := chosen_teacher(study, lines):
        for seed in study.seeds[1:]:
            yield Group(f"T seed {seed}", (T,), seed, of_teacher=True)


def chosen_teacher(study: Study, lines: Sequence[Mapping[str, Any]]) -> Row | None:
    """T: the candidate with the highest held-out accuracy."""
    rows = {row for name in study.teachers for row in candidates(name, "T")}
    rivals = [line for line in lines if line["seed"] == 0 and row_of(line) in rows and "held_out" in line]
    return row_of(max(rivals, key=lambda line: float(line["held_out"]))) if rivals else None


def _chosen(key: str, lines: Sequence[Mapping[str, Any]], kinds: Sequence[Row], seed: int) -> Iterator[Group]:
    """The chosen rows with another seed; kinds that were refused are left out."""
    if rows := tuple(row for kind in kinds if (row := best(lines, kind.place)) is not None):
        yield Group(key, rows, seed)


def _early(name: str, lines: Sequence[Mapping[str, Any]], seed: int) -> Iterator[Group]:
    """S + A that also answer early, and S0 at smaller widths, by the settings that were chosen for S0 and S + A."""
    cut = {layout: best(lines, Row(name, layout).place) for layout in ("branches", "trunk")}
    rows = [replace(row, kind=f"early {layout}", x_student=1.0) for layout, row in cut.items() if row is not None]
    if (row := best(lines, Row(name, "distilled").place)) is not None:
        rows += [replace(row, kind="narrowed", fraction=fraction) for fraction in FRACTIONS]
    if rows:
        yield Group(f"{name} early, seed {seed}", tuple(rows), seed)


def as_json(group: Group) -> dict[str, Any]:
    """A group as JSON has it."""
    return asdict(group)


def from_json(content: Mapping[str, Any]) -> Group:
    """The group of `as_json`."""
    return Group(**{**content, "rows": tuple(Row(**row) for row in content["rows"])})
