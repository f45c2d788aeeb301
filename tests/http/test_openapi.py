"""Rules that the whole OpenAPI document keeps, so that new endpoints keep them too."""

import json
import re

import pytest

from api.app import create_app
from darkroom.event_types import EventType
from darkroom.settings import Settings

TAGS = [
    *("jobs", "batches", "results", "events", "webhooks", "models", "queue", "admin", "health"),
]
METHODS = {"get", "post", "put", "patch", "delete", "head", "options"}


@pytest.fixture(scope="module")
def document():
    app = create_app(Settings())
    app.state.deps.snapshot_cache.close()
    app.state.deps.group_committer.close()
    app.state.deps.notifier.close()
    return app.openapi()


@pytest.fixture(scope="module")
def operations(document):
    return {
        f"{method.upper()} {path}": operation
        for path, methods in (document["paths"] | document["webhooks"]).items()
        for method, operation in methods.items()
    }


def test_operation_ids_are_unique_and_camel_case_without_the_path(operations):
    ids = [operation["operationId"] for operation in operations.values()]

    assert len(set(ids)) == len(ids)
    for each in ids:
        assert re.fullmatch(r"[a-z]+([A-Z][a-z]+)*", each), each
        assert not re.search(r"V1|Get$|Post$|Delete$", each), each
        assert not each.startswith("show"), each


def test_every_operation_has_one_tag_of_the_list_a_summary_and_a_description(operations, document):
    assert [tag["name"] for tag in document["tags"]] == TAGS
    assert all(tag["description"] for tag in document["tags"])
    for name, operation in operations.items():
        [tag] = operation["tags"]
        assert tag in TAGS, name
        assert operation["summary"], name
        assert operation["description"].endswith("."), name


def test_schemas_are_named_for_what_they_are(document):
    for name in document["components"]["schemas"]:
        assert re.fullmatch(r"([A-Z][a-z]+)+", name), name
        assert not re.search(r"View|^Told|Input_|Output_|Page", name), name


def test_every_public_field_and_parameter_is_described(document, operations):
    missing = [
        f"{name}.{field}"
        for name, schema in document["components"]["schemas"].items()
        for field, about in schema.get("properties", {}).items()
        if not ({"description", "$ref", "const"} & about.keys())
    ]
    missing += [
        f"{name} {parameter['name']}"
        for name, operation in operations.items()
        for parameter in operation.get("parameters", [])
        if not parameter.get("description")
    ]
    assert missing == []


def test_every_reference_leads_to_a_schema_and_every_schema_is_used(document):
    names = {f"#/components/schemas/{name}" for name in document["components"]["schemas"]}
    used = set(re.findall(r'"\$ref": "([^"]+)"', json.dumps(document)))

    assert used <= names
    unused = names - used
    assert unused <= {"#/components/schemas/Event"}  # the data of streamed events


def test_it_is_openapi_3_1_without_words_of_later_versions(document):
    assert document["openapi"].startswith("3.1")
    assert document["info"]["license"] == {"name": "Apache 2.0", "identifier": "Apache-2.0"}
    assert '"itemSchema"' not in json.dumps(document)


def test_only_probes_metrics_and_webhooks_need_no_key(operations):
    keyless = {name for name, operation in operations.items() if operation["security"] == []}
    webhooks = {f"POST {kind.value}" for kind in EventType}

    assert keyless == {"GET /healthz", "GET /readyz", "GET /metrics"} | webhooks


def test_repeated_and_conditional_requests_have_their_documented_success(operations):
    for name in ("POST /v1/jobs", "POST /v1/batches"):
        assert {"200", "202"} <= operations[name]["responses"].keys()
    assert "304" in operations["GET /v1/jobs/{job_id}"]["responses"]


def test_every_webhook_has_its_body_and_headers(document):
    assert document["webhooks"].keys() == {kind.value for kind in EventType}
    failed = document["webhooks"]["job.failed"]["post"]
    assert {each["name"] for each in failed["parameters"]} == {
        "webhook-id",
        "webhook-timestamp",
        "webhook-signature",
    }
    assert failed["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith(
        "/JobMessage"
    )


def test_every_route_is_in_the_document_and_problems_have_one_shape(document):
    assert {
        "/v1/jobs",
        "/v1/jobs/{job_id}",
        "/v1/jobs/{job_id}/cancel",
        "/v1/jobs/{job_id}/events",
        "/v1/jobs/{job_id}/image",
        "/v1/jobs/{job_id}/retry",
        "/v1/batches",
        "/v1/batches/{batch_id}",
        "/v1/batches/{batch_id}/events",
        "/v1/deliveries",
        "/v1/deliveries/replay",
        "/v1/deliveries/{delivery_id}",
        "/v1/deliveries/{delivery_id}/replay",
        "/v1/batches/{batch_id}/cancel",
        "/v1/batches/{batch_id}/errors.csv",
        "/v1/batches/{batch_id}/images.zip",
        "/v1/batches/{batch_id}/manifest.csv",
        "/v1/batches/{batch_id}/manifest.jsonl",
        "/v1/batches/{batch_id}/pause",
        "/v1/batches/{batch_id}/resume",
        "/v1/batches/{batch_id}/retry",
        "/v1/models",
        "/v1/queue",
        "/v1/admin/drain",
        "/v1/admin/failed",
        "/v1/admin/failed/{job_id}/retry",
        "/v1/admin/pause",
        "/v1/admin/purge",
        "/v1/admin/resume",
        "/metrics",
        "/v1/webhook-secret",
        "/v1/webhook-secret/rotate",
        "/v1/webhooks",
        "/v1/webhooks/{webhook_id}",
        "/v1/webhooks/{webhook_id}/deliveries",
        "/v1/webhooks/{webhook_id}/enable",
        "/v1/webhooks/{webhook_id}/replay",
        "/v1/webhooks/{webhook_id}/rotate-secret",
        "/v1/webhooks/{webhook_id}/test",
        "/healthz",
        "/readyz",
    } == set(document["paths"])
    assert "code" in document["components"]["schemas"]["Problem"]["properties"]
    assert "HTTPValidationError" not in json.dumps(document)
