"""The commands that look at a bundle: verify, info, and the backends that can run it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from rkd_deploy.commands.options import (
    RUNS,
    DeviceName,
    Json,
    Newest,
    Root,
    as_dict,
    fact_lines,
    newest_bundle,
    print_json,
)
from rkd_deploy.text import visible


def verify(
    model: Newest = None,
    backend: Annotated[
        str | None, typer.Option("--backend", help="Default: every one that is installed and can run the bundle.")
    ] = None,
    device: DeviceName = None,
    tolerance: Annotated[float | None, typer.Option("--tolerance", help="Default: the bundle's own.")] = None,
    root: Root = RUNS,
    as_json: Json = False,
) -> None:
    """Prove a bundle again from its golden data.

    Its files are compared with their checksums, its logits with the stored ones.
    """
    from rkd_deploy.backends import RunOn, describe_model
    from rkd_deploy.bench.parity import BackendParity, gate, verify_everywhere
    from rkd_deploy.bench.parity import verify as verify_bundle

    bundle = model or newest_bundle(root)
    if backend is None:
        verdicts = verify_everywhere(bundle, device=device, tolerance=tolerance)
    else:
        verdicts = [
            BackendParity(backend, verify_bundle(bundle, RunOn(backend, device=device), tolerance=tolerance), None)
        ]
    for verdict in verdicts:
        if (parity := verdict.parity) is None:
            line = f"not run: {verdict.reason}"
        else:
            line = (
                f"logits differ by at most {parity.max_abs_diff:.2g} "
                f"(tolerance {parity.tolerance:g}) over {parity.n} images."
            )
        typer.echo(visible(f"{bundle} on {verdict.backend}: {line}"), err=as_json)
    for verdict in verdicts:
        if verdict.parity is not None:
            gate(verdict.parity, f"{bundle} on {verdict.backend}", describe_model(bundle).precision)
    if as_json:
        rows = [{"backend": each.backend, "parity": each.parity and each.parity.to_dict()} for each in verdicts]
        print_json({"bundle": str(bundle), "backends": rows})


def info(model: Newest = None, root: Root = RUNS, as_json: Json = False) -> None:
    """Show the card of a bundle or an ONNX file, or an engine's record.

    Precision, fusion, checksums, what it was exported with. Files that were changed are an error.
    """
    from rkd_deploy.backends import describe_model
    from rkd_deploy.backends.tensorrt.record import record_path

    if model is not None and record_path(model).is_file():
        _show_engine(model, as_json)
        return
    card = json.loads(describe_model(model or newest_bundle(root)).to_json())
    if as_json:
        print_json(card)
        return
    labels, checksums, versions = card.pop("labels"), card.pop("checksums"), card.pop("versions")
    facts = {
        **card,
        "labels": f"{len(labels)}: {', '.join(labels[:5])}{', ...' if len(labels) > 5 else ''}",
        "unchanged": [{name: f"SHA-256 {checksum}"} for name, checksum in checksums.items()],
        "exported with": [versions],
    }
    typer.echo("\n".join(fact_lines(facts)))


def _show_engine(file: Path, as_json: bool) -> None:
    from rkd_deploy.backends.tensorrt.layers import layer_table
    from rkd_deploy.backends.tensorrt.record import read_engine

    record = read_engine(file)[1]
    assert record is not None
    content = record.to_dict()
    if as_json:
        print_json(content)
        return
    layers = content.pop("layers")
    del content["metadata"]  # the model's card, which is shown of the model
    typer.echo("\n".join(fact_lines(content)))
    typer.echo("\n".join(map(visible, layer_table(layers).splitlines())))


def backends(as_json: Json = False) -> None:
    """List the backends and what works here."""
    from rkd_deploy.backends import available

    statuses = available()
    for status in statuses:
        state = f"works on {', '.join(status.devices)}" if status.ok else status.reason
        version = f" {status.version}" if status.version else ""
        modes = f"; also as {', '.join(status.modes)}" if status.modes else ""
        typer.echo(f"{status.name + version:<24} {state}{modes}", err=as_json)
    if as_json:
        print_json({"backends": [as_dict(status) for status in statuses]})
