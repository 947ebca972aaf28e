"""Settings of an engine's build, and what TensorRT and TensorRT-RTX can do of them."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from rkd_deploy.errors import BackendError, UsageError, install_line, require, unknown_name
from rkd_deploy.fields import check_fields, option

IMPORT_NAMES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
"""Import name of each library, by the name of its backend."""

OLDEST_TENSORRT = 10


@dataclass(frozen=True)
class Library:
    """One of the two libraries, TensorRT or TensorRT-RTX, imported and with a logger of its own."""

    name: str
    """Name of the library, tensorrt or tensorrt-rtx."""
    trt: Any
    """The imported module."""
    log: Any
    """The logger that every object of the library is made with; see `drain`."""
    messages: list[str] = field(repr=False)

    @property
    def is_rtx(self) -> bool:
        """Whether the library is TensorRT-RTX."""
        return self.name == "tensorrt-rtx"

    @property
    def version(self) -> str:
        """Version of the library, e.g. 11.4.0.106."""
        return str(self.trt.__version__)

    @property
    def major(self) -> int:
        """First number of the library's version."""
        return int(self.version.split(".")[0])

    def drain(self) -> str:
        """Errors that the library logged since the last call, as one line: it logs and returns None, never raises."""
        lines = [" ".join(message.split()) for message in self.messages]
        self.messages.clear()
        return "; ".join(dict.fromkeys(lines)) or "the library gave no reason"


@cache
def load_library(name: str) -> Library:
    """Import TensorRT or TensorRT-RTX.

    Args:
        name: tensorrt or tensorrt-rtx.

    Raises:
        MissingDependencyError: It is not installed.
        BackendError: It is older than TensorRT 10.
    """
    if name not in IMPORT_NAMES:
        raise BackendError(unknown_name("engine library", name, IMPORT_NAMES))
    trt = require(IMPORT_NAMES[name], name)
    messages: list[str] = []
    library = Library(name, trt, _logger(trt, messages), messages)
    if not library.is_rtx and library.major < OLDEST_TENSORRT:
        raise BackendError(
            f"TensorRT {library.version} is installed; strongly typed networks, which keep the precision that the ONNX "
            f"file is written in, need TensorRT {OLDEST_TENSORRT} or newer. Update with: {install_line(name)}"
        )
    return library


