"""A bundle proven again, on every backend that is installed: anywhere, without the run that it came from."""

from __future__ import annotations

import os
from dataclasses import dataclass

from rkd_deploy.errors import BackendError
from rkd_deploy.serve.backends import available
from rkd_deploy.serve.bench.parity import Parity, verify


@dataclass(frozen=True)
class Verdict:
    """What one backend made of a bundle.

    Attributes:
        backend: Its name.
        parity: Its logits against the golden ones; None where it cannot run this bundle here.
        reason: Why it cannot; None where it can.
    """

    backend: str
    parity: Parity | None
    reason: str | None


def verify_everywhere(
    bundle_path: str | os.PathLike[str],
    *,
    device: str | None = None,
    threads: int | None = None,
    tolerance: float | None = None,
) -> list[Verdict]:
    """Run `verify` on every backend that works on this machine.

    Args:
        bundle_path: Bundle folder, or the ONNX file in it.
        device: As for `verify`, and so the next two.
        threads: Threads inside one operator on a CPU.
        tolerance: None takes the bundle's own.

    Raises:
        ModelFileError: The bundle is missing, corrupt or changed.
        BackendError: No backend here can run it.
    """
    verdicts = []
    for status in available():
        if not status.ok:
            continue
        try:
            parity = verify(bundle_path, status.name, device=device, threads=threads, tolerance=tolerance)
            verdicts.append(Verdict(status.name, parity, None))
        except BackendError as error:  # e.g. pytorch, of a bundle without model.pt2
            verdicts.append(Verdict(status.name, None, str(error)))
    if all(verdict.parity is None for verdict in verdicts):
        reasons = " ".join(f"{verdict.backend}: {verdict.reason}" for verdict in verdicts)
        where = "" if device is None else f" on {device}"
        raise BackendError(
            f"No backend here can run {os.fspath(bundle_path)}{where}. {reasons or 'None is installed.'} "
            "Install one (rkd-deploy backends lists them), or verify on another machine."
        )
    return verdicts
