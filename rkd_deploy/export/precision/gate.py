"""Judges whether a file of lower precision classifies as the trained network does.

Letters: N images, K classes.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rkd_deploy.backends import Array, Backend, infer_many, load_backend
from rkd_deploy.bench.accuracy import top1
from rkd_deploy.bench.statistics import paired_interval
from rkd_deploy.card import ModelCard
from rkd_deploy.errors import DataError, GateError
from rkd_deploy.export.precision.options import Gates
from rkd_deploy.images import as_input
from rkd_deploy.serve.early_exit import every_step


@dataclass(frozen=True, kw_only=True)
class GateResult:
    """What the gate of lower precision measured of a file on held-out images.

    Attributes:
        images: N.
        agreement: Share of them, in %, that both put into the same class.
        reference_top1: Accuracy of the float32 PyTorch model in %; None where labels are not known.
        top1: Accuracy of the file.
        drop: The difference in points.
        drop_interval: Its 95 % interval over images like these, in points.
        max_abs_diff: Largest difference of a logit.
        min_agreement: Limit, in %, as asked for.
        max_drop: Limit, in points, as asked for.
        effective_agreement: `min_agreement` in whole images, which the file is held to, in %.
        effective_drop: `max_drop` in whole images, which the file is held to, in points.
        passed: Both effective limits hold, and every logit is finite.
    """

    images: int
    agreement: float
    reference_top1: float | None
    top1: float | None
    drop: float | None
    drop_interval: tuple[float, float] | None
    max_abs_diff: float
    min_agreement: float
    max_drop: float
    effective_agreement: float
    effective_drop: float
    passed: bool

    def in_words(self) -> str:
        """One line, with the limits as they were held to and the interval of the drop."""
        agreement = _limit(self.min_agreement, self.effective_agreement, "", self.images)
        words = f"{self.agreement:.2f} % of {self.images} held-out images keep their class (limit {agreement})"
        if self.drop is not None and self.drop_interval is not None:
            low, high = self.drop_interval
            words += (
                f", top-1 {self.reference_top1:.2f} -> {self.top1:.2f} %: {self.drop:.2f} points lost, 95 % interval "
                f"{low:.2f} to {high:.2f} (limit {_limit(self.max_drop, self.effective_drop, ' points', self.images)})"
            )
        return words

    def to_dict(self) -> dict[str, Any]:
        """For JSON; an infinite difference, which JSON has not, becomes None."""
        return {key: None if value == np.inf else value for key, value in asdict(self).items()}


class HeldOut:
    """Images with the reference's answer to each, to judge candidates on.

    Args:
        reference: The float32 PyTorch model.
        batches: Images uint8 [n, H, W, C] and labels [n], -1 where they are not known.
        card: How the graph takes images, and its classes.

    Raises:
        DataError: There are no images, or a label is none of the card's classes.
    """

    def __init__(self, reference: Backend, batches: Iterable[tuple[Array, Array]], card: ModelCard) -> None:
        pairs = [(as_input(images_NHWC, card.preprocess), labels_n) for images_NHWC, labels_n in batches]
        if not pairs:
            raise DataError("A lower precision is judged on held-out images, and there are none. Give some.")
        self.inputs = [x for x, _ in pairs]
        self.labels_N = np.concatenate([labels_n for _, labels_n in pairs])
        self.logits_NK = np.concatenate([infer_many(reference, x) for x in self.inputs])
        classes = len(card.labels)
        if self.labels_N.max() >= classes or self.logits_NK.shape[1] != classes:
            raise DataError(
                f"The network gives {self.logits_NK.shape[1]} logits, the held-out labels go up to "
                f"{self.labels_N.max()}, and the card names {classes} classes ({', '.join(card.labels[:3])}, ..). "
                "Judge on images of the classes that the network was trained for."
            )

    def judge(self, logits_NK: Array, gates: Gates) -> GateResult:
        """Hold a file's logits against the reference's."""
        # In float64: an overflow of float16 logits is to be seen as infinite, not to overflow again here.
        difference = np.abs(logits_NK.astype(np.float64) - self.logits_NK)
        finite = bool(np.isfinite(difference).all())
        same_N = logits_NK.argmax(1) == self.logits_NK.argmax(1)
        agreement = 100 * float(same_N.mean())
        # All or nothing: an accuracy over the labelled part would be of other images than the agreement.
        known = bool((self.labels_N >= 0).all())
        before = top1(self.logits_NK.argmax(1), self.labels_N) if known else None
        after = top1(logits_NK.argmax(1), self.labels_N) if known else None
        drop = None if before is None or after is None else before - after
        count = len(same_N)
        differing, lost = _allowed(100 - gates.agreement, count), _allowed(gates.drop, count)
        right_N = logits_NK.argmax(1) == self.labels_N
        was_right_N = self.logits_NK.argmax(1) == self.labels_N
        return GateResult(
            images=count,
            agreement=agreement,
            reference_top1=before,
            top1=after,
            drop=drop,
            drop_interval=_drop_interval(was_right_N, right_N) if known else None,
            max_abs_diff=float(difference.max()) if finite else np.inf,
            min_agreement=gates.agreement,
            max_drop=gates.drop,
            effective_agreement=100 - 100 * differing / count,
            effective_drop=100 * lost / count,
            # In whole images on both sides: a share in % is a rounded fraction, and a limit met exactly must pass.
            passed=finite
            and _images(100 - agreement, count) <= differing
            and (drop is None or _images(drop, count) <= lost),
        )


def _limit(requested: float, effective: float, unit: str, images: int) -> str:
    """A limit as asked for, and what it comes to in whole images where that is another number."""
    words = f"{requested:g}{unit}"
    return words if math.isclose(requested, effective) else f"{words}, in whole images of {images} {effective:.2f}"


def _drop_interval(was_right_N: npt.NDArray[np.bool_], is_right_N: npt.NDArray[np.bool_]) -> tuple[float, float]:
    """95 % interval of a drop of accuracy, in points, between two classifiers of the same images."""
    lost, gained = int((was_right_N & ~is_right_N).sum()), int((~was_right_N & is_right_N).sum())
    return paired_interval(lost, gained, len(was_right_N))


def _images(share: float, count: int) -> int:
    """A share in % as images."""
    return round(share * count / 100)


def _allowed(share: float, count: int) -> int:
    """A limit in % as images, rounded up: of 400 images 0.1 % is one, for a near tie may fall either way."""
    return math.ceil(share * count / 100 - 1e-6)


def logits_of(proto: Any, inputs: Iterable[Array], backend: str) -> Array:
    """Logits [N, K] of a graph in memory for batches [n, ...] as it takes them."""
    logits_NK: Array = logits_of_steps([proto], inputs, backend)[0]
    return logits_NK


def logits_of_steps(protos: Sequence[Any], inputs: Iterable[Array], backend: str) -> Array:
    """Logits [k + 1, N, K] after every step (`every_step` of `serve.early_exit`) of graphs in memory, for batches."""
    with tempfile.TemporaryDirectory(prefix="rkd-deploy-") as folder, ExitStack() as opened:
        steps = []
        for number, proto in enumerate(protos):
            file = Path(folder) / f"{number}.onnx"
            file.write_bytes(proto.SerializeToString())
            steps.append(opened.enter_context(load_backend(backend, file)))
        return np.concatenate([every_step(steps, x) for x in inputs], axis=1)


def gate_error(result: GateResult, precision: str, float32_layers: Sequence[str], report: Path) -> GateError:
    """The error for a file that lost too much, with the ways out that are left."""
    stay = f" with {len(float32_layers)} layers kept in float32" if float32_layers else ""
    way_out = " or let --keep auto leave out the layers that hurt" if precision == "int8" and not float32_layers else ""
    return GateError(
        f"{precision} loses too much{stay}: {result.in_words()}. Report: {report}. Choose a higher precision"
        f"{way_out}; where the loss is acceptable, state other limits with --min-agreement and --max-drop."
    )
