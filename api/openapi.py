"""The OpenAPI document, made true: FastAPI's own error shape is not the one we answer with."""

from typing import Any, Final

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from api.errors import PROBLEM_JSON, Problem

_NOT_OURS: Final = ("HTTPValidationError", "ValidationError")
_PROBLEM: Final = {
    "description": "A problem (RFC 9457)",
    "content": {PROBLEM_JSON: {"schema": {"$ref": "#/components/schemas/Problem"}}},
}


def openapi(app: FastAPI) -> dict[str, Any]:
    """The app's document, built once: every operation may answer with a Problem."""
    if app.openapi_schema is None:
        document = get_openapi(
            title=app.title,
            version=app.version,
            description=app.description,
            routes=app.routes,
            webhooks=app.webhooks.routes,
        )
        schemas = document["components"]["schemas"]
        for name in _NOT_OURS:
            schemas.pop(name, None)
        problem = Problem.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas |= problem.pop("$defs") | {"Problem": problem}
        for path in document["paths"].values():
            for operation in path.values():
                operation["responses"]["default"] = _PROBLEM
                _mend(operation["responses"])
        for told in document["webhooks"].values():
            told["post"]["responses"] = {"2XX": {"description": "Accepted; all else is a failure"}}
        app.openapi_schema = document
    return app.openapi_schema


def _mend(responses: dict[str, Any]) -> None:
    """Where FastAPI announces its own 422, ours comes."""
    found = responses.get("422", {}).get("content", {})
    if "application/json" in found:
        responses["422"] = _PROBLEM | {"description": "Unprocessable Content"}
