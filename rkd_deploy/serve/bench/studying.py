"""What is found out about models around a bench: how fast they could be before it, where their time goes after it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rkd_deploy.serve.bench import roofline
from rkd_deploy.serve.bench.layers import LayerTimes, layer_times
from rkd_deploy.serve.bench.report import Result
from rkd_deploy.serve.bench.roofline import Roofline
from rkd_deploy.serve.bench.timing import Progress

if TYPE_CHECKING:
    from rich.console import Console


class Study:
    """Of some models under the conditions of one bench; neither step touches the timed runs."""

    def __init__(
        self,
        models: Sequence[str | os.PathLike[str]],
        batches: Sequence[int],
        *,
        backend: str,
        device: str | None,
        threads: int | None,
        names: Sequence[str] | None = None,
    ) -> None:
        """Take the arguments of the bench.

        Args:
            models: Bundle folders or ONNX files.
            batches: Numbers of images in one call.
            backend: As for `load_backend`, and so `device` and `threads`.
            device: "cpu", "cuda" or "cuda:N"; None: the backend's own.
            threads: Threads inside one operator on a CPU; None leaves it to the runtime.
            names: To call the models by, where their own are not those of the results.
        """
        self._models, self._batches, self._names = list(models), list(batches), names
        self._where: dict[str, Any] = {"backend": backend, "device": device, "threads": threads}
        self.roofline: Roofline | None = None
        self.layers: list[LayerTimes] | None = None

    def predict(self, progress: Progress | None = None) -> None:
        """Before the measurement: see `roofline.predict`, also for the errors."""
        found = roofline.predict(self._models, batches=self._batches, progress=progress, **self._where)
        if self._names is not None:
            names = list(self._names) * len(self._batches)
            made = zip(found.predictions, names, strict=True)
            found = Roofline(found.ceilings, tuple(replace(one, model=name) for one, name in made))
        self.roofline = found

    def profile(self, progress: Progress | None = None, *, batch: int | None = None) -> None:
        """After it, at the smallest batch unless one is given: see `layers.layer_times`, also for the errors."""
        found = layer_times(self._models, batch=batch or min(self._batches), progress=progress, **self._where)
        if self._names is not None and found:
            found = [replace(one, model=name) for one, name in zip(found, self._names, strict=True)]
        self.layers = found

    def print_roofline(self, results: Sequence[Result], console: Console) -> None:
        """The bounds, with the share of them that was reached where there are results; nothing where none were told."""
        if self.roofline is not None:
            roofline.print_roofline(self.roofline.predictions, results, console)

    def to_record(self) -> dict[str, Any]:
        """What was found, for the record of the bench."""
        found: dict[str, Any] = {}
        if self.roofline is not None:
            found["roofline"] = self.roofline.to_record()
        if self.layers is not None:
            found["layers"] = [times.to_record() for times in self.layers]
        return found
