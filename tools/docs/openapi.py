"""Reference pages of the HTTP API, from its OpenAPI document: one for each tag, and the schemas."""

from collections.abc import Iterator, Mapping
from typing import Any, Final

from api.app import create_app
from darkroom.settings import Settings

Json = dict[str, Any]

_FOLDER: Final = "reference/http"
_METHODS: Final = ("get", "post", "put", "patch", "delete")
_LIMITS: Final = {
    "minimum": "≥",
    "exclusiveMinimum": ">",
    "maximum": "≤",
    "exclusiveMaximum": "<",
    "minLength": "length ≥",
    "maxLength": "length ≤",
    "minItems": "items ≥",
    "maxItems": "items ≤",
}


def document() -> Json:
    """Return the document that a server with default settings has at /openapi.json."""
    return create_app(Settings.model_construct()).openapi()


def pages(document: Json) -> dict[str, str]:
    """Return the text of each page by its path."""
    tagged: dict[str, list[str]] = {}
    for path, method, operation in _operations(document["paths"]):
        tag = operation["tags"][0]
        tagged.setdefault(tag, [f"# {tag.capitalize()}\n"]).append(
            _operation(path, method, operation)
        )
    return {
        **{f"{_FOLDER}/{tag}.md": "\n".join(parts) for tag, parts in tagged.items()},
        f"{_FOLDER}/webhook-events.md": _webhooks(document["webhooks"]),
        f"{_FOLDER}/schemas.md": _schemas(document["components"]["schemas"]),
    }


def _operations(paths: Json) -> Iterator[tuple[str, str, Json]]:
    for path, item in paths.items():
        for method in _METHODS:
            if method in item:
                yield path, method, item[method]


def index(document: Json) -> str:
    """Return a table of all operations, for the page above the others."""
    rows = [
        f"| [`{method.upper()} {path}`](http/{operation['tags'][0]}.md#{operation['operationId']}) "
        f"| {_line(operation.get('description') or operation['summary'])} |"
        for path, method, operation in _operations(document["paths"])
    ]
    return "\n".join(["| operation | effect |", "|---|---|", *rows])


def _operation(path: str, method: str, operation: Json) -> str:
    parts = [
        f"## {operation['summary']} {{ #{operation['operationId']} }}",
        f"`{method.upper()} {path}`",
        operation.get("description", ""),
        _parameters(operation.get("parameters", [])),
        _body(operation.get("requestBody", {}).get("content", {})),
        _responses(operation["responses"]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _parameters(parameters: list[Json]) -> str:
    if not parameters:
        return ""
    rows = [
        f"| `{each['name']}`{' (required)' if each.get('required') else ''} | {each['in']} "
        f"| {_type(each['schema'])} | {_line(_description(each))} |"
        for each in parameters
    ]
    return "\n".join(["| parameter | in | type | |", "|---|---|---|---|", *rows])


def _body(content: Json) -> str:
    lines = [f"- `{kind}`: {_type(body.get('schema', {}))}" for kind, body in content.items()]
    return "\n".join(["**Request body**\n", *lines]) if lines else ""


def _responses(responses: Json) -> str:
    rows = [
        f"| {status} | {_contents(response)} | {_line(response.get('description', ''))} |"
        for status, response in responses.items()
        if status != "default"
    ]
    return "\n".join(["| status | body | |", "|---|---|---|", *rows])


def _contents(response: Json) -> str:
    found = response.get("content", {}).items()
    return "<br>".join(
        _type(body["schema"]) if body.get("schema") else f"`{kind}`" for kind, body in found
    )


def _webhooks(webhooks: Json) -> str:
    parts = ["# Webhook events\n\nThe bodies that Darkroom POSTs to your endpoints."]
    for name, item in webhooks.items():
        operation = item["post"]
        content = operation["requestBody"]["content"]
        parts += [f"## {name}", operation.get("description", ""), _body(content)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _schemas(schemas: Json) -> str:
    parts = ["# Schemas"]
    for name, schema in sorted(schemas.items()):
        parts += [f"## {name} {{ #{name} }}", schema.get("description", ""), _fields(schema)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _fields(schema: Json) -> str:
    if "properties" not in schema:
        return _type(schema)
    required = schema.get("required", ())
    rows = [
        f"| `{name}`{' (required)' if name in required else ''} | {_type(field)} "
        f"| {_line(_description(field))} |"
        for name, field in schema["properties"].items()
    ]
    return "\n".join(["| field | type | |", "|---|---|---|", *rows])


def _description(field: Json) -> str:
    text = field.get("description", field.get("schema", {}).get("description", ""))
    default = field.get("default", field.get("schema", {}).get("default"))
    return text if default is None else f"{text} Default: `{default}`.".strip()


def _type(schema: Mapping[str, Any]) -> str:
    """Return a schema as a phrase, with links to the schemas that it names."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](schemas.md#{name})"
    if "const" in schema:
        return f"`{schema['const']}`"
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    for several in ("anyOf", "oneOf", "allOf"):
        if several in schema:
            return " or ".join(dict.fromkeys(_type(each) for each in schema[several]))
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}))}"
    return _plain(schema)


def _plain(schema: Mapping[str, Any]) -> str:
    kind = schema.get("type", "any")
    name = f"{kind} ({schema['format']})" if "format" in schema else str(kind)
    limits = [f"{sign} {schema[limit]:g}" for limit, sign in _LIMITS.items() if limit in schema]
    return ", ".join([name, *limits])


def _line(text: str) -> str:
    """Return the text as one cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")
