"""Real servers for the tests, started once per test process."""

import secrets
import signal
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import boto3
import psycopg
import pytest
from pydantic import SecretStr

from darkroom.local import process as child_process
from darkroom.local import servers
from darkroom.local.data_dir import private_dir
from darkroom.local.ports import free_port
from darkroom.local.postgres import postgres
from darkroom.local.process import RunningProcess
from darkroom.settings import Settings
from darkroom.storage.images import S3Store


@dataclass(eq=False)  # two are never the same, whatever they hold
class ServerProcess:
    """A server that a test may freeze, kill or start again; its address never changes."""

    running: RunningProcess

    @property
    def url(self) -> str:
        return self.running.url

    def freeze(self) -> None:
        self.running.send(signal.SIGSTOP)

    def thaw(self) -> None:
        self.running.send(signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL to the server and to all its processes."""
        child_process.note_descendants(self.running)
        self.running.process.kill()
        for process in self.running.descendants.values():
            child_process.kill(process)
        self.running.process.wait()

    def restart(self) -> None:
        """Stop what still runs, start again, return when it answers."""
        self.running = child_process.restart(self.running)

    def recover(self) -> None:
        """Thaw or restart it, so that it answers again."""
        if self.running.process.poll() is None:
            self.thaw()
        else:
            self.restart()


@dataclass(frozen=True)
class S3Settings:
    endpoint_url: str
    access_key_id: str
    secret_access_key: str
    bucket: str


@pytest.fixture(scope="session")
def server_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This process's servers keep their files and logs here; pytest removes it three runs later."""
    folder = tmp_path_factory.mktemp("servers")
    private_dir(folder)
    return folder


def _server(spec: child_process.ProcessSpec) -> Iterator[ServerProcess]:
    server = ServerProcess(child_process.launch(spec))
    try:
        child_process.wait_ready(server.running)
        yield server
    finally:
        child_process.stop(server.running)


@pytest.fixture(scope="session")
def _postgres(server_dir: Path, pytestconfig: pytest.Config) -> Iterator[ServerProcess]:
    folder = server_dir / "postgres"
    password = secrets.token_urlsafe(16)
    log = server_dir / "postgres.log"
    spec = postgres(folder, port=free_port(), password=password, log=log)
    if not pytestconfig.getoption("--chaos"):
        # Waiting for the disk saves rows from a loss of power, which no test can show: SIGKILL
        # leaves what was written to the kernel. And every database that is dropped waits long.
        spec = replace(spec, argv=(*spec.argv, "-c", "fsync=off"))
    yield from _server(spec)


@pytest.fixture
def postgres_server(_postgres: ServerProcess) -> Iterator[ServerProcess]:
    """`.url` is an administrator's; it answers again after the test, whatever was done to it."""
    yield _postgres
    _postgres.recover()


@pytest.fixture(scope="session")
def migrated_template(_postgres: ServerProcess) -> str:
    """Name of a database at the newest migration, to be copied: migrating takes longer."""
    from darkroom.db.connection import migrate

    name = "template_darkroom"
    with psycopg.connect(_postgres.url, autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {name}")
    migrate(_in_database(_postgres.url, name))
    return name


@pytest.fixture(scope="session")
def _shared_database(_postgres: ServerProcess, migrated_template: str) -> str:
    """URL of the database that the tests of this process use one after the other."""
    name = "shared_darkroom"
    with psycopg.connect(_postgres.url, autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {name} TEMPLATE {migrated_template}")
    return _in_database(_postgres.url, name)


@pytest.fixture
def database_url(_shared_database: str) -> str:
    """A migrated database without rows. Emptying it takes 20 ms, a copy of the template 130 ms."""
    with psycopg.connect(_shared_database, autocommit=True) as connection:
        connection.execute(_DISCONNECT_OTHERS)
        connection.execute(_RESET)
    return _shared_database


_DISCONNECT_OTHERS = """
SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid()
"""

#: the rows that the migrations insert, all others gone, identities from 1 again
_RESET = """
DO $$
DECLARE
  name text;
BEGIN
  EXECUTE format('ALTER DATABASE %I RESET ALL', current_database());
  SET LOCAL session_replication_role = replica;  -- no trigger, no foreign key
  FOR name IN SELECT tablename FROM pg_tables
    WHERE schemaname = 'public' AND tablename <> 'alembic_version'
  LOOP
    EXECUTE format('DELETE FROM %I', name);
  END LOOP;
  FOR name IN SELECT sequencename FROM pg_sequences WHERE schemaname = 'public' LOOP
    EXECUTE format('ALTER SEQUENCE %I RESTART', name);
  END LOOP;
  INSERT INTO tenant (id, name) VALUES ('ten_default', 'default');
  INSERT INTO priority_class (priority) VALUES (0), (1), (2);
  INSERT INTO queue_control (id) VALUES (1);
END $$
"""


@pytest.fixture
def empty_database_url(_postgres: ServerProcess) -> Iterator[str]:
    """A database without a table, for tests of the migrations themselves."""
    name = f"test_{uuid.uuid4().hex}"
    with psycopg.connect(_postgres.url, autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {name}")
    yield _in_database(_postgres.url, name)
    with psycopg.connect(_postgres.url, autocommit=True) as admin:
        admin.execute(f"DROP DATABASE {name} WITH (FORCE)")


def _in_database(url: str, name: str) -> str:
    return f"{url.rpartition('/')[0]}/{name}"


@pytest.fixture(scope="session")
def _redis(server_dir: Path) -> Iterator[ServerProcess]:
    password = secrets.token_urlsafe(16)
    folder, log = server_dir / "redis", server_dir / "redis.log"
    yield from _server(servers.redis(folder, port=free_port(), password=password, log=log))


@pytest.fixture
def redis_server(_redis: ServerProcess) -> Iterator[ServerProcess]:
    """To freeze, kill and restart; it answers again after the test."""
    yield _redis
    _redis.recover()


@pytest.fixture
def redis_url(redis_server: ServerProcess) -> str:
    """Of an empty Redis."""
    from redis import Redis

    with Redis.from_url(redis_server.url) as client:
        client.flushall()
    return redis_server.url


@pytest.fixture(scope="session")
def _s3(server_dir: Path) -> Iterator[tuple[ServerProcess, S3Settings]]:
    key_id, key = "darkroom-tests", secrets.token_urlsafe(16)
    spec = servers.s3(
        server_dir / "objects",
        port=free_port(),
        key_id=key_id,
        secret_key=key,
        bucket="darkroom",
        log=server_dir / "s3.log",
    )
    for server in _server(spec):
        yield server, S3Settings(server.url, key_id, key, "darkroom")


@pytest.fixture
def s3_server(_s3: tuple[ServerProcess, S3Settings]) -> Iterator[ServerProcess]:
    """To freeze, kill and restart; it answers again after the test."""
    server, _ = _s3
    yield server
    server.recover()


@pytest.fixture
def s3_settings(_s3: tuple[ServerProcess, S3Settings]) -> S3Settings:
    """Endpoint, keys and an empty bucket of the test's own."""
    _, shared = _s3
    bucket = f"test-{uuid.uuid4().hex}"
    # Through the protocol: rclone would find a folder made behind its back only minutes later.
    boto3.client(
        "s3",
        endpoint_url=shared.endpoint_url,
        aws_access_key_id=shared.access_key_id,
        aws_secret_access_key=shared.secret_access_key,
    ).create_bucket(Bucket=bucket)
    return S3Settings(shared.endpoint_url, shared.access_key_id, shared.secret_access_key, bucket)


@pytest.fixture
def s3_objects(s3_settings: S3Settings) -> Callable[[], list[str]]:
    """Return a function that lists the keys of the bucket."""
    client = boto3.client(
        "s3",
        endpoint_url=s3_settings.endpoint_url,
        aws_access_key_id=s3_settings.access_key_id,
        aws_secret_access_key=s3_settings.secret_access_key,
    )

    def keys() -> list[str]:
        found = client.list_objects_v2(Bucket=s3_settings.bucket).get("Contents", [])
        return [entry["Key"] for entry in found]

    return keys


def store_of(s3: S3Settings, **changed: object) -> S3Store:
    """The store that these settings lead to."""
    settings = {
        "s3_endpoint_url": s3.endpoint_url,
        "s3_access_key_id": SecretStr(s3.access_key_id),
        "s3_secret_access_key": SecretStr(s3.secret_access_key),
        "s3_bucket": s3.bucket,
    }
    return S3Store(Settings(**settings | changed))
