"""Measures what HTTP costs: the server beside bare ONNX Runtime with the same pre-processing in one process.

    uv run python benchmarks/serving.py

A ResNet-20 with random weights, its golden photo, one thread inside an operator. Bare: that many threads decode and
run. Served: that many clients, a connection each, ask `/v1/classify` and the protocol's `infer` (the photo as BYTES).
The three take turns in every round. The clients share the machine with the server: what they take is in the figures.
"""

from __future__ import annotations

import http.client
import io
import json
import os
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from models import resnet20
from record import Claim, save

CLIENTS = (1, 8, 32)
ROUNDS = 3
SECONDS = float(os.environ.get("RKD_BENCH_SECONDS", "2"))

Call = Callable[[], None]


def busy(makers: list[Callable[[], Call]]) -> tuple[float, list[float]]:
    """Calls per second and milliseconds of each call, of threads that call on and on; each makes its own call first."""
    end = time.perf_counter() + SECONDS

    def work(make: Callable[[], Call]) -> list[float]:
        call, times = make(), []
        while (start := time.perf_counter()) < end:
            call()
            times.append(1000 * (time.perf_counter() - start))
        return times

    with ThreadPoolExecutor(len(makers)) as pool:
        milliseconds = [each for times in pool.map(work, makers) for each in times]
    return len(milliseconds) / SECONDS, milliseconds


def bare(bundle: Path, photo: bytes) -> Callable[[], Call]:
    """ONNX Runtime's own session behind `rkd_deploy.images`."""
    import onnxruntime

    from rkd_deploy.backends import describe_model
    from rkd_deploy.images import decoded, fitted

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(bundle / "model.onnx", options)
    rule = describe_model(bundle).preprocess

    def call() -> None:
        session.run(["logits"], {"input": fitted(decoded(io.BytesIO(photo), "photo"), rule)[np.newaxis]})

    return lambda: call


def asking(address: str, path: str, body: bytes, headers: dict[str, str]) -> Callable[[], Call]:
    """A client with a connection of its own."""

    def make() -> Call:
        connection = http.client.HTTPConnection(address, timeout=60)

        def call() -> None:
            connection.request("POST", path, body, headers)
            answer = connection.getresponse()
            content = answer.read()
            if answer.status != 200:
                raise RuntimeError(content.decode())

        return call

    return make


def infer_request(photo: bytes) -> tuple[bytes, dict[str, str]]:
    """The photo as BYTES by the binary tensor extension."""
    element = struct.pack("<I", len(photo)) + photo
    tensor = {"name": "input", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": len(element)}}
    head = json.dumps({"inputs": [tensor]}).encode()
    return head + element, {"Inference-Header-Content-Length": str(len(head))}


def main() -> None:
    """Start a server, let the three take turns, and save the record."""
    with tempfile.TemporaryDirectory() as folder:
        bundle = resnet20(Path(folder) / "bundle")
        photo = (bundle / "golden/photo.jpg").read_bytes()
        command = [
            sys.executable,
            "-m",
            "rkd_deploy.cli",
            "serve",
            str(bundle),
            "--port",
            "0",
            "--threads",
            "1",
            "--json",
        ]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout
            address = json.loads(server.stdout.readline())["address"].removeprefix("http://")
            try:
                save("serving", measure(address, bundle, photo))
            finally:
                server.terminate()


def measure(address: str, bundle: Path, photo: bytes) -> list[Claim]:
    """Time over bare of both ways to ask, and the 99th percentile, for each number of clients."""
    ways = {
        "bare": bare(bundle, photo),
        "classify": asking(address, "/v1/classify", photo, {}),
        "infer": asking(address, "/v2/models/resnet20/infer", *infer_request(photo)),
    }
    claims = []
    for clients in CLIENTS:
        rates: dict[str, list[float]] = {name: [] for name in ways}
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(ROUNDS):
            for name, make in ways.items():
                rate, milliseconds = busy([make] * clients)
                rates[name].append(rate)
                times[name] += milliseconds
        for name in ("classify", "infer"):
            samples: dict[str, Any] = {"bare": rates["bare"], name: rates[name]}
            ratio = median(rates["bare"]) / median(rates[name])
            # At least 0.8 of the bare throughput.
            claims.append(Claim(f"{name}, {clients} clients: bare throughput over ours", ratio, "ratio", 1.25, samples))
            p99 = float(np.percentile(times[name], 99))
            claims.append(Claim(f"{name}, {clients} clients: p99 of a request", p99, "ms", None))
    return claims


if __name__ == "__main__":
    main()
