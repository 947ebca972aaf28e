"""Writes config.pbtxt: Triton's ModelConfig in protobuf's text format.

Field names and their meaning: model_config.proto of triton-inference-server/common.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from rkd_deploy.serve.triton.settings import Serving
from rkd_deploy.serve.triton.signature import Batching, Signature, Tensor

LABELS_NAME = "labels.txt"

_SCHEDULING = """
# Requests are joined: a batch of a preferred size runs at once, any other when its oldest request has waited so long.
dynamic_batching {{
  preferred_batch_size: [ {preferred} ]
  max_queue_delay_microseconds: {delay}
}}

instance_group [
  {{
    kind: {kind}
    count: {count}{profiles}
  }}
]

version_policy: {{ {policy} }}
"""


def interface(name: str, backend: str, signature: Signature) -> str:
    """The lines that say what the model is: every version of it must agree on them."""
    inputs = _tensor("input", signature.input)
    outputs = (_tensor("output", output, signature.labelled(output)) for output in signature.outputs)
    return f"name: {_quoted(name)}\nbackend: {_quoted(backend)}\n\n{inputs}{''.join(outputs)}"


def config_text(name: str, signature: Signature, serving: Serving, batching: Batching) -> str:
    """The text of config.pbtxt.

    Args:
        name: The model's name, which is its folder's too.
        signature: What goes in and out.
        serving: What is asked for.
        batching: Batch sizes, as the model can take them.
    """
    profiles = ", ".join(f'"{index}"' for index in range(batching.profiles))
    scheduling = _SCHEDULING.format(
        preferred=", ".join(map(str, batching.preferred)),
        delay=serving.queue_delay_us,
        kind=f"KIND_{serving.where.kind.upper()}",
        count=serving.where.count,
        profiles=f"\n    profile: [ {profiles} ]" if batching.profiles > 1 else "",
        policy="all: {}" if serving.versions is None else f"latest: {{ num_versions: {serving.versions} }}",
    )
    parts = [interface(name, serving.backend, signature), f"max_batch_size: {batching.most}\n", scheduling]
    if serving.threads is not None:
        parts.append(_parameter("intra_op_thread_count", str(serving.threads)))
    parts += ["\n# Before a version answers, it has run each of these once.\n"]
    parts += [_warmup(signature.input, size) for size in sorted({1, *batching.preferred})]
    return "".join(parts)


def _tensor(field: str, tensor: Tensor, labelled: bool = False) -> str:
    lines = [f"name: {_quoted(tensor.name)}", f"data_type: {tensor.type}", f"dims: [ {_dims(tensor.dims)} ]"]
    if labelled:
        lines.append(f"label_filename: {_quoted(LABELS_NAME)}")
    return _block(f"{field} [\n  {{", (f"    {line}" for line in lines), "  }\n]")


def _parameter(key: str, value: str) -> str:
    return _block("\nparameters {", (f"  key: {_quoted(key)}", f"  value: {{ string_value: {_quoted(value)} }}"), "}")


def _warmup(tensor: Tensor, batch: int) -> str:
    shape = f"data_type: {tensor.type}, dims: [ {_dims(tensor.dims)} ], zero_data: true"
    lines = (
        f'  name: "batch_{batch}"',
        f"  batch_size: {batch}",
        "  inputs {",
        f"    key: {_quoted(tensor.name)}",
        f"    value: {{ {shape} }}",
        "  }",
    )
    return _block("model_warmup {", lines, "}")


def _block(opening: str, lines: Iterable[str], closing: str) -> str:
    return "\n".join((opening, *lines, closing)) + "\n"


def _dims(dims: tuple[int, ...]) -> str:
    return ", ".join(map(str, dims))


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)  # the text format knows every escape that JSON has
