"""The image store, on a real S3 server."""

import httpx2
import pytest
from pydantic import SecretStr

from darkroom.errors import StorageUnavailable
from tests.support.servers import store_of


def test_a_stored_object_is_read_through_a_presigned_url(s3_settings):
    store = store_of(s3_settings)
    store.put("a/b/1.png", b"image", "image/png")
    answer = httpx2.get(store.presign("a/b/1.png", ttl_s=60))

    assert (answer.status_code, answer.content) == (200, b"image")
    assert answer.headers["content-type"] == "image/png"


def test_a_url_opens_nothing_but_its_own_object(s3_settings):
    store = store_of(s3_settings)
    store.put("a/1.png", b"mine", "image/png")
    store.put("b/1.png", b"theirs", "image/png")
    url = store.presign("a/1.png", ttl_s=60)

    assert httpx2.get(url.replace("/a/1.png", "/b/1.png")).status_code in {400, 403}
    assert httpx2.get(url.partition("?")[0]).status_code in {400, 403}


def test_presigned_urls_have_the_public_address(s3_settings):
    store = store_of(s3_settings, s3_public_url="https://images.example")
    assert store.presign("a/1.png", ttl_s=60).startswith("https://images.example/")


def test_a_wrong_key_or_bucket_is_an_error(s3_settings):
    for wrong in ({"s3_secret_access_key": SecretStr("wrong")}, {"s3_bucket": "nowhere"}):
        store = store_of(s3_settings, **wrong)
        with pytest.raises(StorageUnavailable):
            store.check()
        with pytest.raises(StorageUnavailable):
            store.put("a", b"x", "image/png")


def test_an_outage_of_the_store_is_reported_and_ends(s3_settings, s3_server):
    store = store_of(s3_settings)
    store.check()
    s3_server.kill()
    with pytest.raises(StorageUnavailable):
        store.put("a/1.png", b"x", "image/png")
    s3_server.restart()
    store.put("a/1.png", b"x", "image/png")
