"""The processes that rows break: an API and workers of one source tree, on the tests' servers."""

import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import psutil
import psycopg
from sqlalchemy import text

from darkroom.accounts import api_keys
from darkroom.db.connection import Sessions, open_sessions
from darkroom.db.tables import Tenant
from darkroom.event_types import JOB_ENDS
from darkroom.local import darkroom_processes
from darkroom.local import process as child_process
from darkroom.local.ports import free_port
from darkroom.settings import HOME
from darkroom.status import Scope
from darkroom.webhooks import endpoints as webhook_endpoints
from darkroom.webhooks.secret_box import SecretBox
from tests.chaos import replica
from tests.support.servers import S3Settings, ServerProcess
from tests.support.webhook_receiver import Receiver, receiving

LEASE_S = 4
MAINTENANCE_INTERVAL_S = 0.5
MICROBATCH_TIMEOUT_S = 5
GONE_WITHIN_S = 60
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class BackingServers:
    """Servers behind the system."""

    postgres: ServerProcess
    redis: ServerProcess
    s3: ServerProcess
    s3_settings: S3Settings
    objects: Path
    template: str  #: a migrated database, to be copied

    @property
    def servers(self) -> tuple[ServerProcess, ...]:
        return self.postgres, self.redis, self.s3


class DatabaseView:
    """Queries against the system's database, and waiting for conditions."""

    sessions: Sessions

    def supervise(self) -> None:
        """Restart what has died, as a supervisor does."""

    def wait_until(self, holds: Callable[[], bool], *, within_s: float = 60) -> bool:
        """Supervise until the condition holds. Return False when the time is up."""
        deadline = time.monotonic() + within_s
        while not holds():
            if time.monotonic() > deadline:
                return False
            self.supervise()
            time.sleep(0.02)
        return True

    def value(self, statement: str, **values: object) -> object:
        """Return the first value that a statement finds."""
        with self.sessions.begin() as session:
            return session.scalar(text(statement), values)

    def rows(self, statement: str, **values: object) -> list:
        with self.sessions.begin() as session:
            return list(session.execute(text(statement), values))

    def now(self) -> datetime:
        """Return the time by the database's clock, as all times of rows are."""
        return self.rows("SELECT clock_timestamp() AS now")[0].now

    def lasting_orphans(self) -> list[str]:
        """Return open leases and transactions that are still there a minute after all is quiet."""
        deadline = time.monotonic() + GONE_WITHIN_S
        while (left := self._find_orphans()) and time.monotonic() < deadline:
            self.supervise()
            time.sleep(0.2)
        return left

    def _find_orphans(self) -> list[str]:
        """Return open dispatches and idle transactions."""
        open_dispatches = self.rows("SELECT id FROM dispatch WHERE status = 'running'")
        forgotten = self.rows(
            "SELECT pid FROM pg_stat_activity WHERE datname = current_database()"
            " AND state LIKE 'idle in transaction%' AND state_change < now() - interval '6 s'"
        )
        return [
            *(f"dispatch {row.id}" for row in open_dispatches),
            *(f"transaction of backend {row.pid}" for row in forgotten),
        ]


