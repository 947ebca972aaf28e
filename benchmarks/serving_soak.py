"""Asks a server for ten minutes at 80 % of its capacity: no wrong answer, none lost, and its memory does not grow.

    uv run python benchmarks/serving_soak.py         # RKD_BENCH_SECONDS: 600

The capacity is what 32 clients get in 10 s, classify and infer in turn; then requests come at 80 % of that rate by 32
connections, whether answers are there or not. Every answer is held to the golden photo's: its label, its logits bit
for bit. Resident memory is read every 5 s; what the first minute ends with is held against the largest after it.
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
from pathlib import Path
from statistics import median

import numpy as np
from models import resnet20
from record import Claim, save
from serving import family
from serving_load import HttpRequest, Load, send_load

sys.path.append(str(Path(__file__).parents[1] / "tests/support"))
from real_servers import Running, served

SECONDS = float(os.environ.get("RKD_BENCH_SECONDS", "600"))
CLIENTS = 32
SHARE = 0.8
SETTLED_S = 60.0
EVERY_S = 5.0


def main() -> None:
    """Start a server, find its capacity, soak it, and save the record."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        bundle = resnet20(folder / "bundle")
        with served(bundle, folder) as server:
            requests = golden_requests(server, (bundle / "golden/photo.jpg").read_bytes())
            capacity = send_load(server.place, requests, CLIENTS, 10.0)
            memory: list[float] = []
            done = threading.Event()
            watcher = threading.Thread(target=watch, args=(server.process.pid, memory, done))
            watcher.start()
            load = send_load(server.place, requests, CLIENTS, SECONDS, SHARE * capacity.rate)
            done.set()
            watcher.join()
            save("serving_soak", claims(capacity, load, memory))
        assert server.process.wait() == 0


def golden_requests(server: Running, photo: bytes) -> list[HttpRequest]:
    """Classify and infer, each with what the first answer to it holds."""
    label = server.ask("/v1/classify", photo).json["predictions"][0]["label"]
    bare = HttpRequest.infer("resnet20", [1], photo, b"")
    head, _, body = bare.wire.partition(b"\r\n\r\n")
    headers = dict(line.split(": ", 1) for line in head.decode().splitlines()[1:])
    logits = server.ask("/v2/models/resnet20/infer", body, headers).body
    return [
        HttpRequest.post("/v1/classify", photo, b'"predictions": [{"label": "%s"' % label.encode()),
        HttpRequest(bare.wire, logits),
    ]


def watch(pid: int, memory: list[float], done: threading.Event) -> None:
    """Resident memory of the server's processes in MB, every few seconds."""
    while not done.wait(EVERY_S):
        memory.append(sum(process.memory_info().rss for process in family(pid)) / 1e6)


def claims(capacity: Load, load: Load, memory: list[float]) -> list[Claim]:
    """What is held to, and what is told."""
    settled = min(round(SETTLED_S / EVERY_S), len(memory) // 2)
    start = median(memory[max(0, settled - 3) : settled])
    growth = max(memory[settled:]) / start
    return [
        Claim("wrong answers", len(load.wrong), "answers", 0),
        Claim("requests answered", len(load.milliseconds), "requests", None),
        Claim("resident memory, largest after the first minute over its end", growth, "ratio", 1.05, {"MB": memory}),
        Claim("resident memory at the end", memory[-1], "MB", None),
        Claim("throughput over capacity", load.rate / capacity.rate, "ratio", None),
        Claim("capacity", capacity.rate, "per s", None),
        Claim("p50 of a request", float(np.percentile(load.milliseconds, 50)), "ms", None),
        Claim("p99 of a request", float(np.percentile(load.milliseconds, 99)), "ms", None),
        Claim("longest request", max(load.milliseconds), "ms", None),
    ]


if __name__ == "__main__":
    main()
