"""What is found out about models around a bench: how fast they could be before it, where their time goes after it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rkd_deploy.serve.bench import roofline
from rkd_deploy.serve.bench.layers import LayerTimes, layer_times
from rkd_deploy.serve.bench.loading import USUAL_BATCHES, Setting
from rkd_deploy.serve.bench.report import Result
from rkd_deploy.serve.bench.roofline import Roofline
from rkd_deploy.serve.bench.timing import Progress

if TYPE_CHECKING:
    from rich.console import Console


class Study:
    """Of some models under all settings of one bench; neither step touches the timed runs."""

    def __init__(
        self,
        models: Sequence[str | os.PathLike[str]],
        settings: Sequence[Setting],
        batches: Sequence[int] | None = None,
        *,
        shape: Sequence[int] | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        """Take what is measured.

        Args:
            models: As for `bench`.
            settings: From `plan`. Those that differ in what changes neither bound nor layers are studied once.
            batches: As for `bench`.
            shape: As for `bench`.
            names: To call the models by, where their own are not those of the results.
        """
        self._models, self._names, self._shape = list(models), names, shape
        self._asked = None if batches is None else list(batches)
        self._batches = self._asked or list(USUAL_BATCHES)
        self._settings = list(dict.fromkeys(replace(one, streams=1, cuda_graph=True) for one in settings))
        self.roofline: Roofline | None = None
        self.layers: list[LayerTimes] | None = None

    def predict(self, progress: Progress | None = None) -> None:
        """Before the measurement, under each setting: see `roofline.predict`, also for the errors."""
        found = [
            roofline.predict(
                self._models,
                setting,
                batches=self._batches,
                shape=self._shape,
                progress=self._counted(progress, number),
            )
            for number, setting in enumerate(self._settings)
        ]
        predictions = [one for each in found for one in each.predictions]
        if self._names is not None:
            names = list(self._names) * (len(predictions) // len(self._names))
            predictions = [replace(one, model=name) for one, name in zip(predictions, names, strict=True)]
        self.roofline = Roofline(tuple(one for each in found for one in each.ceilings), tuple(predictions))

    def profile(self, progress: Progress | None = None, *, batch: int | None = None) -> None:
        """After it, under each setting, at the smallest batch unless one is given: see `layers.layer_times`."""
        self.layers = []
        for number, setting in enumerate(self._settings):
            found = layer_times(
                self._models,
                setting,
                batch=batch or min(self._batches),
                batches=self._asked,
                shape=self._shape,
                progress=self._counted(progress, number),
            )
            if self._names is not None and found:
                found = [replace(one, model=name) for one, name in zip(found, self._names, strict=True)]
            self.layers += found

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

    def _counted(self, progress: Progress | None, number: int) -> Progress | None:
        """Shares of one setting as shares of all of them."""
        return None if progress is None else lambda name, share: progress(name, (number + share) / len(self._settings))
