"""The JSON file beside an engine: which model, library and GPU it was built from and for.

The engine itself is the library's bytes and nothing else, so that trtexec and Triton load it as it is.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from rkd_deploy.backends.tensorrt.settings import Library
from rkd_deploy.errors import BackendError, ModelFileError, command_line
from rkd_deploy.storage import read_bytes, read_text, write_bytes, write_json

ENGINE_SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class EngineRecord:
    """Facts of an engine: of which model it was built, by which library, for which GPU."""

    library: str
    """tensorrt or tensorrt-rtx; "flavour" in the file."""
    version: str
    """Version of the library that built the engine."""
    device: str | None
    """Name of the GPU the engine was built on; None: a machine without GPU, which TensorRT-RTX can do."""
    compute_capability: str | None
    """Compute capability of the GPU the engine was built on, e.g. "9.0"."""
    compute_capabilities: tuple[str, ...]
    """TensorRT-RTX: compute capabilities the engine was built for; empty: every one that the library names."""
    driver: int | None
    """CUDA version of the driver the engine was built with, as 13020 for 13.2."""
    profiles: tuple[str, ...]
    """Batch sizes MIN:OPT:MAX of each profile; empty where the ONNX file has a fixed batch."""
    precision: str
    """Precision of the model, as the ONNX file's card says."""
    settings: Mapping[str, Any]
    onnx_name: str
    onnx_sha256: str
    engine_sha256: str
    engine_bytes: int
    build_seconds: float
    layers: Sequence[Mapping[str, Any]] = field(default_factory=tuple)
    layers_of: str = "network"
    """Whose layers `layers` are: the parsed network's, or the finished engine's, which only a GPU can show."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """Metadata of the ONNX file, the model card among them."""

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON holds it; `from_json` gives the equal record back."""
        content = asdict(self)
        return {"schema": ENGINE_SCHEMA, "flavour": content.pop("library"), **content}

    @classmethod
    def from_json(cls, text: str, where: str) -> EngineRecord:
        """Read a record from the text of its file.

        Args:
            text: JSON of `to_dict`.
            where: The file it comes from, for messages.

        Raises:
            ModelFileError: No JSON, a newer schema, or fields missing.
        """
        try:
            content = json.loads(text)
            schema, content["library"] = content.pop("schema"), content.pop("flavour")
            if schema != ENGINE_SCHEMA:
                raise ModelFileError(
                    f"{where} is written in engine schema {schema}; this version reads schema {ENGINE_SCHEMA}. "
                    "Update with: pip install -U rkd-deploy"
                )
            names = {item.name for item in fields(cls)}
            known = {key: value for key, value in content.items() if key in names}
            for name in ("compute_capabilities", "profiles"):
                known[name] = tuple(known[name])
            return cls(**known)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelFileError(
                f"{where} holds no record of an engine that can be read ({error}). Build the engine again with "
                "rkd-deploy export --format tensorrt."
            ) from error

    def check_fits(self, library: Library, device: str, capability: str) -> None:
        """Refuse to run the engine with a library or on a GPU that it was not built for.

        Args:
            library: The library that would run it.
            device: Name of the GPU.
            capability: Compute capability of the GPU, e.g. "8.6".

        Raises:
            BackendError: Another library, version or GPU; both are named.
        """
        again = f"Build it again here with: {command_line('export', self.onnx_name, '--format', library.name)}"
        if self.library != library.name:
            raise BackendError(f"The engine is {self.library}'s and cannot run on {library.name}. {again}")
        same_major = self.version.split(".")[0] == library.version.split(".")[0]
        if self.version != library.version and not (self.settings.get("version_compatible") and same_major):
            raise BackendError(
                f"The engine was built by {self.library} {self.version}; {library.version} is installed here, and an "
                f"engine runs only in the version that built it, unless it is built version compatible. {again}"
            )
        reason = self._foreign_rtx(capability) if library.is_rtx else self._foreign(device, capability)
        if reason:
            raise BackendError(f"The engine was built for {reason}; here is {device} ({capability}). {again}")

    def _foreign_rtx(self, capability: str) -> str | None:
        named = self.compute_capabilities  # none named: portable, and the library itself has the last word
        return f"compute capabilities {', '.join(named)}" if named and capability not in named else None

    def _foreign(self, device: str, capability: str) -> str | None:
        level = self.settings.get("hardware", "none")
        if level == "ampere+":
            return "compute capability 8.0 or newer" if float(capability) < 8 else None
        if level == "same-capability":
            return f"compute capability {self.compute_capability}" if capability != self.compute_capability else None
        same = (device, capability) == (self.device, self.compute_capability)
        return None if same else f"{self.device} ({self.compute_capability})"


def engine_path(model: Path, library: str) -> Path:
    """Where the engine of an ONNX file lies: model.onnx -> model.tensorrt.engine, beside it."""
    return model.with_name(f"{model.stem}.{library}.engine")


def record_path(engine: Path) -> Path:
    """Where the record of an engine lies: model.tensorrt.engine -> model.tensorrt.engine.json."""
    return engine.with_name(engine.name + ".json")


def write_engine(path: Path, plan: bytes, record: EngineRecord) -> None:
    """Write an engine and its record, each whole or not at all.

    Raises:
        StorageError: Something could not be written.
    """
    write_bytes(path, plan)
    try:
        write_json(record_path(path), record.to_dict())
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def read_engine(path: str | os.PathLike[str]) -> tuple[bytes, EngineRecord | None]:
    """An engine and its record; one that trtexec wrote, say, has no record.

    Raises:
        ModelFileError: The engine cannot be read, its record cannot, or the two do not belong together.
    """
    file = Path(path)
    beside = record_path(file)
    try:
        plan = read_bytes(file)
        text = read_text(beside) if os.path.lexists(beside) else None
    except (OSError, UnicodeDecodeError) as error:
        raise ModelFileError(f"{file} or {beside.name} beside it cannot be read: {error}.") from error
    if text is None:
        return plan, None
    record = EngineRecord.from_json(text, str(beside))
    if hashlib.sha256(plan).hexdigest() != record.engine_sha256:
        raise ModelFileError(
            f"{file} is not the engine that {beside.name} describes: {len(plan):,} bytes with another checksum than "
            f"the {record.engine_bytes:,} bytes recorded. Copy both files again, or build the engine again."
        )
    return plan, record
