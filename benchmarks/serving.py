"""Measures what HTTP costs: our server and other engines beside bare ONNX Runtime with the same pre-processing.

    uv run python benchmarks/serving.py              # 5 minutes; the first time it installs Ray, BentoML and Triton

Clients and servers do not share cores: the last core sends requests, the others serve, and bare threads decode and run
there too. So a ratio is what HTTP, JSON and hand-over cost of the server's cores. On a busy machine wall time is the
neighbours': the CPU time of a request stands beside it. A ResNet-20 for 32 x 32 with random weights is about as small
as models come, and the hardest case; a ResNet-18 for 224 x 224 is a usual one. Both get the golden photo (18 kB, 360
pixels wide). "httptools": by that package uvicorn reads HTTP where it is installed. Ways
take turns in every round; one process or replica each, one thread inside an operator. Ray Serve and
BentoML run our application; Triton runs the ensemble of `export --format triton`, whose model is in its python backend
too, because that is the only one in a wheel.
"""

from __future__ import annotations

import io
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
from models import resnet18, resnet20
from record import Claim, save
from serving_load import HttpRequest, Load, send_load

sys.path.append(str(Path(__file__).parents[1] / "tests/support"))
import engines
import tritonserver
from real_servers import PATIENCE_S, served

CLIENTS = (1, 8, 32)
ROUNDS = int(os.environ.get("RKD_BENCH_ROUNDS", "5"))
SECONDS = float(os.environ.get("RKD_BENCH_SECONDS", "1.2"))
LIMIT = 1 / 0.8
"""Of the bare throughput over ours."""

CORES = sorted(os.sched_getaffinity(0))
SERVING, SENDING = set(CORES[:-1] or CORES), {CORES[-1]}

Way = Callable[[int], Load]
"""Asks with so many clients for `SECONDS`."""


@contextmanager
def on_cores(cores: set[int]) -> Iterator[None]:
    """Threads and processes that are started here have these cores."""
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, CORES)


