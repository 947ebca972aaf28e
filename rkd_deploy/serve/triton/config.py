"""Writes config.pbtxt: Triton's ModelConfig in protobuf's text format.

Field names and their meaning: model_config.proto of triton-inference-server/common.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

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


_PIXELS = """name: {name}
backend: "python"
max_batch_size: {most}

input [
  {{
    name: "images"
    data_type: TYPE_STRING
    dims: [ 1 ]
  }}
]
output [
  {{
    name: "pixels"
    data_type: {type}
    dims: [ {dims} ]
  }}
]
"""


def pixels_text(name: str, prepared: Tensor, most: int) -> str:
    """The text of config.pbtxt of the model that prepares encoded images.

    Args:
        name: Of that model.
        prepared: What it gives: the input of the model behind it.
        most: Largest batch of that.
    """
    return _PIXELS.format(name=_quoted(name), most=most, type=prepared.type, dims=_dims(prepared.dims))


def ensemble_text(name: str, pixels: str, model: str, signature: Signature, most: int) -> str:
    """The text of config.pbtxt of the ensemble that takes encoded images.

    Args:
        name: Of the ensemble.
        pixels: Name of the model that prepares them.
        model: Name of the model that answers.
        signature: Of that.
        most: Largest batch of that.
    """
    images = Tensor(signature.input.name, "TYPE_STRING", (1,))  # the same name: a client changes the model's alone
    outputs = (_tensor("output", output, signature.labelled(output)) for output in signature.outputs)
    steps = (
        (pixels, {"images": images.name}, {"pixels": "pixels"}),
        (model, {images.name: "pixels"}, {output.name: output.name for output in signature.outputs}),
    )
    lines = [line for step in steps for line in _step(*step)]
    scheduling = _block("ensemble_scheduling {", (f"  {line}" for line in lines), "}")
    head = f'name: {_quoted(name)}\nplatform: "ensemble"\nmax_batch_size: {most}\n\n'
    return "".join((head, _tensor("input", images), *outputs, "\n", scheduling))


def _step(model: str, inputs: Mapping[str, str], outputs: Mapping[str, str]) -> list[str]:
    maps = [
        f"  {field} {{ key: {_quoted(key)}, value: {_quoted(value)} }}"
        for field, pairs in (("input_map", inputs), ("output_map", outputs))
        for key, value in pairs.items()
    ]
    return ["step {", f"  model_name: {_quoted(model)}", "  model_version: -1", *maps, "}"]


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
