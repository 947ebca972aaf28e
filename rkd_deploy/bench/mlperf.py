"""Asks a loaded model as MLPerf Inference does, by its own LoadGen, and reads LoadGen's log.

LoadGen decides when queries come and takes the time itself; here is only the system under test.

    SingleStream  one image after the other                        90th percentile of latency
    MultiStream   8 images a query, one query after the other      99th percentile of a query's latency
    Server        single images at random times (Poisson), those   were 99 % within the bound, at that many a second?
                  that wait answered together
    Offline       all images at once                               images per second

Reference: MLPerf Inference Benchmark, Reddi et al., ISCA 2020; loadgen/test_settings.h of mlcommons/inference.
"""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from rkd_deploy.backends import Array, Backend, infer_many
from rkd_deploy.bench.loading import random_input
from rkd_deploy.card import ModelCard
from rkd_deploy.errors import BackendError, UsageError, require, unknown_name
from rkd_deploy.fields import check_number
from rkd_deploy.signals import handling
from rkd_deploy.storage import new_folder

SCENARIOS = ("SingleStream", "MultiStream", "Server", "Offline")
LIBRARY = 16
"""Number of different inputs in LoadGen's query sample library."""
MULTI_STREAM_IMAGES = 8
SERVER_LATENCY_MS = 15.0
"""MLPerf's bound on the latency of its image classifier in scenario Server, in ms."""
_MARGIN = 2
"""Factor on the estimated number of queries: LoadGen makes them beforehand, and they must not run out."""
_MOST = 10**9
"""More than any rate, time or number of queries of a real test."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """Settings of LoadGen: how long it asks, how often, and for what.

    Attributes:
        min_seconds: LoadGen's min_duration; officially 600.
        min_queries: LoadGen's min_query_count.
        target_qps: Server: queries per second; None: half of what one caller gets.
        target_latency_ms: Server: the bound on the 99th percentile of latency.
        max_batch: Offline: images run at once; Server: most waiting queries that are answered together.
    """

    min_seconds: float = 10.0
    min_queries: int = 100
    target_qps: float | None = None
    target_latency_ms: float = SERVER_LATENCY_MS
    max_batch: int = 32

    def __post_init__(self) -> None:
        """Refuse what LoadGen would take for something else.

        Raises:
            UsageError: A number that is not finite and above 0, or a count that is no whole number.
        """
        for name in ("min_seconds", "target_qps", "target_latency_ms"):
            value = getattr(self, name)
            if value is None:
                continue
            check_number(name, value, 0, _MOST)
            if value == 0:
                raise UsageError(f"{name} is 0; LoadGen needs more than that.")
        for name in ("min_queries", "max_batch"):
            check_number(name, getattr(self, name), 1, _MOST, whole=True)


def check_scenarios(names: Sequence[str]) -> None:
    """Refuse a scenario that LoadGen does not have, and any where LoadGen is not installed.

    Raises:
        UsageError: Unknown scenario.
        MissingDependencyError: mlcommons-loadgen is not installed.
    """
    for name in names:
        if name not in SCENARIOS:
            raise UsageError(unknown_name("scenario", name, SCENARIOS))
    require("mlperf_loadgen", "loadgen")


def library(backend: Backend, card: ModelCard | None, seed: int, shape: Sequence[int] | None = None) -> list[Array]:
    """Seeded inputs that queries are drawn from, `LIBRARY` of them, each [1, ...].

    Raises:
        UsageError: As `random_input` raises it.
    """
    return [random_input(backend, card, 1, seed + number, shape) for number in range(LIBRARY)]


def run_scenario(backend: Backend, inputs: Sequence[Array], scenario: str, logs: Path, load: Load) -> dict[str, Any]:
    """Run one scenario on a model, and read LoadGen's log of it.

    Args:
        backend: A loaded model.
        inputs: From `library`.
        scenario: One of `SCENARIOS`.
        logs: Folder for LoadGen's logs; what lies there is replaced.
        load: How hard and how long.

    Returns:
        The fields of `loadgen.ScenarioResult` that LoadGen and its settings give.

    Raises:
        BackendError: A run of the model failed; the logs are left out.
        KeyboardInterrupt: Ctrl-C or SIGTERM; LoadGen's run is cut short, and its logs are left out.
        StorageError: LoadGen's logs could not be written.
    """
    lg = require("mlperf_loadgen", "loadgen")
    test, target_qps = _test_settings(lg, backend, inputs, scenario, load)
    system = _System(
        lg,
        backend,
        inputs,
        min(load.max_batch, backend.info.max_batch or load.max_batch),
        in_thread=scenario == "Server",
    )
    with new_folder(logs, replace=True) as written:
        output = lg.LogOutputSettings()
        output.outdir, output.copy_summary_to_stdout = str(written), False
        log = lg.LogSettings()
        log.log_output, log.enable_trace = output, False
        system.run(test, log)
        facts = read_loadgen_log(written / "mlperf_log_detail.txt")
    server = scenario == "Server"
    return {
        "valid": facts["result_validity"] == "VALID",
        "reason": (facts.get("result_invalid_reason") or "").strip() or None,
        "queries": int(facts["result_query_count"]),
        "samples_per_s": _samples_per_s(facts),
        **{f"p{q}_ms": facts[f"result_{q}.00_percentile_latency_ns"] / 1e6 for q in (50, 90, 99)},
        "target_qps": target_qps if server else None,
        "target_latency_ms": load.target_latency_ms if server else None,
    }


def _samples_per_s(facts: dict[str, Any]) -> float:
    for key in ("result_samples_per_second", "result_completed_samples_per_sec", "result_qps_with_loadgen_overhead"):
        if key in facts:
            return float(facts[key])
    # MultiStream tells no rate: images of a query over its mean latency.
    return MULTI_STREAM_IMAGES * 1e9 / float(facts["result_mean_latency_ns"])


def read_loadgen_log(file: Path) -> dict[str, Any]:
    """Facts of LoadGen's mlperf_log_detail.txt, which has a line of JSON behind a mark for each.

    Raises:
        BackendError: The log holds no result: LoadGen did not come to its end.
    """
    mark = ":::MLLOG "
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    entries = [json.loads(line.removeprefix(mark)) for line in lines if line.startswith(mark)]
    facts: dict[str, Any] = {entry["key"]: entry["value"] for entry in entries}
    if "result_validity" not in facts:
        raise BackendError(f"LoadGen wrote no result into {file.name}. Run it again, with a longer --seconds.")
    return facts


def _test_settings(
    lg: Any, backend: Backend, inputs: Sequence[Array], scenario: str, load: Load
) -> tuple[Any, float | None]:
    images = {"MultiStream": MULTI_STREAM_IMAGES, "Offline": load.max_batch}.get(scenario, 1)
    seconds = _seconds(backend, np.resize(np.concatenate(list(inputs)), (images, *inputs[0].shape[1:])), load.max_batch)
    test = lg.TestSettings()
    test.scenario, test.mode = getattr(lg.TestScenario, scenario), lg.TestMode.PerformanceOnly
    test.min_duration_ms, test.min_query_count = round(load.min_seconds * 1000), load.min_queries
    test.performance_sample_count_override = len(inputs)
    test.multi_stream_samples_per_query = MULTI_STREAM_IMAGES
    # Faster than estimated on purpose: a machine that speeds up meanwhile must not run out of queries.
    test.single_stream_expected_latency_ns = max(1, round(seconds * 1e9 / _MARGIN))
    test.multi_stream_expected_latency_ns = max(1, round(seconds * 1e9 / _MARGIN))
    target_qps = load.target_qps or 0.5 / seconds  # at its full rate a queue of random arrivals grows without end
    test.offline_expected_qps = _MARGIN * images / seconds
    test.server_target_qps = target_qps
    test.server_target_latency_ns = round(load.target_latency_ms * 1e6)
    test.qsl_rng_seed = test.sample_index_rng_seed = test.schedule_rng_seed = 1  # any, but the same each time
    return test, target_qps


def _seconds(backend: Backend, x: Array, max_batch: int) -> float:
    """Estimate of the seconds that a query takes, which LoadGen needs beforehand."""
    infer_many(backend, x, max_batch)
    runs, started = 0, time.perf_counter()
    while (past := time.perf_counter() - started) < 0.2 or runs < 3:
        infer_many(backend, x, max_batch)
        runs += 1
    return past / runs


class _System:
    """The system under test: answers LoadGen's queries with runs of the model.

    LoadGen calls from C++, where an exception would end the process: the first error is remembered, later queries are
    answered with nothing, and `run` raises it.
    """

    def __init__(self, lg: Any, backend: Backend, inputs: Sequence[Array], max_batch: int, *, in_thread: bool) -> None:
        self._lg, self._backend, self._max_batch = lg, backend, max_batch
        self._response, self._complete = lg.QuerySampleResponse, lg.QuerySamplesComplete
        self._inputs = inputs
        self._all = np.concatenate(list(inputs))
        self._failed: BaseException | None = None
        # Another batch is another CUDA graph, whose capture takes longer than the queries that would be put together.
        self._at_once = 1 if backend.info.cuda_graph else 1 << (max_batch.bit_length() - 1)
        # Server goes on asking while a query is being answered.
        self._waiting: queue.SimpleQueue[Any] | None = queue.SimpleQueue() if in_thread else None

    def run(self, test: Any, log: Any) -> None:
        lg, number = self._lg, len(self._inputs)
        for power in range(self._at_once.bit_length() if self._waiting is not None else 0):
            infer_many(self._backend, np.resize(self._all, (1 << power, *self._all.shape[1:])), self._max_batch)
        thread = threading.Thread(target=self._serve) if self._waiting is not None else None
        if thread is not None:
            thread.start()
        system = lg.ConstructSUT(self._answer if self._waiting is None else self._waiting.put, _nothing)
        samples = lg.ConstructQSL(number, number, _nothing_with, _nothing_with)
        try:
            # A stop is an error like any other here: raised between two lines of ours it would reach C++.
            with handling(self._stop):
                lg.StartTestWithLogSettings(system, samples, test, log)
        finally:
            if thread is not None and self._waiting is not None:
                self._waiting.put(None)
                thread.join()
            lg.DestroyQSL(samples)
            lg.DestroySUT(system)
        if self._failed is not None:
            raise self._failed

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._failed = KeyboardInterrupt()

    def _serve(self) -> None:
        """Answer waiting queries until None comes, a power of two at once, so that few batch sizes come up."""
        assert self._waiting is not None
        waiting: list[Any] = []
        goes_on = True
        while goes_on or waiting:
            while goes_on and (not waiting or not self._waiting.empty()):
                samples = self._waiting.get()
                goes_on = samples is not None
                waiting += samples or ()
            if waiting:
                count = min(self._at_once, 1 << (len(waiting).bit_length() - 1))
                self._answer(waiting[:count])
                del waiting[:count]

    def _answer(self, samples: Sequence[Any]) -> None:
        if self._failed is not None:
            if len(samples) <= MULTI_STREAM_IMAGES:
                time.sleep(0.01)  # LoadGen cannot be stopped: it asks on until its time is over
            self._complete([self._response(sample.id, 0, 0) for sample in samples])
            return
        for start in range(0, len(samples), self._max_batch):  # of Offline there may be more than the memory holds
            chunk = samples[start : start + self._max_batch]
            # Where only time is asked for LoadGen reads no answers. Finding their addresses here, with the caches full
            # of the model, took 25 microseconds, 3 % of a small model's time.
            answers = [self._response(sample.id, 0, 0) for sample in chunk]
            try:
                self._infer([sample.index for sample in chunk])
            except BaseException as error:
                self._failed = error
            self._complete(answers)

    def _infer(self, indices: Sequence[int]) -> None:
        if len(indices) == 1:
            self._backend.infer(self._inputs[indices[0]])
        else:
            infer_many(self._backend, self._all[indices], self._max_batch)


def _nothing() -> None:
    """Do nothing when LoadGen flushes: no query is held back."""


def _nothing_with(indices: Sequence[int]) -> None:
    """Do nothing when LoadGen loads or unloads inputs: they are in memory throughout."""
