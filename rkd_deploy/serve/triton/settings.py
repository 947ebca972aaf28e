"""How Triton is to serve a model: on what, how many at a time, which versions."""

from __future__ import annotations

import re
from dataclasses import dataclass

from rkd_deploy.errors import UsageError, unknown_name

BACKENDS = ("onnxruntime", "tensorrt", "python")
"""Of Triton: onnxruntime and python read model.onnx, tensorrt a plan, which runs in the TensorRT that built it only."""

STORAGE_URI = "s3://BUCKET/PATH"
"""Stands where nobody said yet where the repository is uploaded to; upper case is no bucket's name."""

_STORAGES = ("gs", "s3", "pvc", "file", "https", "http", "hdfs", "webhdfs", "oci", "oci+native", "oci+fetch", "hf")
"""What KServe fetches models from (pkg/controller/v1beta1/inferenceservice/utils)."""


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
        """Read ``cpu``, ``gpu``, or one of them with a number, as ``cpu:2``.

        Raises:
            UsageError: It is something else.
        """
        found = re.fullmatch(r"(cpu|gpu)(?::([1-9]\d*))?", text.strip())
        if found is None:
            raise UsageError(f"--instances {text!r} must be cpu or gpu, and how many of them, e.g. cpu:2 or gpu:1.")
        return cls(found[1], int(found[2] or 1))


@dataclass(frozen=True, kw_only=True)
class Serving:
    """What `export_triton` is asked for; what cannot be is refused here.

    Attributes:
        backend: Triton's: onnxruntime, tensorrt or python. Python needs onnxruntime and numpy in the server's Python.
        name: Of the model in the repository. Default: made of the card's name, else of the file's.
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

    backend: str = "onnxruntime"
    name: str | None = None
    max_batch: int | None = None
    preferred: tuple[int, ...] | None = None
    queue_delay_us: int = 2000
    instances: Instances | None = None
    threads: int | None = None
    versions: int | None = 1
    storage_uri: str = STORAGE_URI
    config: str | None = None

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise UsageError(unknown_name("--triton-backend", self.backend, BACKENDS))
        if self.name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}", self.name):
            raise UsageError(
                f"--model-name {self.name!r} names a folder and a part of an address: it must be up to 100 letters, "
                "digits, dots, dashes or underscores, beginning with a letter or digit."
            )
        counts = {"--max-batch": self.max_batch, "--threads": self.threads, "--serve-versions": self.versions}
        for option, value in counts.items():
            if value is not None and value < 1:
                raise UsageError(f"{option} {value} must be at least 1.")
        if self.queue_delay_us < 0:
            raise UsageError(f"--queue-delay {self.queue_delay_us} is in microseconds and must be at least 0.")
        if self.config not in (None, "keep", "replace"):
            raise UsageError(unknown_name("--config", self.config, ("keep", "replace")))
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
        """Where the instances run, default filled in."""
        return self.where.kind

    @property
    def where(self) -> Instances:
        """The instances, default filled in."""
        return self.instances or Instances("gpu" if self.backend == "tensorrt" else "cpu")