class SystemUnderTest(DatabaseView):
    """An API, workers, and what a row adds to them. Only the main thread launches processes."""

    colors_known = True  #: its images are those of `tests.chaos.replica`

    def __init__(
        self,
        backing_servers: BackingServers,
        folder: Path,
        *,
        source: Path = HOME,
        workers: int = 2,
        redis_database: int = 1,  # 0 is the other tests'
    ):
        self.backing_servers, self.folder, self.source = backing_servers, folder, source
        self.redis_url = f"{backing_servers.redis.url.rpartition('/')[0]}/{redis_database}"
        self.database_url = _new_database(backing_servers)
        self.sessions: Sessions = open_sessions(self.database_url, pool_size=2)
        self.tenants, self.keys = _two_tenants(self.sessions)
        self.restarts = 0
        self._kept: list[ServerProcess] = []
        self._workers: list[ServerProcess] = []
        self.port = free_port()
        self.api = self._launch(self._api())
        self.workers = [self.start_worker() for _ in range(workers)]
        self.wait_ready()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def bucket(self) -> Path:
        return self.backing_servers.objects / self.backing_servers.s3_settings.bucket

    def environment(self) -> dict[str, str]:
        s3 = self.backing_servers.s3_settings
        inherited = {name: v for name, v in os.environ.items() if not name.startswith("DARKROOM_")}
        return inherited | {
            "PYTHONPATH": f"{self.source}{os.pathsep}{ROOT}",
            "PYTHONUNBUFFERED": "1",
            "DARKROOM_DATABASE_URL": self.database_url,
            "DARKROOM_REDIS_URL": self.redis_url,
            "DARKROOM_S3_ENDPOINT_URL": s3.endpoint_url,
            "DARKROOM_S3_ACCESS_KEY_ID": s3.access_key_id,
            "DARKROOM_S3_SECRET_ACCESS_KEY": s3.secret_access_key,
            "DARKROOM_S3_BUCKET": s3.bucket,
            "DARKROOM_AUTH": "on",
            "DARKROOM_API_PORT": str(self.port),
            "DARKROOM_LEASE_S": str(LEASE_S),
            "DARKROOM_MAINTENANCE_INTERVAL_S": str(MAINTENANCE_INTERVAL_S),
            "DARKROOM_MICROBATCH_TIMEOUT_S": str(MICROBATCH_TIMEOUT_S),
        }

    def _api(self) -> child_process.ProcessSpec:
        return darkroom_processes.api(
            self.port, env=self.environment(), log=self.folder / "api.log"
        )

    @contextmanager
    def api_with(self, environment: Mapping[str, str]) -> Iterator[None]:
        """For the block, the API is one with these settings, whenever it is started."""
        self._replace_api(environment)
        try:
            yield
        finally:
            self._replace_api({})

    def _replace_api(self, environment: Mapping[str, str]) -> None:
        child_process.stop(self.api.running)
        spec = self._api()
        self.api.running = child_process.launch(replace(spec, env={**spec.env, **environment}))
        self.wait_ready(self.api)

    @contextmanager
    def listening(self) -> Iterator[Receiver]:
        """Receive the finish events of both tenants' jobs during the block."""
        with receiving() as receiver:
            endpoints = self._register(receiver.url())
            sender = self._launch(
                darkroom_processes.sender(
                    env=self.environment() | {"DARKROOM_WEBHOOK_ALLOW_PRIVATE": "1"},
                    ready_file=self.folder / "sender.ready",
                    log=self.folder / "sender.log",
                )
            )
            try:
                self.wait_ready(sender)
                yield receiver
            finally:
                self.stop_worker(sender)
                with self.sessions.begin() as session:
                    for tenant, endpoint in zip(self.tenants, endpoints, strict=True):
                        webhook_endpoints.remove(session, tenant, endpoint)

    def _register(self, url: str) -> list[str]:
        with self.sessions.begin() as session:
            return [
                webhook_endpoints.create(
                    session,
                    tenant,
                    url=url,
                    event_types=set(JOB_ENDS),
                    secret_box=SecretBox(""),
                    max_endpoints=9,
                ).endpoint.id
                for tenant in self.tenants
            ]

    def start_worker(
        self,
        environment: Mapping[str, str] | None = None,
        *,
        keep: bool = True,
        module: str = "tests.chaos.worker",
        within: tuple[str, ...] = (),
    ) -> ServerProcess:
        """A worker, launched. One that is kept is started again whenever it dies.

        `module` is what it runs; `within` a command that runs it somewhere else.
        """
        number = len(self._workers) + 1
        name = f"worker-{number}"
        spec = darkroom_processes.worker(
            number,
            env=self.environment() | dict(environment or {}),
            ready_file=self.folder / f"{name}.ready",
            log=self.folder / f"{name}.log",
        )
        spec = replace(spec, argv=(*within, sys.executable, "-P", "-m", module))
        self._workers.append(self._launch(spec, keep=keep))
        return self._workers[-1]

    def _launch(self, spec: child_process.ProcessSpec, *, keep: bool = True) -> ServerProcess:
        server = ServerProcess(child_process.launch(spec))
        if keep:
            self._kept.append(server)
        return server

    def stop_worker(self, server: ServerProcess) -> None:
        """Ask it to end, and wait for that."""
        self.forget(server)
        child_process.stop(server.running)

    def forget(self, server: ServerProcess) -> None:
        """Whatever becomes of it, it is not started again."""
        if server in self._kept:
            self._kept.remove(server)

    def keep(self, server: ServerProcess) -> None:
        """From now on it is started again when it dies."""
        if server not in self._kept:
            self._kept.append(server)

    def supervise(self) -> None:
        """Restart what has died, as a supervisor does."""
        for server in self._kept:
            if server.running.process.poll() is not None:
                self.restarts += 1
                server.running = child_process.launch(server.running.spec)

    def wait_ready(self, *servers: ServerProcess) -> None:
        """Until these, or all that are kept, are ready."""
        for server in servers or tuple(self._kept):
            ready = self.wait_until(server.running.spec.ready, within_s=90)
            assert ready, child_process.tail(server.running.spec.log)

    def recover(self) -> None:
        """Thaw and restart everything; end what a row added and did not stop."""
        for server in self.backing_servers.servers:
            server.recover()
        for server in self._kept:
            if server.running.process.poll() is None:
                server.thaw()
        self.supervise()
        self.wait_ready()

    @property
    def processes(self) -> list[ServerProcess]:
        """All that are kept: the API, workers, a sender."""
        return list(self._kept)

    def close(self) -> None:
        for server in self._kept:  # all are asked before the first is waited for
            server.running.send(server.running.spec.stop_signal)
        for server in self._kept:
            child_process.stop(server.running)
        self.sessions.kw["bind"].dispose()

    def _find_orphans(self) -> list[str]:
        """And orphans, and halves of objects."""
        return [
            *super()._find_orphans(),
            *(f"process {pid}" for pid in self._orphans()),
            *(str(path) for path in self.backing_servers.objects.rglob("*.partial")),
        ]

    def _orphans(self) -> list[int]:
        """Replicas that outlived their worker. Other runs on this machine have their own."""
        workers = {server.running.process.pid for server in self._workers}
        database = self.database_url.rpartition("/")[2]
        orphans = []
        for process in psutil.process_iter(["cmdline", "ppid", "environ"]):
            url = (process.info["environ"] or {}).get("DARKROOM_DATABASE_URL", "")
            ours = replica.__file__ in (process.info["cmdline"] or []) and url.endswith(database)
            if ours and process.info["ppid"] not in workers:
                orphans.append(process.pid)
        return orphans

    def log_of(self, server: ServerProcess) -> str:
        return server.running.spec.log.read_text(errors="replace")


def _new_database(backing_servers: BackingServers) -> str:
    name = f"chaos_{uuid.uuid4().hex}"
    with psycopg.connect(backing_servers.postgres.url, autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {name} TEMPLATE {backing_servers.template}")
    return f"{backing_servers.postgres.url.rpartition('/')[0]}/{name}"


def _two_tenants(sessions: Sessions) -> tuple[list[str], list[str]]:
    tenants = ["ten_chaos_a", "ten_chaos_b"]
    with sessions.begin() as session:
        session.add_all(Tenant(id=tenant, name=tenant) for tenant in tenants)
        session.flush()
        scopes = [Scope.SUBMIT, Scope.READ]
        return tenants, [api_keys.create(session, tenant, scopes).secret for tenant in tenants]
