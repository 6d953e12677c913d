"""The OpenAPI document: valid, complete, fit for generated clients, and true."""

from pathlib import Path
from typing import Any

import pytest
from openapi_spec_validator import validate
from support.command import run
from support.service import Service


@pytest.fixture(scope="module")
def document(service: Service) -> dict[str, Any]:
    return service.http.get("/openapi.json").json()


def operations(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What the document says about each path's one method."""
    return {path: next(iter(item.values())) for path, item in document["paths"].items()}


def test_the_document_is_valid(document: dict[str, Any]) -> None:
    validate(document)


@pytest.mark.parametrize(
    ("path", "statuses"),
    [
        ("/auth/register", {"201", "400", "409", "413", "422", "503"}),
        ("/auth/login", {"200", "400", "401", "413", "422", "503"}),
        ("/auth/me", {"200", "400", "401", "413", "503"}),
    ],
)
def test_every_status_is_documented(
    document: dict[str, Any], path: str, statuses: set[str]
) -> None:
    operation = operations(document)[path]
    assert set(operation["responses"]) == statuses
    assert operation["operationId"] == path.removeprefix("/auth/")
    for status in statuses - {"200", "201", "413", "422"}:
        content = operation["responses"][status]["content"]["application/json"]
        assert content["schema"] == {"$ref": "#/components/schemas/ErrorOut"}


def test_only_me_asks_for_a_token(document: dict[str, Any]) -> None:
    (scheme,) = document["components"]["securitySchemes"].values()
    assert (scheme["type"], scheme["scheme"]) == ("http", "bearer")
    for path, operation in operations(document).items():
        assert bool(operation.get("security")) == (path == "/auth/me")


@pytest.mark.parametrize("model", ["UserOut", "Token", "ErrorOut"])
def test_every_field_of_an_answer_is_required(
    document: dict[str, Any], model: str
) -> None:
    """A field with a default would be optional in generated clients."""
    schema = document["components"]["schemas"][model]
    assert set(schema["required"]) == set(schema["properties"])


def test_the_examples_are_accepted(service: Service, document: dict[str, Any]) -> None:
    for path, status in (("/auth/register", 201), ("/auth/login", 200)):
        content = operations(document)[path]["requestBody"]["content"]
        name = content["application/json"]["schema"]["$ref"].rpartition("/")[2]
        fields = document["components"]["schemas"][name]["properties"]
        body = {field: fields[field]["examples"][0] for field in fields}
        assert service.http.post(path, json=body).status_code == status


def test_schemathesis_finds_nothing(service: Service, tmp_path: Path) -> None:
    found = run(
        *("schemathesis", "run", f"{service.url}/openapi.json", "--no-color"),
        *("--max-examples=25", "--seed=1", "--generation-database=none"),
        "--checks=not_a_server_error,status_code_conformance,"
        "content_type_conformance,response_schema_conformance",
        f"--header=Authorization: Bearer {service.account().token}",
        folder=tmp_path,
    )
    assert found.returncode == 0, found.stdout + found.stderr