def bare(bundle: Path, photo: bytes) -> Way:
    """ONNX Runtime's own session behind `rkd_deploy.images`, called by that many threads."""
    import onnxruntime

    from rkd_deploy.backends import describe_model
    from rkd_deploy.images import decoded, fitted

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(bundle / "model.onnx", options)
    rule = describe_model(bundle).preprocess

    def work(end: float, milliseconds: list[float]) -> None:
        while (start := time.perf_counter()) < end:
            session.run(["logits"], {"input": fitted(decoded(io.BytesIO(photo), "photo"), rule)[np.newaxis]})
            milliseconds.append(1000 * (time.perf_counter() - start))

    def way(clients: int) -> Load:
        milliseconds: list[float] = []
        with on_cores(SERVING):
            begin, cpu = time.perf_counter(), time.process_time()
            threads = [threading.Thread(target=work, args=(begin + SECONDS, milliseconds)) for _ in range(clients)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        return Load(time.perf_counter() - begin, milliseconds, [], time.process_time() - cpu)

    return way


def asking(place: tuple[str, int], request: HttpRequest, pid: int) -> Way:
    """That many clients of a server, each with a connection of its own."""

    def way(clients: int) -> Load:
        before = cpu_seconds(pid)
        with on_cores(SENDING):
            load = send_load(place, [request], clients, SECONDS)
        load = replace(load, cpu_seconds=cpu_seconds(pid) - before)
        if load.wrong:
            raise RuntimeError(f"{len(load.wrong)} wrong answers, the first: {load.wrong[0][:500]!r}")
        return load

    return way


def family(pid: int) -> list[psutil.Process]:
    """A server's processes."""
    return [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]


def cpu_seconds(pid: int) -> float:
    """What a server's processes have taken so far."""
    return sum(sum(process.cpu_times()[:2]) for process in family(pid))


def our_requests(bundle: Path, name: str) -> dict[str, HttpRequest]:
    """The golden photo for classify and for infer."""
    photo = (bundle / "golden/photo.jpg").read_bytes()
    return {
        "classify": HttpRequest.post("/v1/classify", photo, b'"predictions"'),
        "infer": HttpRequest.infer(name, [1], photo, b'"logits"'),
    }


def main() -> None:
    """Start all servers, let them take turns, and save the record."""
    from rkd_deploy.serve.triton.repository import export_triton
    from rkd_deploy.serve.triton.settings import Serving

    with tempfile.TemporaryDirectory() as temporary, ExitStack() as running:
        folder = Path(temporary)
        bundles = {"resnet20": resnet20(folder / "resnet20"), "resnet18": resnet18(folder / "resnet18")}
        ways: dict[str, dict[str, Way]] = {}
        sizes: list[Claim] = []
        with on_cores(SERVING):
            for name, bundle in bundles.items():
                (folder / f"{name}-log").mkdir()
                server = running.enter_context(served(bundle, folder / f"{name}-log"))
                requests = our_requests(bundle, name)
                ways[name] = {"bare": bare(bundle, (bundle / "golden/photo.jpg").read_bytes())}
                ways[name] |= {
                    way: asking(server.place, request, server.process.pid) for way, request in requests.items()
                }
                sizes += memory(f"{name}: rkd-deploy serve", server.process.pid)
            (folder / "httptools-log").mkdir()
            fast = running.enter_context(
                served(bundles["resnet20"], folder / "httptools-log", packages=engines.httptools_folder())
            )
            for way, request in our_requests(bundles["resnet20"], "resnet20").items():
                ways["resnet20"][f"{way}, httptools"] = asking(fast.place, request, fast.process.pid)
            sizes += memory("resnet20: rkd-deploy serve, httptools", fast.process.pid)
            bundle, requests = bundles["resnet20"], our_requests(bundles["resnet20"], "resnet20")
            for engine in engines.NAMES:
                server = running.enter_context(
                    engines.engine(engine, engines.environment(), bundle, folder / f"{engine}.log")
                )
                ways["resnet20"][f"{engine}, classify"] = asking(server.place, requests["classify"], server.process.pid)
                sizes += memory(f"resnet20: {engine}", server.process.pid)
            export_triton(bundle, folder / "repository", Serving(backend="python", threads=1))
            address = running.enter_context(
                tritonserver.environment().server(folder / "repository", folder / "triton.log")
            )
            ensemble = HttpRequest.infer(
                "resnet20-images", [1, 1], (bundle / "golden/photo.jpg").read_bytes(), b'"logits"'
            )
            host, _, port = address.http.partition(":")
            ways["resnet20"]["triton, infer"] = wait_for((host, int(port)), ensemble, address.process.pid)
            sizes += memory("resnet20: triton", address.process.pid)
        claims = [claim for name in bundles for claim in measure(name, ways[name])]
        save("serving", claims + sizes)


def wait_for(place: tuple[str, int], request: HttpRequest, pid: int) -> Way:
    """A way to ask a server that is still loading its model."""
    end = time.monotonic() + PATIENCE_S
    while True:
        try:
            if not send_load(place, [request], 1, 0.01).wrong:
                return asking(place, request, pid)
        except OSError:
            pass
        if time.monotonic() > end:
            raise TimeoutError(f"{place} does not answer after {PATIENCE_S} s")
        time.sleep(0.5)


def memory(what: str, pid: int) -> list[Claim]:
    """Megabytes of a server's processes that nobody else holds, and how many processes there are."""
    processes = family(pid)
    own = sum(process.memory_full_info().uss for process in processes) / 1e6
    return [
        Claim(f"{what}: memory of its own", own, "MB", None),
        Claim(f"{what}: processes", len(processes), "processes", None),
    ]


def measure(network: str, ways: dict[str, Way]) -> list[Claim]:
    """Bare throughput over that of each way to ask, and the 99th percentile, for each number of clients."""
    claims = []
    for name, way in list(ways.items()):
        try:
            way(8)
        except OSError as error:  # Triton's python backend crashes now and then when its first requests come together
            print(f"{network}, {name} is left out: {error}", file=sys.stderr)
            del ways[name]
    for clients in CLIENTS:
        loads: dict[str, list[Load]] = {name: [] for name in ways}
        for _ in range(ROUNDS):
            for name, way in ways.items():
                loads[name].append(way(clients))
        for name, ours in loads.items():
            what = f"{network}, {name}, {clients} clients"
            rates = [load.rate for load in ours]
            if name != "bare":
                claims.append(
                    over_bare(what, loads["bare"], ours, LIMIT if name.startswith(("classify", "infer")) else None)
                )
            p99 = float(np.percentile([each for load in ours for each in load.milliseconds], 99))
            claims.append(Claim(f"{what}: throughput", median(rates), "per s", None, {"rates": rates}))
            cpu = median(load.cpu_milliseconds for load in ours)
            claims.append(Claim(f"{what}: CPU of a request", cpu, "ms", None))
            claims.append(Claim(f"{what}: p99 of a request", p99, "ms", None))
    return claims


def over_bare(what: str, of_bare: Sequence[Load], of_way: Sequence[Load], limit: float | None) -> Claim:
    """The median over rounds of the bare throughput over that of the way that followed it."""
    samples: dict[str, Any] = {"bare": [load.rate for load in of_bare], "way": [load.rate for load in of_way]}
    ratios = [first / second for first, second in zip(samples["bare"], samples["way"], strict=True)]
    return Claim(f"{what}: bare throughput over it", median(ratios), "ratio", limit, samples)


if __name__ == "__main__":
    main()
