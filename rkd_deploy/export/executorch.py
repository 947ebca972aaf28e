"""Writes a bundle as an ExecuTorch program for phones, lowered to XNNPACK, and proves it with ExecuTorch's own runtime.

FOLDER/
model.pte    the program, batch 1
model.json   the card: labels, and the rule from an image to the input
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rkd_deploy.backends import Array, RunOn, describe_model
from rkd_deploy.backends.files import CARD_NAME, model_path, program_path
from rkd_deploy.bench.parity import GOLDEN_NAME, Parity, compare_logits, gate, read_golden
from rkd_deploy.errors import ExportError, UsageError, require
from rkd_deploy.storage import new_folder, write_bytes, write_text

PROGRAM_NAME = "model.pte"
PROGRAM_TOLERANCE = 1e-3
"""Largest difference of a logit: XNNPACK adds up in another order, and on some CPUs in fused operations."""
_INPUTS = 8


def export_executorch(bundle: Path, folder: Path) -> Parity:
    """Lower the PyTorch program of a bundle to XNNPACK, and prove the result with the bundle's golden data.

    Args:
        bundle: A float32 bundle with model.pt2 (`export --with-pytorch`).
        folder: Where the program goes, with the card; must not exist.

    Returns:
        How far its logits, by ExecuTorch's runtime on this machine, are from the bundle's own.

    Raises:
        UsageError: The bundle gives other outputs than logits.
        BackendError: It has no model.pt2.
        ExportError: ExecuTorch cannot lower the network.
        GateError: The program answers otherwise; nothing is left behind.
        ModelFileError: The bundle is missing or corrupt.
        StorageError: The folder exists, or could not be written.
        MissingDependencyError: executorch is not installed.
    """
    with _quiet():
        require("executorch.exir", "executorch")
    card = describe_model(bundle)
    if card.outputs != ("logits",):
        raise UsageError(f"{bundle} has the outputs {', '.join(card.outputs)}; a phone's program gives logits alone.")
    file = program_path(bundle)
    RunOn("pytorch").load(bundle).close()  # what is wrong with the file is said in its words
    inputs, logits_NK, _ = read_golden(model_path(bundle).with_name(GOLDEN_NAME))
    inputs, logits_NK = inputs[:_INPUTS], logits_NK[:_INPUTS]
    with new_folder(folder) as temporary:
        content = _lowered(torch.export.load(file).module(), torch.from_numpy(inputs[:1]))
        write_bytes(temporary / PROGRAM_NAME, content)
        write_text(temporary / CARD_NAME, dataclasses.replace(card, checksums={}).to_json() + "\n")
        parity = compare_logits(logits_NK, run_program(content, inputs), PROGRAM_TOLERANCE)
        gate(parity, f"{folder / PROGRAM_NAME} against {bundle}")
    return parity


def run_program(content: bytes, inputs: Array) -> Array:
    """Logits [N, K] of a program of batch 1, by ExecuTorch's runtime, one input after the other."""
    with _quiet():
        runtime = require("executorch.runtime", "executorch")
        method = runtime.Runtime.get().load_program(content).load_method("forward")
        rows = [method.execute([torch.from_numpy(row[np.newaxis])])[0].numpy().copy() for row in inputs]
    return np.concatenate(rows)


def _lowered(network: Any, example: torch.Tensor) -> bytes:
    with _quiet():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        try:
            # Of batch 1 by itself: memory is planned for the largest batch, and a phone has one photo.
            program = torch.export.export(network, (example,))
            edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
            content: bytes = edge.to_executorch().buffer
        except Exception as error:  # of any kind: its passes raise what they come upon
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ExportError(
                f"ExecuTorch cannot lower this network: {reason}. Run the bundle's ONNX file in the app instead, "
                "with ONNX Runtime's mobile package."
            ) from error
    return content


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """ExecuTorch and what it imports warn of their own matters, and its C++ logs to the descriptors themselves."""
    level = logging.root.manager.disable
    saved = os.dup(2)
    try:
        logging.disable(logging.WARNING)
        with open(os.devnull, "wb") as sink, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            os.dup2(sink.fileno(), 2)
            yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        logging.disable(level)
