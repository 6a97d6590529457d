"""The schema of the server, and requests made from it at random: no 5xx, nothing undeclared."""

from dataclasses import fields

import pytest

from decoding.request import Request
from serve.api.parameters import Diffusion, Sampling
from serve.app import explain
from serve.config import ServeConfig
from tests.serve.rig import running

schemathesis = pytest.importorskip("schemathesis")
from schemathesis.specs.openapi.checks import (  # noqa: E402
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

CHECKS = [content_type_conformance, response_schema_conformance, status_code_conformance]

PATHS = [
    "/v1/chat/completions", "/v1/completions", "/v1/canvas", "/v1/fim/completions", "/v1/edit/completions",
    "/generate", "/generate_stream", "/api/chat", "/api/generate", "/v1/models", "/v1/decoders", "/info",
]  # fmt: skip


def test_the_schema_declares_every_path_and_error(server):
    document = server.client.get("/openapi.json").json()
    assert set(PATHS) <= set(document["paths"])
    for path in PATHS[:5]:
        responses = document["paths"][path]["post"]["responses"]
        assert {"200", "400", "401", "404", "429", "500", "503"} <= set(responses)
        assert "422" not in responses
    names = {
        name for schema in document["components"]["schemas"].values() for name in schema.get("properties", {})
    }
    schemas = document["components"]["schemas"].values()
    names = {name for schema in schemas for name in schema.get("properties", {})}
    assert {"logit_bias", "max_completion_tokens", "decoder", "top_logprobs", "suffix", "inputs"} <= names


@pytest.fixture(scope="module")
def small(tiny, tokenizer):
    """A server whose answers are short, whatever is asked for."""
    with running(tiny, tokenizer, max_positions=120, timeout=20.0, max_n=2) as server:
        yield server


@pytest.mark.parametrize("path", PATHS)
def test_requests_made_from_the_schema_have_declared_answers(small, path):
    from hypothesis import HealthCheck, settings

    schema = schemathesis.openapi.from_url(f"{small.url}/openapi.json").include(path=path)

    for operation in schema.get_all_operations():
        method = operation.ok()

        @settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
        @_given(method)
        def one(case):
            response = case.call()
            assert response.status_code < 500, response.text
            case.validate_response(response, checks=CHECKS)

        one()


def _given(operation):
    from hypothesis import given

    return given(case=operation.as_strategy())


def test_the_first_fault_of_a_body_is_told_by_its_name():
    error = explain([{"type": "extra_forbidden", "loc": ("body", "temprature"), "msg": ""}])
    assert (error.param, error.code) == ("temprature", "unknown_parameter")
    assert "did you mean temperature?" in error.message
    assert ServeConfig().served_name == "default"


def test_every_field_of_a_request_is_a_parameter():
    """Those of OpenAI's interface go by its names: stop, max_tokens, and top_logprobs."""
    names = {field.name for field in fields(Request)}
    assert names - set(Diffusion.model_fields) == {"stop", "max_tokens", "top_logprobs"}
    given = {"decoder": "conv", "rate": 3.0, "reuse": "dual", "refresh": 5, "margin": 2, "begin": "a"}
    schema = Diffusion.model_json_schema()["properties"]
    for field in fields(Request):
        if field.name not in Diffusion.model_fields:
            continue
        kind, _ = schema[field.name]["anyOf"]
        shown = {"ge": kind.get("minimum"), "le": kind.get("maximum"), "choices": kind.get("enum")}
        for name, value in shown.items():
            wanted = field.metadata.get(name)
            assert value == (list(wanted) if name == "choices" and wanted else wanted), field.name
        assert len(schema[field.name]["description"]) > 20
    assert (schema["rate"]["anyOf"][0]["minimum"], schema["drafts"]["anyOf"][0]["maximum"]) == (1, 16)
    request = Sampling(**given, temperature=0.5, kernel_size=9).request(max_tokens=7)
    assert request == Request(**given, max_tokens=7, options={"temperature": 0.5, "kernel_size": 9})
