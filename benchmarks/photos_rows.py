"""What is trained on real photos by photos.py: networks, losses and their weights, as data."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ladder_rows import Row as Losses

LAYOUTS = ("branches", "side_by_side", "trunk")
KINDS = ("distilled", "control", "branches", "side_by_side")
"""What every S0 is trained as."""
PARTS = {"whole": ("distilled", "control"), "cut": ("branches", "side_by_side"), "trunk": ("trunk",)}
"""Kinds whose settings are searched in one group."""
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
"""Kinds in words. Beside them, for how long and how fast a folder of photos should be learnt by default: "N epochs", S0
by cross-entropy from scratch, and "inherited, N epochs", S + A of half of T's MACs, which begin with T's weights."""


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
        weight_decay: On convolutions and matrices.
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
    weight_decay: float = 1e-3
    mixed: bool = False
    fraction: float | None = None

    @property
    def own_head(self) -> bool:
        """Whether the network keeps its head."""
        return self.kind in OWN_HEAD or (self.kind.endswith("epochs") and not self.inherits)

    @property
    def inherits(self) -> bool:
        """Whether S and A are cut from the trained T, weights included."""
        return self.kind.startswith("inherited")

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
        return f"{self.place}: {self.task}, x {self.x:g}, lr {self.lr:g}, decay {self.weight_decay:g}{mixed}"

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
        epochs: Default: those of the study.
    """

    key: str
    rows: tuple[Row, ...]
    seed: int
    of_teacher: bool = False
    epochs: int | None = None

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
        epochs: Lengths of training that are tried for the defaults of `rkd-deploy train` on a folder of photos.
        inherited_epochs: The same, for networks that begin with T's weights.
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
    epochs: tuple[int, ...] = (30, 60, 120)
    inherited_epochs: tuple[int, ...] = (15, 30, 60)


TINY = Study(("resnet8",), ("tv:mobilenet_v3_small",), ("timm:lcnet_050",), (0, 1), (1,), (1,))
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
    searched: dict[str, list[str]] = {}  # kinds by network
    for name in study.s0:
        for part, kinds in PARTS.items():
            group = Group(f"{name} {part}", tuple(row for kind in kinds for row in candidates(name, kind)), 0)
            yield group
            if group.key in done:
                searched.setdefault(name, []).extend(kinds)
    for seed in study.seeds[1:]:
        for name, known in searched.items():
            if baselines and set(KINDS) <= {*known}:
                places = [Row(name, kind) for kind in ("cross-entropy", *KINDS)]
                yield from _chosen(f"{name} seed {seed}", lines, places, seed)
            if "trunk" in known:  # a group of its own: some networks could not be cut so at first
                yield from _chosen(f"{name} trunk, seed {seed}", lines, [Row(name, "trunk")], seed)
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
    for epochs in study.epochs:
        rows = tuple(
            Row(study.s0[0], f"{epochs} epochs", "ce", lr=lr, weight_decay=decay)
            for lr in (0.03, 0.1, 0.3)
            for decay in (5e-4, 2e-3)
        )
        yield Group(f"{epochs} epochs", rows, 0, epochs=epochs)
    if T:
        for epochs in study.inherited_epochs:
            place = Row(T.network, f"inherited, {epochs} epochs", fraction=0.5)
            rows = tuple(replace(place, lr=lr) for lr in (0.01, 0.03, 0.1))
            yield Group(f"inherited, {epochs} epochs", rows, 0, epochs=epochs)


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
    for layout in ("branches", "trunk"):
        rows = []
        if (row := best(lines, Row(name, layout).place)) is not None:
            rows = [replace(row, kind=f"early {layout}", x_student=1.0)]
        if layout == "branches" and (row := best(lines, Row(name, "distilled").place)) is not None:
            rows += [replace(row, kind="narrowed", fraction=fraction) for fraction in FRACTIONS]
        if rows:
            yield Group(f"{name} early {layout}, seed {seed}", tuple(rows), seed)


def as_json(group: Group) -> dict[str, Any]:
    """A group as JSON has it."""
    return asdict(group)


def from_json(content: Mapping[str, Any]) -> Group:
    """The group of `as_json`."""
    return Group(**{**content, "rows": tuple(Row(**row) for row in content["rows"])})
