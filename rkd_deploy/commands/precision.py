"""Lower precision by the command line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rkd_deploy.export.precision import PrecisionOptions

PrecisionName = Annotated[str, typer.Option("--precision", help="fp32, fp16, bf16, int8 or fp8.")]
TargetName = Annotated[
    str | None, typer.Option("--target", help="Of a lower precision: cpu (default), tensorrt or openvino.")
]
CalibrationFolder = Annotated[
    Path | None, typer.Option("--calibration", help="Folder of images to calibrate on. Default: training images.")
]
CalibrationCount = Annotated[
    int | None, typer.Option("--calibration-count", help="How many of them. Default: 256, or all there are.")
]
Seed = Annotated[int, typer.Option("--seed", help="Draws images to calibrate and to judge on.")]
Keep = Annotated[
    str, typer.Option("--keep", help="Layers to leave in float32: NAME,NAME or auto, which finds those that hurt.")
]
MinAgreement = Annotated[
    float | None, typer.Option("--min-agreement", help="Least % of held-out images that keep their class.")
]
MaxDrop = Annotated[float | None, typer.Option("--max-drop", help="Most points of accuracy that may be lost on them.")]


def read_precision(
    precision: str,
    target: str | None,
    calibration: Path | None,
    count: int | None,
    seed: int,
    keep: str,
    min_agreement: float | None,
    max_drop: float | None,
) -> PrecisionOptions:
    """What is asked for, in the export's own words; see the options above.

    Raises:
        UsageError: A combination that cannot be, or an option that has no effect.
    """
    from rkd_deploy.export.precision import PrecisionOptions

    return PrecisionOptions(
        precision=precision,
        target=target,
        calibration=calibration,
        count=count,
        seed=seed,
        keep=tuple(name.strip() for name in keep.split(",") if name.strip()),
        agreement=min_agreement,
        drop=max_drop,
    )
