"""The API schema, and the server tested against it by schemathesis."""

import shutil

import httpx
import numpy as np
import pytest
import schemathesis
from conftest import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.specs.openapi.checks import positive_data_acceptance
from serving import server

from retrieval_tip import Index
from retrieval_tip.server.app import create_app
from retrieval_tip.server.service import Service

TOKEN = "open sesame"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny index of features with two values, as in the examples of the schema."""
    folder = tmp_path_factory.mktemp("tiny") / "tiny"
    keys = [[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [0.8, -0.6]]
    Index.from_features(np.array(keys), ["cat", "cat", "dog", "dog"], ["cat", "dog"]).save(folder)
    return folder


@pytest.fixture(scope="module")
def address(tiny, warm_path):
    spare = shutil.copytree(tiny, tiny.with_name("spare"))
    with server(tiny, spare, token=TOKEN, path=warm_path) as (address, _):
        yield address


@pytest.fixture(scope="module")
def api(address):
    return schemathesis.openapi.from_url(f"{address}/openapi.json")


SCHEMA = create_app(Service({})).openapi()
OPERATIONS = [(path, method) for path, methods in SCHEMA["paths"].items() for method in methods]


@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_no_request_leads_to_an_internal_server_error(api, path, method):
    """Statuses, content types and bodies also match the schema."""

    @given(case=api[path][method].as_strategy(), here=st.booleans(), authorised=st.booleans())
    @settings(
        max_examples=examples(60),
        deadline=None,
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    def ask(case, here, authorised):
        if here and "name" in case.path_parameters:
            taken_away = path == "/v1/indexes/{name}" and method in ("patch", "delete")
            case.path_parameters["name"] = "spare" if taken_away else "tiny"
        answer = case.call(headers={"Authorization": f"Bearer {TOKEN}"} if authorised else {})
        assert answer.status_code < 500
        case.validate_response(
            answer, excluded_checks=[positive_data_acceptance]
        )  # a schema cannot require norm 1

    ask()


def test_the_schema_describes_every_operation_body_and_result():
    """The classes that check bodies also describe them."""
    assert {path for path, _ in OPERATIONS} >= {
        "/v1/classify",
        "/v1/indexes/{name}/keys",
        "/healthz",
        "/metrics",
    }
    assert all(SCHEMA["paths"][path][method]["description"] for path, method in OPERATIONS)
    for path in ("/v1/classify", "/v1/indexes/{name}/keys"):
        content = SCHEMA["paths"][path]["post"]["requestBody"]["content"]
        binary = {"application/octet-stream"} if path == "/v1/classify" else set()
        assert set(content) == {"multipart/form-data", "application/json"} | binary
    found = SCHEMA["paths"]["/v1/classify"]["post"]["responses"]["200"]["content"][
        "application/json"
    ]["schema"]
    result = SCHEMA["components"]["schemas"][found["$ref"].rpartition("/")[2]]["properties"][
        "results"
    ]["items"]
    fields = {"input", "label", "probability", "neighbours", "opposing", "feature", "similar"}
    assert result["properties"].keys() >= fields


def test_examples_in_the_schema_can_be_sent(address):
    content = SCHEMA["paths"]["/v1/classify"]["post"]["requestBody"]["content"]
    answer = httpx.post(
        f"{address}/v1/classify?index=tiny", json=content["application/json"]["schema"]["example"]
    )
    assert (answer.status_code, answer.json()["results"][0]["input"]) == (200, "camera-3/0001")
    content = SCHEMA["paths"]["/v1/indexes/{name}/keys"]["post"]["requestBody"]["content"]
    sent = {
        "json": content["application/json"]["schema"]["example"],
        "headers": {"Authorization": f"Bearer {TOKEN}"},
    }
    answer = httpx.post(f"{address}/v1/indexes/tiny/keys", **sent)
    assert (answer.status_code, answer.json()["classes"]) == (201, [])
