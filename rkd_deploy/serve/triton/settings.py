"""Says how Triton is to serve a model: on what, how many at a time, which versions."""

from __future__ import annotations

import re
from dataclasses import dataclass

from rkd_deploy.errors import UsageError
from rkd_deploy.fields import check_fields, option

TRITON_BACKENDS = ("onnxruntime", "tensorrt", "python")
"""Triton's backends: onnxruntime and python read model.onnx; tensorrt reads a plan, for the TensorRT that built it."""

LARGEST_BATCH = 65_536
"""Triton runs the largest batch once before it answers, so that a slip of the hand would cost the server's memory."""

STORAGE_URI = "s3://BUCKET/PATH"
"""Placeholder where no upload place was named yet; upper case is no bucket's name, so KServe cannot take it for one."""

_STORAGES = ("gs", "s3", "pvc", "file", "https", "http", "hdfs", "webhdfs", "oci", "oci+native", "oci+fetch", "hf")
"""URI schemes that KServe fetches models from (pkg/controller/v1beta1/inferenceservice/utils)."""


@dataclass(frozen=True)
class Instances:
    """How many copies of a model run side by side.

    Attributes:
        kind: cpu or gpu.
        count: Copies; on every GPU that the server sees, or on the CPU.
    """

    kind: str
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Instances:
        """Read instances from ``cpu``, ``gpu``, or either with a number, as ``cpu:2``.

        Raises:
            UsageError: It is something else.
        """
        match = re.fullmatch(r"(cpu|gpu)(?::([1-9]\d*))?", text.strip())
        if match is None:
            raise UsageError(f"--instances {text!r} must be cpu or gpu, and how many of them, e.g. cpu:2 or gpu:1.")
        return cls(match[1], int(match[2] or 1))


def _batch_sizes(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(
            f"--preferred-batch {text!r} must be whole numbers, separated by commas, e.g. --preferred-batch 8,32."
        ) from error


def _versions(text: str) -> int | None:
    """How many of the newest versions answer; None: all."""
    if text == "all":
        return None
    if not re.fullmatch(r"\d{1,9}", text):
        raise UsageError(f"--serve-versions {text!r} must be a number or all.")
    return int(text)


@dataclass(frozen=True, kw_only=True)
class Serving:
    """Settings of a model in Triton; what cannot be together is refused here.

    Attributes:
        backend: Triton's: onnxruntime, tensorrt or python. Python needs onnxruntime and numpy in the server's Python.
        name: Name of the model in the repository. Default: made of the card's name, else of the file's.
        max_batch: Most images of one run. Default: 32; of a plan what it was built for.
        preferred: Batch sizes that the scheduler waits for. Default: 8 and the largest; of a plan those that its
            kernels were chosen for.
        queue_delay_us: How long, in microseconds, a request waits for others to make such a batch.
        instances: Default: one on the CPU; of tensorrt one on each GPU.
        threads: Threads inside one operator on a CPU. Default: the runtime's choice, all cores for each instance.
        versions: How many of the newest versions answer at a time; None: all.
        storage_uri: Where KServe fetches the repository from.
        config: What to do where a configuration stands already and differs: keep it or replace it. Default: refuse.

    Raises:
        UsageError: A value outside of its rule, or one that has no effect with the others.
    """

    backend: str = option(
        "--triton-backend", "onnxruntime, tensorrt (a plan) or python.", default="onnxruntime", choices=TRITON_BACKENDS
    )
    name: str | None = option("--model-name", "Of the model in the repository. Default: by its card.", default=None)
    max_batch: int | None = option(
        "--max-batch",
        "Most images of one run. Default: 32, or the plan's.",
        default=None,
        low=1,
        high=LARGEST_BATCH,
    )
    preferred: tuple[int, ...] | None = option(
        "--preferred-batch",
        "Batch sizes to wait for, e.g. 8,32 (the default).",
        default=None,
        reads=str,
        parse=_batch_sizes,
    )
    queue_delay_us: int = option(
        "--queue-delay", "Microseconds to wait for a batch.", default=2000, low=0, high=60_000_000
    )
    instances: Instances | None = option(
        "--instances",
        "cpu or gpu, and how many copies, e.g. cpu:2. Default: 1.",
        default=None,
        reads=str,
        parse=Instances.parse,
    )
    threads: int | None = option(
        "--threads", "CPU threads of an instance.", default=None, low=1, high=1024, shared=True
    )
    versions: int | None = option(
        "--serve-versions",
        "How many of the newest answer, or all. Default: 1.",
        default=1,
        reads=str,
        parse=_versions,
        low=1,
        high=1_000_000,
    )
    storage_uri: str = option(
        "--storage-uri",
        "Where KServe fetches the repository, e.g. s3://bucket/models.",
        default=STORAGE_URI,
    )
    config: str | None = option(
        "--config",
        "keep or replace a config.pbtxt that stands there and differs.",
        default=None,
        choices=("keep", "replace"),
    )

    def __post_init__(self) -> None:
        check_fields(self)
        if self.name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}", self.name):
            raise UsageError(
                f"--model-name {self.name!r} names a folder and a part of an address: it must be up to 100 letters, "
                "digits, dots, dashes or underscores, beginning with a letter or digit."
            )
        self._check_devices()
        scheme = self.storage_uri.partition("://")[0]
        if scheme not in _STORAGES or not re.fullmatch(r"[^:\s]+://\S+", self.storage_uri):
            raise UsageError(
                f"--storage-uri {self.storage_uri!r} must be an address that KServe can fetch from, as "
                f"s3://bucket/models; it knows {', '.join(_STORAGES)}."
            )

    def _check_devices(self) -> None:
        if self.backend == "tensorrt" and self.kind == "cpu":
            raise UsageError("--instances cpu: Triton runs TensorRT plans on GPUs only. Give --instances gpu.")
        if self.kind == "gpu" and self.threads is not None:
            raise UsageError(f"--threads {self.threads} has no effect on instances on a GPU. Leave it out.")

    @property
    def kind(self) -> str:
        """Kind of processor that the instances run on, cpu or gpu, default filled in."""
        return self.where.kind

    @property
    def where(self) -> Instances:
        """The instances, default filled in."""
        return self.instances or Instances("gpu" if self.backend == "tensorrt" else "cpu")
