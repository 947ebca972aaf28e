"""The parity gate: whether an exported model still does what the trained one does.

Letters: N batch, K classes.
"""

from __future__ import annotations

import math
import os
import struct
import zipfile
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rkd_deploy.backends import Array, RunOn, available, infer_many
from rkd_deploy.backends.files import CARD_NAME, check_files, model_path, read_card
from rkd_deploy.card import ModelCard
from rkd_deploy.decoding import DecodingError, decode, read_json
from rkd_deploy.errors import BackendError, GateError, ModelFileError, UsageError
from rkd_deploy.fields import check_number
from rkd_deploy.images import as_input, to_array
from rkd_deploy.storage import open_regular

GOLDEN_NAME = "golden.npz"
GOLDEN_PHOTO = "golden/photo.jpg"
PHOTO_LOGITS = "golden/photo.json"
_KEYS = ("inputs", "logits", "tolerance")
# What zipfile and NumPy raise on broken archives.
_BROKEN_ARCHIVE = (
    OSError,
    ValueError,
    KeyError,
    EOFError,
    TypeError,
    AttributeError,
    RuntimeError,
    struct.error,
    zlib.error,
    zipfile.BadZipFile,
)


@dataclass(frozen=True)
class Parity:
    """Differences of two sets of logits, and whether they pass."""

    max_abs_diff: float
    """Largest |reference - candidate|; NaN where a logit is not finite."""
    mean_abs_diff: float
    agreement: float
    """Share of the inputs whose largest logit is the same one, 0 to 1."""
    n: int
    """Number of inputs."""
    tolerance: float
    """Largest `max_abs_diff` that passes."""
    passed: bool

    def to_dict(self) -> dict[str, Any]:
        """The parity for JSON; NaN, which JSON has not, becomes None."""
        return {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in asdict(self).items()
        }


def compare_logits(reference_logits: Array, candidate_logits: Array, tolerance: float) -> Parity:
    """Compare logits [N, K]; they pass where each differs by at most `tolerance` and all are finite.

    Raises:
        GateError: The shapes differ, or there is nothing to compare: such a pair can never pass.
        UsageError: The tolerance is negative or no number.
    """
    check_number("The parity tolerance", tolerance, 0)
    reference_NK = np.asarray(reference_logits, np.float64)
    candidate_NK = np.asarray(candidate_logits, np.float64)
    if reference_NK.shape != candidate_NK.shape or reference_NK.ndim != 2 or reference_NK.size == 0:
        raise GateError(
            f"The reference gives logits of shape {list(reference_NK.shape)} and the candidate "
            f"{list(candidate_NK.shape)}; parity needs two of one shape [N, K], neither 0. "
            "Feed both the same inputs, and check that both are the whole classifier."
        )
    if np.isfinite(reference_NK).all() and np.isfinite(candidate_NK).all():
        difference_NK = np.abs(reference_NK - candidate_NK)
        largest, mean = float(difference_NK.max()), float(difference_NK.mean())
    else:
        largest = mean = math.nan
    return Parity(
        max_abs_diff=largest,
        mean_abs_diff=mean,
        agreement=float(np.mean(reference_NK.argmax(axis=1) == candidate_NK.argmax(axis=1))),
        n=len(reference_NK),
        tolerance=float(tolerance),
        passed=largest <= tolerance,
    )


_ROUNDING = 1e-5
"""Share of the largest logit up to which a difference is rounding: float32 has 7 digits, and layers add theirs up."""


def _advice(parity: Parity, precision: str, largest: float) -> str:
    if precision not in ("fp32", "unknown"):
        return f"Export again with --precision fp32 to see whether {precision} is the cause."
    if math.isnan(parity.max_abs_diff):
        return "The file is float32: look at which of the two gives them, and at its weights."
    if parity.max_abs_diff <= _ROUNDING * largest:
        return (
            f"Logits reach {largest:.3g}, and float32 has 7 digits: this is rounding of a network that was trained for "
            "too few steps or too fast. Train for more train.epochs, or with a lower train.lr."
        )
    return (
        "The file is float32, so precision is not the cause: try rkd-deploy verify on another backend, then a simpler "
        "level (--fuse sum)."
    )


