"""The OpenAPI document: FastAPI's, with our problems, tags and operation ids."""

from typing import Any, Final

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute

from api.errors import PROBLEM_JSON, Problem
from api.schemas.events import Event

TAGS: Final[list[dict[str, Any]]] = [
    {"name": "jobs", "description": "Submit one prompt and fetch its image."},
    {"name": "batches", "description": "Submit a file of prompts and control its jobs together."},
    {"name": "results", "description": "Fetch the manifest, images and rejected rows of a batch."},
    {"name": "events", "description": "Follow a job or a batch as server-sent events."},
    {"name": "webhooks", "description": "Register endpoints, inspect and replay deliveries."},
    {"name": "models", "description": "List models with their defaults and limits."},
    {"name": "queue", "description": "Read the length and throughput of the queue."},
    {"name": "admin", "description": "Control the installation; needs the scope `admin`."},
    {"name": "health", "description": "Probes and metrics; need no key."},
]
_LICENSE: Final = {"name": "Apache 2.0", "identifier": "Apache-2.0"}
_UNUSED: Final = ("HTTPValidationError", "ValidationError")
_PROBLEM: Final = {
    "description": "A problem (RFC 9457)",
    "content": {PROBLEM_JSON: {"schema": {"$ref": "#/components/schemas/Problem"}}},
}


def operation_id(route: APIRoute) -> str:
    """Return the handler's name in camelCase: `create_job` is `createJob`."""
    first, *rest = route.name.split("_")
    return first + "".join(word.capitalize() for word in rest)


def openapi(app: FastAPI) -> dict[str, Any]:
    """Return the app's document, built once. Any operation may answer with a Problem."""
    if app.openapi_schema is None:
        document = get_openapi(
            title=app.title,
            version=app.version,
            description=app.description,
            license_info=_LICENSE,
            tags=app.openapi_tags,
            routes=app.routes,
            webhooks=app.webhooks.routes,
        )
        _add_schemas(document["components"]["schemas"])
        for path in document["paths"].values():
            for operation in path.values():
                _correct(operation)
        for path in document["webhooks"].values():
            path["post"]["security"] = []
            path["post"]["responses"] = {
                "2XX": {"description": "Accepted; any other status is a failure"}
            }
        app.openapi_schema = document
    return app.openapi_schema


def _add_schemas(schemas: dict[str, Any]) -> None:
    """Add what no route declares: problems, and the data of streamed events."""
    for name in _UNUSED:
        schemas.pop(name, None)
    for model in (Problem, Event):
        schema = model.model_json_schema(
            mode="serialization", ref_template="#/components/schemas/{model}"
        )
        schemas |= schema.pop("$defs") | {model.__name__: schema}


def _correct(operation: dict[str, Any]) -> None:
    """Declare our problems, and what OpenAPI 3.1 has no other word for."""
    operation.setdefault("security", [])
    responses = operation["responses"]
    responses["default"] = _PROBLEM
    if "application/json" in responses.get("422", {}).get("content", {}):
        responses["422"] = _PROBLEM | {"description": "Unprocessable Content"}
    for response in responses.values():
        stream = response.get("content", {}).get("text/event-stream")
        if stream is not None:  # FastAPI writes the `itemSchema` of OpenAPI 3.2
            stream.clear()
            stream["schema"] = {"type": "string"}
