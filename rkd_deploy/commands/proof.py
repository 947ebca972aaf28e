"""Says what an export proved: as sentences, and as facts for --json."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rkd_deploy.commands.options import console_for
from rkd_deploy.errors import command_line

if TYPE_CHECKING:
    from rkd_deploy.pipeline import Exported


def print_proof(exported: Exported, precision: str, as_json: bool) -> None:
    """Print the proof of a bundle and where to go next.

    Args:
        exported: The bundle and its proof.
        precision: Name of the file's precision, for sentences about the conversion.
        as_json: Whether standard output is kept for the JSON object.
    """
    from rkd_deploy.backends import describe_model
    from rkd_deploy.report.columns import print_exits

    proof = exported.proof
    console = console_for(as_json)
    console.print(
        f"Parity passed: logits differ from PyTorch's by at most {proof.parity.max_abs_diff:.2g} "
        f"(tolerance {proof.parity.tolerance:g}) over {proof.images:,} images; {proof.differing} classified otherwise."
    )
    if proof.torch_top1 is not None and proof.onnx_top1 is not None:
        console.print(f"Top-1 on them: PyTorch {proof.torch_top1:.2f} %, ONNX Runtime {proof.onnx_top1:.2f} %.")
    if proof.conversion is not None:
        console.print(f"{precision}: {proof.conversion.result.in_words()}.")
        console.print(f"Left in float32: {', '.join(proof.conversion.float32_layers) or 'no layer'}.")
        if proof.converted_top1 is not None:
            console.print(f"Top-1 of the {precision} file on the test images: {proof.converted_top1:.2f} %.")
    exits = describe_model(exported.folder).early_exit
    if exits:
        print_exits(exits, console)
    console.print(f"Bundle {exported.folder}. Next: {command_line('bench', exported.folder)}", markup=False)


def proof_facts(exported: Exported, precision: str) -> dict[str, Any]:
    """The proof of a bundle for --json."""
    from rkd_deploy.backends import describe_model

    proof = exported.proof
    converted: dict[str, Any] = {}
    if (conversion := proof.conversion) is not None:
        converted = {
            "precision": precision,
            "gate": conversion.result.to_dict(),
            "kept": list(conversion.float32_layers),
        }
    return {
        "bundle": str(exported.folder),
        "parity": proof.parity.to_dict(),
        "images": proof.images,
        "differing": proof.differing,
        "torch_top1": proof.torch_top1,
        "onnx_top1": proof.onnx_top1,
        "early_exit": describe_model(exported.folder).early_exit,
        **converted,
    }