def gate(parity: Parity, what: str, precision: str = "fp32", *, largest: float = 0.0) -> None:
    """Let a parity that passed through, and stop at any other.

    Args:
        parity: What `compare_logits` or `verify` gave.
        what: What was compared, for the message: "model.onnx on onnxruntime against PyTorch".
        precision: Precision of the file, for advice that fits it.
        largest: Largest size of a reference logit, for advice too; 0 where it is not known.

    Raises:
        GateError: The parity did not pass.
    """
    if parity.passed:
        return
    difference = (
        "some logits are NaN or infinite"
        if math.isnan(parity.max_abs_diff)
        else f"logits differ by up to {parity.max_abs_diff:.3g} (mean {parity.mean_abs_diff:.3g})"
    )
    raise GateError(
        f"Parity failed for {what}: {difference} over {parity.n} inputs, the tolerance is {parity.tolerance:.3g}; "
        f"the same class comes first for {parity.agreement:.1%} of them. "
        f"{_advice(parity, precision, largest)} Where the difference is acceptable, state a larger tolerance."
    )


def verify(
    bundle_path: str | os.PathLike[str],
    run_on: RunOn | str = "onnxruntime",
    *,
    tolerance: float | None = None,
) -> Parity:
    """Prove a bundle again: run its golden inputs and its golden photo, and compare with the logits stored beside them.

    The photo goes through `images.to_array`, so pre-processing as it is done here is proven too; bundles of before have
    none.

    Args:
        bundle_path: Bundle folder, or the ONNX file in it.
        run_on: Where, or the name of a backend, which then runs on its own device.
        tolerance: Largest difference that passes. Default: the tolerance that is stored with the logits.

    Returns:
        The parity, passed or not; give it to `gate` to stop where it is not.

    Raises:
        ModelFileError: The model or golden.npz is missing, corrupt, or they do not belong together; a file of the
            bundle is not as it was written.
        DataError: The photo cannot be decoded here.
        BackendError: The backend cannot run here, or not on the device asked for.
    """
    golden = model_path(bundle_path).with_name(GOLDEN_NAME)
    if not check_files(bundle_path, complete=True):
        raise ModelFileError(
            f"The bundle {golden.parent} has no checksums: its {CARD_NAME} is missing or holds none, so that nothing "
            "shows whether its files are the ones that were exported. Copy the bundle again, or export it again with "
            "rkd-deploy export."
        )
    inputs, logits_NK, stored = read_golden(golden)
    run_on = run_on if isinstance(run_on, RunOn) else RunOn(run_on)
    with run_on.load(bundle_path) as loaded:
        photo = _read_photo(golden.parent, read_card(bundle_path, loaded.info.metadata))
        if photo is not None:
            inputs, logits_NK = _joined(inputs, photo[0], golden), _joined(logits_NK, photo[1], golden)
        try:
            candidate_NK = infer_many(loaded, inputs)
        except UsageError as error:
            raise ModelFileError(
                f"The inputs in {golden} do not fit the model beside it: {error} "
                "Export the bundle again with rkd-deploy export."
            ) from error
    return compare_logits(logits_NK, candidate_NK, stored if tolerance is None else tolerance)


