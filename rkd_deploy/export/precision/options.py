"""Says which precisions there are, for which targets, and what a file may lose by them.

Precision lives in the ONNX file: TensorRT 11 has no precision flags, and no runtime asked here lowers one by itself.
A file is written for a target, because runtimes want INT8 differently:

    cpu        ONNX Runtime's CPU kernels: uint8 activations with a zero point, also around additions
    openvino   the same
    tensorrt   int8 with every zero point 0, biases in float32, inputs of convolutions and matrix products only
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rkd_deploy.backends import check_backend
from rkd_deploy.errors import UsageError, require
from rkd_deploy.fields import changed_flags, check_fields, check_number, option

PRECISIONS = ("fp32", "fp16", "bf16", "int8", "fp8")
TARGETS = ("cpu", "tensorrt", "openvino")
QUANTISED = ("int8", "fp8")
AUTO = "auto"

_PROVERS = {"cpu": "onnxruntime", "openvino": "openvino", "tensorrt": "onnxruntime"}
_RUNTIMES = {"cpu": ("onnxruntime",), "openvino": ("openvino",), "tensorrt": ("tensorrt", "tensorrt-rtx")}
_REFUSED = {
    ("bf16", "cpu"): "ONNX Runtime has no bfloat16 kernels for convolutions on a CPU",
    ("fp8", "cpu"): "no CPU computes in 8-bit floats, and ONNX Runtime's optimiser gives wrong results for such graphs",
    ("fp8", "openvino"): "OpenVINO reads 8-bit floats and computes in float32, slower than the float32 file",
}


@dataclass(frozen=True, kw_only=True)
class Gates:
    """What a file of lower precision may lose on held-out images; the float32 PyTorch model is the reference."""

    agreement: float
    """Least share of images, in %, whose first class is the reference's."""
    drop: float
    """Most points of top-1 accuracy that may be lost, where the images have labels."""

    def __post_init__(self) -> None:
        check_number("--min-agreement", self.agreement, 0, 100)
        check_number("--max-drop", self.drop, 0, 100)


GATES = {
    "fp16": Gates(agreement=99.5, drop=0.1),
    "bf16": Gates(agreement=97.0, drop=0.5),
    "int8": Gates(agreement=90.0, drop=0.5),
    "fp8": Gates(agreement=90.0, drop=0.5),
}
"""Defaults. Agreement bounds the drop from above and says more than it where images are few."""


@dataclass(frozen=True, kw_only=True)
class PrecisionOptions:
    """What an export asks for; every combination that cannot be is refused here.

    Raises:
        UsageError: A precision or target is unknown, does not apply to the other, or an option has no effect.
    """

    precision: str = option("--precision", "fp32, fp16, bf16, int8 or fp8.", default="fp32", choices=PRECISIONS)
    target: str | None = option(
        "--target", "Of a lower precision: cpu (default), tensorrt or openvino.", default=None, choices=TARGETS
    )
    calibration: Path | None = option(
        "--calibration", "Folder of images to calibrate on. Default: training images.", default=None
    )
    count: int | None = option(
        "--calibration-count",
        "How many of them. Default: 256, or all there are.",
        default=None,
        low=1,
        high=1_000_000,
    )
    seed: int = option("--seed", "Draws images to calibrate and to judge on.", default=0, low=0, high=2**32 - 1)
    keep: tuple[str, ...] = option(
        "--keep",
        "Layers to leave in float32: NAME,NAME or auto, which finds those that hurt.",
        default=(),
        reads=str,
        parse=lambda text: tuple(name.strip() for name in text.split(",") if name.strip()),
    )
    agreement: float | None = option(
        "--min-agreement", "Least % of held-out images that keep their class.", default=None, low=0, high=100
    )
    drop: float | None = option(
        "--max-drop", "Most points of accuracy that may be lost on them.", default=None, low=0, high=100
    )

    def __post_init__(self) -> None:
        check_fields(self)
        if reason := _REFUSED.get((self.precision, self.runtime)):
            fitting = [target for target in TARGETS if (self.precision, target) not in _REFUSED]
            raise UsageError(
                f"--precision {self.precision} does not apply to --target {self.runtime}: {reason}. "
                f"Choose --target {' or '.join(fitting)}, or --precision fp16 or int8."
            )
        if self.precision not in QUANTISED:
            self._refuse("which calibrates nothing", "calibration", "count")
            self._refuse("which leaves no layer out", "keep")
        if self.precision == "fp32":
            self._refuse("whose file is the same for every target", "target")
            self._refuse("which --tolerance holds to more", "agreement", "drop")
        if AUTO in self.keep and len(self.keep) > 1:
            raise UsageError(f"--keep {','.join(self.keep)}: auto finds the layers by itself; name layers, or auto.")
        if self.precision == "fp8" and AUTO in self.keep:
            raise UsageError("--keep auto searches for --precision int8 only. Name the layers: --keep NAME,NAME")

    def _refuse(self, why: str, *names: str) -> None:
        for flag in changed_flags(self, *names):
            raise UsageError(f"{flag} has no effect with --precision {self.precision}, {why}. Leave it out.")

    def check_installed(self) -> None:
        """Refuse what could not be converted or proven here, before anything is computed.

        Raises:
            MissingDependencyError: The converter or the backend that the file is proven on is not installed.
        """
        if self.precision == "fp8":
            require("modelopt", "quant")
        if self.is_lower:
            check_backend(self.prover)

    @property
    def is_lower(self) -> bool:
        """Whether this is anything else than float32."""
        return self.precision != "fp32"

    @property
    def runtime(self) -> str:
        """The target, default filled in."""
        return self.target or "cpu"

    @property
    def gates(self) -> Gates:
        """The limits, defaults filled in."""
        default = GATES[self.precision]
        return Gates(
            agreement=default.agreement if self.agreement is None else self.agreement,
            drop=default.drop if self.drop is None else self.drop,
        )

    @property
    def runs_on(self) -> tuple[str, ...]:
        """Backends that a file of lower precision is meant for, and so measured on; the first by default."""
        return _RUNTIMES[self.runtime]

    @property
    def prover(self) -> str:
        """The backend that the file is proven on."""
        return "openvino" if self.precision in ("bf16", "fp8") else _PROVERS[self.runtime]