def _logger(trt: Any, messages: list[str]) -> Any:
    """An ILogger that collects errors; TensorRT keeps a process's first logger for good: one for each library."""

    class Collector(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                messages.append(message)

    return Collector()


HARDWARE = {"none": "NONE", "ampere+": "AMPERE_PLUS", "same-capability": "SAME_COMPUTE_CAPABILITY"}
"""TensorRT's names of its hardware compatibility levels, by the names of `EngineSettings.hardware`."""


@dataclass(frozen=True)
class Profile:
    """Range of batch sizes that an engine takes, and the one that its kernels are chosen for."""

    least: int
    best: int
    most: int

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.best <= self.most:
            raise UsageError(
                f"The profile {self} is no range of batch sizes: it must hold 1 <= MIN <= OPT <= MAX, e.g. 1:8:32, or "
                "one number for a fixed batch."
            )

    def __str__(self) -> str:
        return f"{self.least}:{self.best}:{self.most}"

    def covers(self, batch: int) -> bool:
        """Whether the engine takes this many images in one call."""
        return self.least <= batch <= self.most

    @classmethod
    def around(cls, batches: Sequence[int]) -> Profile:
        """The narrowest range that covers some batch sizes, with kernels for the middle one (of two, the larger)."""
        ordered = sorted(set(batches))
        return cls(ordered[0], ordered[len(ordered) // 2], ordered[-1])

    @classmethod
    def parse(cls, text: str) -> Profile:
        """Read a profile from MIN:OPT:MAX, or from one number for all three.

        Raises:
            UsageError: It is neither, or no range.
        """
        match = re.fullmatch(r"(\d+)(?::(\d+):(\d+))?", text.strip())
        if match is None:
            raise UsageError(f"The profile {text!r} must be MIN:OPT:MAX batch sizes, e.g. 1:8:32, or one batch size.")
        least = int(match[1])
        return cls(least, int(match[2] or least), int(match[3] or least))


DEFAULT_PROFILES = (Profile(1, 8, 32),)


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """How to build an engine. What a library cannot do is refused by `check`, with the reason.

    Attributes:
        profiles: Batch sizes, one profile each; a profile of one size has static shapes throughout. Of no effect where
            the ONNX file has a fixed batch.
        compute_capabilities: RTX: GPUs to build for, e.g. ("8.6", "12.0"). None: every one that the library names.
        hardware: TensorRT: none (the GPU it is built on), ampere+ or same-capability.
        version_compatible: TensorRT: the engine runs in later versions of the same major version too, slower.
        tf32: Let float32 products round to 10 bits of mantissa: faster, and no longer what the file says.
        optimization_level: 0 to 5, how long to look for fast kernels; None: the library's own.
        workspace_bytes: Most device memory for scratch; None: all of it.
        timing_cache: TensorRT: a file that kernel timings are read from and written to, for faster next builds.
    """

    profiles: tuple[Profile, ...] = option(
        "--profile",
        "MIN:OPT:MAX batch, or one fixed batch; repeatable. Default: 1:8:32.",
        default=DEFAULT_PROFILES,
        reads=list[str],
        parse=lambda texts: tuple(Profile.parse(text) for text in texts),
    )
    compute_capabilities: tuple[str, ...] | None = option(
        "--compute-capability",
        "RTX: a GPU to build for, e.g. 8.6; repeatable. Default: all.",
        default=None,
        reads=list[str],
        parse=tuple,
    )
    hardware: str = option(
        "--hardware",
        "TensorRT: runs on ampere+ or same-capability GPUs, not one.",
        default="none",
        choices=tuple(HARDWARE),
    )
    version_compatible: bool = option(
        "--version-compatible", "TensorRT: runs in later versions too, slower.", default=False
    )
    tf32: bool = option("--tf32", "Let float32 products round to 10 bits of mantissa.", default=False)
    optimization_level: int | None = option(
        "--optimization", "0 to 5, how long to look for kernels.", default=None, low=0, high=5
    )
    workspace_bytes: int | None = option(
        "--workspace",
        "Most scratch memory, in MiB.",
        default=None,
        reads=int,
        parse=lambda mebibytes: mebibytes << 20,
        low=1,
        high=1 << 50,
    )
    timing_cache: str | os.PathLike[str] | None = option(
        "--timing-cache", "TensorRT: file of kernel timings, read and written.", default=None, reads=Path
    )

    def __post_init__(self) -> None:
        if not self.profiles:
            raise UsageError("An engine needs at least one profile of batch sizes, e.g. 1:8:32.")
        check_fields(self)

    def to_dict(self) -> dict[str, Any]:
        """The settings for JSON, without the timing cache: it changes how long a build takes, and nothing else."""
        content = asdict(self)
        del content["timing_cache"]
        return {**content, "profiles": [str(profile) for profile in self.profiles]}

    def check(self, library: Library) -> None:
        """Refuse what this library cannot do.

        Raises:
            UsageError: Names the setting, the reason, and what to do instead.
        """
        if library.is_rtx:
            self._check_rtx(library.trt)
            return
        _refuse(
            self.compute_capabilities is not None,
            "--compute-capability",
            "TensorRT builds for the GPU that it runs on. Use --hardware ampere+ or same-capability, or tensorrt-rtx",
        )
        _refuse(
            not hasattr(library.trt.HardwareCompatibilityLevel, HARDWARE[self.hardware]),
            f"--hardware {self.hardware}",
            f"TensorRT {library.version} does not know this level. Update TensorRT, or use --hardware ampere+",
        )

    def _check_rtx(self, trt: Any) -> None:
        _refuse(
            self.hardware != "none",
            f"--hardware {self.hardware}",
            "a TensorRT-RTX engine is finished on the GPU that runs it. Name the GPUs with --compute-capability",
        )
        _refuse(
            self.version_compatible,
            "--version-compatible",
            "TensorRT-RTX comes without the lean runtime that such engines carry. Build again after an update",
        )
        _refuse(
            self.timing_cache is not None,
            "--timing-cache",
            "TensorRT-RTX times no kernels when it builds. Leave it out",
        )
        known = capabilities(trt)
        for capability in self.compute_capabilities or ():
            if capability not in known:
                raise UsageError(unknown_name("compute capability", capability, known))
        if self.compute_capabilities == ():
            raise UsageError("--compute-capability names no GPU; name at least one, or leave it out for all of them.")


def capabilities(trt: Any) -> dict[str, Any]:
    """TensorRT-RTX's compute capabilities by their usual names: "8.6" for its member SM86."""
    members = ((name, getattr(trt.ComputeCapability, name)) for name in dir(trt.ComputeCapability))
    return {f"{name[2:-1]}.{name[-1]}": member for name, member in members if re.fullmatch(r"SM\d+", name)}


def check_gpu(library: Library, device: str, capability: str) -> None:
    """Refuse a GPU that TensorRT-RTX has no kernels for, before an engine is built that could not run there.

    It runs on the compute capabilities that it names, and on any newer one (as 1.7.1 says it: "8.0 8.6 8.9 12.0 12.1
    >12.0"). It builds on every machine, and only loading tells otherwise.

    Args:
        library: TensorRT-RTX; any GPU passes where it is TensorRT.
        device: Name of the GPU.
        capability: Compute capability of the GPU, e.g. "8.6".

    Raises:
        BackendError: It is none of them.
    """
    if not library.is_rtx:
        return
    known = sorted(capabilities(library.trt), key=_version)
    if capability in known or _version(capability) > _version(known[-1]):
        return
    raise BackendError(
        f"{library.name} {library.version} does not run on {device}, compute capability {capability}: it runs on "
        f"{', '.join(known)} and newer. Run the model there on onnxruntime:cuda-graphs or pytorch:cuda-graphs, or with "
        f"the whole TensorRT, backend tensorrt ({install_line('tensorrt')})."
    )


def _version(capability: str) -> tuple[int, ...]:
    return tuple(map(int, capability.split(".")))


def profile_for(batch: int, profiles: Sequence[Profile]) -> int | None:
    """Index of the profile to run a batch with: of those that cover it, the one whose best size is nearest."""
    covering = [index for index, profile in enumerate(profiles) if profile.covers(batch)]
    return min(covering, key=lambda index: abs(profiles[index].best - batch), default=None)


def _refuse(wanted: bool, setting: str, reason: str) -> None:
    if wanted:
        raise UsageError(f"{setting} cannot be had here: {reason}.")
