"""What the client and `darkroom version` import: nothing that only a server needs."""

import subprocess
import sys

import pytest

SERVER = {"boto3", "celery", "psycopg", "pydantic_settings", "redis", "sqlalchemy"}
#: Needed by some commands only; `darkroom version` starts in 0.3 s without them.
HEAVY = {"PIL", "cryptography", "httpx2", "rich.progress", "darkroom.client"}


@pytest.mark.parametrize(
    ("code", "left_out"),
    [
        ("from darkroom.cli import app; app(['version'], standalone_mode=False)", SERVER | HEAVY),
        ("from darkroom.client import Client", SERVER | {"pydantic", "typer", "rich"}),
        ("import darkroom.client.download", SERVER | {"pydantic"}),
    ],
)
def test_nothing_of_the_server_is_imported(code, left_out):
    listed = "import sys; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{listed}"], capture_output=True, text=True, check=True
    )
    assert not left_out & set(done.stdout.split())
