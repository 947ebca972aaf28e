"""Times each layer of a call, by the runtime's own profile.

The model is loaded once more for it (`Backend.layer_runs`), after the timed runs and apart from them: profiling costs
time in every layer, so these figures divide a call and do not add up to its latency exactly.

    onnxruntime               kernel times of its profile file, CPU only: on CUDA they would be those of the launches
    openvino                  InferRequest.get_profiling_info
    tensorrt, tensorrt-rtx    IProfiler, without CUDA graph
    pytorch                   torch.profiler around each operator of the exported program

The others give none: what torch.compile makes is no longer the program's operators, and a captured graph is one launch.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from rkd_deploy.backends import RunOn
from rkd_deploy.backends.files import model_name, model_path, read_card
from rkd_deploy.backends.protocol import LayerRun
from rkd_deploy.bench.loading import Case, load_model, random_input
from rkd_deploy.bench.timing import Progress

_WARMUP, _RUNS = 5, 30  # the first runs allocate, and choose kernels


@dataclass(frozen=True)
class LayerMedian:
    """One operator that runs after the runtime's fusions, and its median time."""

    name: str
    op: str
    """Type of the operator, as the runtime calls it."""
    ms: float
    """Median over the runs of the time in the operator."""
    precision: str | None = None
    """Type that the operator works on, which need not be the file's: most CPUs run float16 files in float32."""


@dataclass(frozen=True, kw_only=True)
class LayerTimes(Case):
    """Times of the layers of one model at one batch size."""

    runs: int
    layers: tuple[LayerMedian, ...]
    """The layers in the order they run."""

    def to_record(self) -> dict[str, Any]:
        """The times for JSON."""
        return asdict(self)


def layer_times(
    models: Sequence[str | os.PathLike[str]],
    run_on: RunOn,
    *,
    batch: int = 1,
    batches: Sequence[int] | None = None,
    shape: Sequence[int] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[LayerTimes]:
    """Time every layer of each model, on seeded random inputs; models whose backend has no profile are left out.

    Args:
        models: As for `bench`.
        run_on: Where; a single stream is profiled, whatever it says.
        batch: Images in one call.
        batches: Batch sizes of the bench, so that the engine is the one that was measured; None: the usual ones.
        shape: Shape of one input, for models that leave it open and have no card.
        seed: Seed of the inputs.
        progress: Called with the model that is profiled, and the share of them that is done.

    Raises:
        UsageError: A model does not take such a batch.
        ModelFileError: A model or card is missing or corrupt.
        BackendError: The backend cannot run here.
    """
    alone = replace(run_on, streams=1)
    profiles = []
    for number, path in enumerate(models):
        with load_model(path, alone, batches, progress) as loaded:
            card, file = read_card(path, loaded.info.metadata), model_path(path)
            name = card.name if card is not None else model_name(path)
            if progress is not None:
                progress(f"layers of {name} on {alone}", number / len(models))
            x = random_input(loaded, card, batch, seed, shape)
            # The first runs allocate memory and choose kernels inside of layers, which would be taken for these layers'
            # time.
            runs = loaded.layer_runs(x, _WARMUP + _RUNS)[_WARMUP:]
        if runs:
            profiles.append(
                LayerTimes(
                    model=name,
                    file_bytes=file.stat().st_size,
                    backend=loaded.name,
                    device=loaded.device,
                    threads=run_on.threads,
                    batch=batch,
                    runs=len(runs),
                    layers=_medians(runs),
                )
            )
    return profiles


def _medians(runs: Sequence[LayerRun]) -> tuple[LayerMedian, ...]:
    times: dict[tuple[str, str, str | None], list[float]] = {}
    for run in runs:
        # Names need not be unique: layers of one name add up to one row, in every run alike.
        totals: dict[tuple[str, str, str | None], float] = {}
        for layer in run:
            key = (layer.name, layer.op, layer.precision)
            totals[key] = totals.get(key, 0.0) + layer.ms
        for key, ms in totals.items():
            times.setdefault(key, []).append(ms)
    return tuple(
        LayerMedian(name, op, statistics.median(values), precision) for (name, op, precision), values in times.items()
    )