def read_golden(path: Path) -> tuple[Array, Array, float]:
    """Inputs [N, ...], logits [N, K] and tolerance from a bundle's golden.npz.

    Raises:
        ModelFileError: The file is missing or corrupt, or a key is missing.
    """
    try:
        # Opened here and not by np.load, which leaves the file open where it fails, and waits for a pipe.
        with open_regular(path) as stream, np.load(stream, allow_pickle=False) as stored:
            inputs, logits_NK, tolerance = (stored[key] for key in _KEYS)
        return inputs, logits_NK, float(tolerance.item())
    except FileNotFoundError as error:
        raise ModelFileError(
            f"There is no {path}, which holds the inputs and logits to verify against. "
            "Name a bundle folder written by rkd-deploy export."
        ) from error
    except _BROKEN_ARCHIVE as error:
        raise ModelFileError(
            f"{path} cannot be read ({error}); it must hold {', '.join(_KEYS)}. "
            "Export the bundle again with rkd-deploy export."
        ) from error


def _read_photo(folder: Path, card: ModelCard | None) -> tuple[Array, Array] | None:
    """The golden photo of a bundle as the graph takes it, [1, ...], with its logits [1, K]; None: it has none."""
    if card is None or not (folder / GOLDEN_PHOTO).is_file():
        return None
    file = folder / PHOTO_LOGITS
    try:
        expected = decode(PhotoAnswer, read_json(file))
    except DecodingError as error:
        raise ModelFileError(
            f"{file} cannot be read ({error}); it must hold the logits of {GOLDEN_PHOTO}. "
            "Export the bundle again with rkd-deploy export."
        ) from error
    pixels = to_array(folder / GOLDEN_PHOTO, card.preprocess)[np.newaxis]
    return as_input(pixels, card.preprocess), np.array([expected.logits], np.float32)


def _joined(rows: Array, more: Array, golden: Path) -> Array:
    if rows.shape[1:] != more.shape[1:] or rows.ndim == 0:
        raise ModelFileError(
            f"{golden} holds arrays of shape {list(rows.shape)} and {golden.parent / GOLDEN_PHOTO} gives "
            f"{list(more.shape)}: they do not belong together. Export the bundle again with rkd-deploy export."
        )
    return np.concatenate([rows, more.astype(rows.dtype, copy=False)])


@dataclass(frozen=True)
class PhotoAnswer:
    """What a bundle must answer for its golden photo: the content of golden/photo.json."""

    logits: tuple[float, ...]
    tolerance: float
    """Largest difference of a logit."""
    label: str
    index: int
    probability: float
    """Probability of the class with the largest logit."""


@dataclass(frozen=True)
class BackendParity:
    """Whether one backend reproduces a bundle's golden logits.

    Attributes:
        backend: Name of the backend.
        parity: The backend's logits against the golden ones; None where it cannot run this bundle here.
        reason: Why it cannot run the bundle; None where it can.
    """

    backend: str
    parity: Parity | None
    reason: str | None


def verify_everywhere(
    bundle_path: str | os.PathLike[str],
    *,
    device: str | None = None,
    tolerance: float | None = None,
) -> list[BackendParity]:
    """Run `verify` on every backend that works on this machine.

    Args:
        bundle_path: Bundle folder, or the ONNX file in it.
        device: As `RunOn.device`, for every backend.
        tolerance: Largest difference that passes. Default: the bundle's own.

    Raises:
        ModelFileError: The bundle is missing, corrupt or changed.
        BackendError: No backend here can run it.
    """
    verdicts = []
    for status in available():
        if not status.ok:
            continue
        try:
            parity = verify(bundle_path, RunOn(status.name, device=device), tolerance=tolerance)
            verdicts.append(BackendParity(status.name, parity, None))
        except BackendError as error:  # e.g. pytorch, of a bundle without model.pt2
            verdicts.append(BackendParity(status.name, None, str(error)))
    if all(verdict.parity is None for verdict in verdicts):
        reasons = " ".join(f"{verdict.backend}: {verdict.reason}" for verdict in verdicts)
        where = "" if device is None else f" on {device}"
        raise BackendError(
            f"No backend here can run {os.fspath(bundle_path)}{where}. {reasons or 'None is installed.'} "
            "Install one (rkd-deploy backends lists them), or verify on another machine."
        )
    return verdicts
