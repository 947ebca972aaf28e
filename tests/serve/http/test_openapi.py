"""Schemathesis tries what /openapi.json describes, and what it forbids: never a 500, never another form."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

# Schemathesis and what it imports use what newer versions of others call deprecated.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import schemathesis
    from schemathesis import GenerationMode
    from schemathesis.checks import FailureGroup
    from schemathesis.specs.openapi import checks as openapi_checks

OPERATIONS = 10
EXAMPLES = 20
CHECKS = [
    schemathesis.checks.not_a_server_error,
    openapi_checks.status_code_conformance,
    openapi_checks.content_type_conformance,
    openapi_checks.response_schema_conformance,
    openapi_checks.unsupported_method,
    openapi_checks.negative_data_rejection,
]


@pytest.fixture(scope="module")
def schema(server) -> Any:
    return schemathesis.openapi.from_url(f"{server.address}/openapi.json")


def test_the_document_is_openapi(schema):
    schema.validate()
    assert schema.raw_schema["openapi"] == "3.1.0"
    assert sum(1 for _ in schema.get_all_operations()) == OPERATIONS


CASES = [(place, GenerationMode.POSITIVE) for place in range(OPERATIONS)]
CASES += [(place, GenerationMode.NEGATIVE) for place in (0, 8, 9)]  # those that take something


@pytest.mark.parametrize(("place", "mode"), CASES)
@pytest.mark.filterwarnings("ignore")
def test_every_operation_keeps_to_its_description(schema, place, mode):
    assert try_everything(list(schema.get_all_operations())[place].ok(), mode)


@pytest.mark.filterwarnings("ignore")
def test_an_answer_that_is_not_described_is_noticed(server):
    document = server.ask("/openapi.json").json
    del document["paths"]["/v1/classify"]["post"]["responses"]["400"]
    schema = schemathesis.openapi.from_dict(document)
    schema.config.update(base_url=server.address)
    (operation, *_) = schema.get_all_operations()
    with pytest.raises(FailureGroup, match="Undocumented status code"):
        try_everything(operation.ok(), GenerationMode.POSITIVE)


def try_everything(operation, mode):
    """The status codes that requests to an operation were answered with, each of which was as described."""
    codes = set()

    @settings(
        max_examples=EXAMPLES if operation.method == "post" else 2,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    @given(st.data())
    def check(data):
        case = data.draw(operation.as_strategy(generation_mode=mode))
        response = case.call()
        case.validate_response(response, checks=CHECKS)
        codes.add(response.status_code)

    check()
    return codes
