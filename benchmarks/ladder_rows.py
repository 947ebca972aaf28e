"""What is trained on a rung of the ladder by ladder_joint.py: networks, losses and their weights, as data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

S0_WIDTHS = (16, 16, 32, 64)
"""Of ResNet-8 and ResNet-20 alike."""


@dataclass(frozen=True)
class Row:
    """What one network is and how it learns.

    Attributes:
        name: Of the row.
        student: Widths of S, or of S0.
        assistant: Widths of A; None for a network without one.
        shared: First stages that S and A share.
        own_head: S0 with a head of its own, by the task loss alone; else an adapter and T's head, which learns along.
        task: ce, kd, dkd or lskd.
        x: Weight of the task loss on the sum.
        x_student: Weight of the task loss on S, as a share of x.
        distance: Weight of D.
        lr: Peak learning rate.
    """

    name: str
    student: tuple[int, ...] = S0_WIDTHS
    assistant: tuple[int, ...] | None = None
    shared: int = 0
    own_head: bool = False
    task: str = "dkd"
    x: float = 1.0
    x_student: float = 0.0
    distance: float = 1.0
    lr: float = 0.1

    @property
    def kind(self) -> str:
        """What the row competes as: each kind has its own best settings."""
        if self.own_head:
            return "baseline"
        if self.name.startswith(("timed", "early", "same trunk")):
            return self.name.partition(":")[0]
        if self.assistant is not None:
            return "sum"
        return "control" if self.student == S0_WIDTHS else "no A"


def trunk(first: Sequence[int], student: int, assistant: int, name: str = "", **more: Any) -> Row:
    """S + A on a trunk of two stages."""
    widths = " ".join(map(str, first))
    told = "".join(
        f", {key} {value:g}" if isinstance(value, float | int) else f", {value}" for key, value in more.items()
    )
    row = Row(f"{name}trunk {widths} + {student} {assistant}{told}", (*first, student), (*first, assistant), shared=2)
    return replace(row, **more)


def control(**more: Any) -> Row:
    """S0 with S + A's losses."""
    told = "".join(
        f", {key} {value:g}" if isinstance(value, float | int) else f", {value}" for key, value in more.items()
    )
    return replace(Row(f"S0, same losses{told}"), **more)


def whole(*widths: int, name: str = "no A: ", **more: Any) -> Row:
    """A network of a trunk's shape with one wide end, and no A."""
    told = "".join(f", {key} {value:g}" for key, value in more.items())
    return replace(Row(f"{name}{' '.join(map(str, widths))}{told}", widths), **more)


BASELINES = (
    Row("S0, KD", own_head=True, task="kd"),
    Row("S0, DKD", own_head=True, task="dkd"),
    Row("S0, KD standardised", own_head=True, task="lskd"),
    Row("S0, cross-entropy", own_head=True, task="ce"),
)

_SHAPE = ((16, 16, 24), 56, 48)  # what `separate` cuts: layout trunk, assistant_share 0.2, round_to 8
_R20 = (
    *(control(x=x) for x in (1, 2, 4, 8)),
    *(trunk(*_SHAPE, x=x) for x in (1, 2, 4)),
    trunk((12, 12, 28), 56, 60, x=2),
    trunk((16, 8, 24), 64, 64, x=2),
    trunk((16, 12, 24), 56, 64, x=2),
    trunk((16, 16, 32), 48, 32, "timed: ", x=2),
    trunk((16, 16, 16), 64, 48, "timed: ", x=2),
    trunk((16, 16, 28), 60, 32, x=2),
    Row("one stage shared: 16 16 + 24 56, 16 32, x 2", (16, 16, 24, 56), (16, 16, 16, 32), shared=1, x=2),
    whole(16, 16, 24, 76, x=2),
    whole(12, 12, 28, 84, x=2),
    trunk(*_SHAPE, x=2, distance=0),
    trunk(*_SHAPE, x=2, distance=4),
    trunk(*_SHAPE, x=2, x_student=0.5),
    control(x=2, distance=0),
    control(task="lskd"),
    trunk(*_SHAPE, task="lskd"),
    control(x=2, lr=0.2),
    trunk(*_SHAPE, x=2, lr=0.2),
)
_R8 = (
    *(control(x=x) for x in (1, 2, 4)),
    *(trunk((12, 12, 28), 60, 60, x=x) for x in (1, 2, 4)),
    trunk((16, 8, 32), 56, 64, x=2),
    trunk((16, 16, 16), 64, 48, "timed: ", x=2),
    trunk((16, 16, 16), 64, 56, "timed: ", x=2),
    trunk((16, 16, 16), 56, 64, "timed: ", x=1),
    trunk((16, 16, 16), 64, 48, "timed: ", x=4),
    trunk((8, 16, 16), 64, 64, "timed: ", x=2),
    trunk((8, 16, 32), 48, 32, "timed: ", x=2),
    trunk((16, 16, 32), 32, 32, "timed: ", x=2),
    whole(16, 16, 16, 88, x=2),
    whole(12, 12, 28, 85, x=2),
    whole(12, 12, 28, 85, x=4),
    trunk((12, 12, 28), 60, 60, x=2, distance=0),
    control(x=2, distance=0),
    trunk((12, 12, 28), 60, 60, x=2, lr=0.2),
    control(x=2, lr=0.2),
    control(task="lskd"),
    trunk((12, 12, 28), 60, 60, task="lskd"),
    trunk((16, 16, 16), 64, 48, "timed: ", task="lskd"),
)
SEARCH = {"resnet56_resnet20": _R20, "resnet20_resnet8": _R8}
"""Held-out images choose among these, each kind by its own settings. "timed": cut to be no slower than S0 where a
channel count is padded to 16 (ONNX Runtime on AVX-512)."""

SAME_TRUNK = {"resnet56_resnet20": (), "resnet20_resnet8": (whole(16, 8, 32, 91, name="same trunk: ", x=2),)}
"""No A, on the trunk of the S + A that held-out images chose, where the best row without A has another trunk."""

EARLY = (
    trunk((16, 16, 32), 64, 64, "early: ", x=2, x_student=1.0),
    trunk((16, 16, 16), 48, 80, "early: ", x=2, x_student=0.5),
    trunk((16, 16, 32), 32, 64, "early: ", x=2, x_student=0.5),
    trunk((16, 8, 32), 56, 64, "early: ", x=2, x_student=0.5),
    trunk((16, 8, 32), 48, 64, "early: ", x=2, x_student=1.0),
    trunk((16, 8, 32), 32, 80, "early: ", x=2, x_student=0.5),
)
"""Where S answers first: trained without the held-out images, which then set the threshold."""
