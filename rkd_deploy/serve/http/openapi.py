"""Describes the server's addresses as OpenAPI 3.1, for client generators and tests."""

from __future__ import annotations

from typing import Any

from rkd_deploy.serve.http.protocol import SERVED_OUTPUTS, VERSION, TensorInterface
from rkd_deploy.serve.http.settings import Limits

_JSON = "application/json"
_PREDICTION = {
    "type": "object",
    "required": ["label", "probability", "index"],
    "properties": {
        "label": {"type": "string"},
        "probability": {"type": "number", "minimum": 0, "maximum": 1.0001},
        "index": {"type": "integer", "minimum": 0},
    },
}


def describe(interface: TensorInterface, limits: Limits, version: str) -> dict[str, Any]:
    """The document for /openapi.json.

    Args:
        interface: Of the model that is served.
        limits: Of requests.
        version: Of this package.
    """
    model = f"/v2/models/{interface.model}"
    metadata = {"type": "object", "required": ["name", "inputs", "outputs"]}
    paths = {
        "/v1/classify": {"post": _classify(limits)},
        "/metrics": {"get": _get("Metrics in Prometheus' text format", {"text/plain": {"schema": {"type": "string"}}})},
        "/card.json": {"get": _get("The model's card", _typed({"type": "object", "required": ["labels"]}))},
        "/v2": {"get": _get("The server", _typed({"type": "object", "required": ["name", "version", "extensions"]}))},
        "/v2/health/live": {"get": _get("Whether the server lives")},
        "/v2/health/ready": {"get": _get("Whether it answers")},
        model: {"get": _get("What the model takes and gives", _typed(metadata))},
        f"{model}/ready": {"get": _get("Whether the model answers")},
        f"{model}/infer": {"post": _infer(interface)},
        f"{model}/versions/{VERSION}/infer": {"post": _infer(interface)},
    }
    error = {"type": "object", "required": ["error"], "properties": {"error": {"type": "string"}}}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": f"rkd-deploy: {interface.model}",
            "version": version,
            "description": "An image classifier: POST an image to /v1/classify, or use the Open Inference Protocol.",
        },
        "paths": paths,
        "components": {"schemas": {"Error": error, "Prediction": _PREDICTION}},
    }


def _classify(limits: Limits) -> dict[str, Any]:
    top = {
        "name": "top",
        "in": "query",
        "description": "How many classes, best first.",
        "schema": {"type": "integer", "minimum": 1, "maximum": 999_999_999, "default": 5},
    }
    image = {"schema": {"type": "string", "format": "binary"}}
    answer = {
        "type": "object",
        "required": ["model", "predictions", "milliseconds"],
        "properties": {
            "model": {"type": "string"},
            "predictions": {"type": "array", "minItems": 1, "items": {"$ref": "#/components/schemas/Prediction"}},
            "milliseconds": {"type": "object", "required": ["decode", "inference"]},
        },
    }
    return {
        "operationId": "classify",
        "summary": f"Classify one image, JPEG, PNG, WebP or BMP, of at most {limits.body:,} bytes",
        "parameters": [top],
        "requestBody": {"required": True, "content": {"application/octet-stream": image}},
        "responses": _responses("Labels and probabilities, best first", _typed(answer)),
    }


def _infer(interface: TensorInterface) -> dict[str, Any]:
    number = {"type": "integer", "minimum": 0, "maximum": 255} if interface.dtype == "uint8" else {"type": "number"}
    shape = {"type": "array", "items": {"type": "integer", "minimum": 1}, "minItems": 1}
    tensor = {
        "type": "object",
        "required": ["name", "shape", "datatype"],
        "properties": {
            "name": {"const": interface.input_name},
            "shape": {**shape, "description": f"[N, {', '.join(map(str, interface.shape))}]; of BYTES [N]"},
            "datatype": {"enum": [interface.datatype, "BYTES"]},
            "data": {
                "type": "array",
                "items": {"anyOf": [number, {"type": "string", "contentEncoding": "base64"}, {"type": "array"}]},
                "description": "Numbers, nested or in one list; encoded images in base64. Or binary, behind the JSON.",
            },
            "parameters": {"type": "object"},
        },
    }
    request = {
        "type": "object",
        "required": ["inputs"],
        "properties": {
            "id": {"type": "string"},
            "inputs": {"type": "array", "items": tensor, "minItems": 1, "maxItems": 1},
            "outputs": {
                "type": "array",
                "items": {
                    "type": "object",
                    "required": ["name"],
                    "properties": {"name": {"enum": list(SERVED_OUTPUTS)}},
                },
            },
            "parameters": {"type": "object"},
        },
    }
    answer = {"type": "object", "required": ["model_name", "model_version", "outputs"]}
    return {
        "summary": "Infer by the Open Inference Protocol, version 2, with the binary tensor extension",
        "requestBody": {"required": True, "content": _typed(request)},
        "responses": _responses("The outputs", _typed(answer)),
    }


def _get(summary: str, content: dict[str, Any] | None = None) -> dict[str, Any]:
    answer = content or _typed({"type": "object"})
    return {"summary": summary, "responses": {"200": {"description": summary, "content": answer}}}


def _typed(schema: dict[str, Any]) -> dict[str, Any]:
    return {_JSON: {"schema": schema}}


def _responses(description: str, content: dict[str, Any]) -> dict[str, Any]:
    error = _typed({"$ref": "#/components/schemas/Error"})
    refusals = {
        "400": "The request is none, or its image cannot be read",
        "408": "The body did not arrive in time",
        "413": "The body is too large",
        "415": "The body is compressed",
        "500": "The model failed",
        "503": "Too many requests at once; see Retry-After",
    }
    answers = {code: {"description": text, "content": error} for code, text in refusals.items()}
    return {"200": {"description": description, "content": content}, **answers}
