"""`python -m workers run`: the Celery worker, with one task and the threads beside it."""

import argparse
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Final, Protocol

from celery import Celery, signals
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from darkroom.db.connection import open_sessions
from darkroom.errors import GeneratorGone, GeneratorUnavailable, StorageUnavailable
from darkroom.generation.model_registry import load_registry
from darkroom.health import print_checks
from darkroom.ids import new_id
from darkroom.jobs.progress import open_progress_redis
from darkroom.queue import celery_app, dispatches
from darkroom.queue.notifier import WorkNotifier, clear_queue
from darkroom.settings import Settings, load_settings
from darkroom.storage.images import S3Store
from workers.deploy.demand_reporter import BacklogReporter
from workers.generation.cancellation import CancellationWatcher
from workers.generation.celery_wakeup import SlotFreedWakeup
from workers.generation.context import WorkerContext
from workers.generation.generator import ImageGenerator
from workers.generation.heartbeat import LeaseHeartbeat
from workers.generation.memory_limits import MemoryLimits
from workers.generation.microbatch import process_queue
from workers.generation.progress_publisher import ProgressPublisher
from workers.maintenance.cleaner import Cleaner
from workers.maintenance.reaper import Reaper

#: Bytes of the largest reply of a replica: one image, and 2048 x 2048 take 12 MiB. Ray reads it
#: once, when ray.serve is imported; its own default is 4 MiB.
REPLY_LIMIT: Final = ("RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH", str(64 * 2**20))
EX_TEMPFAIL: Final = 75  # sysexits.h: the supervisor should try again
_CLEAN_S: Final = 60.0  # between two rounds of the janitor
_MARGIN_S: Final = 10.0  # the replica gives up before its caller does
_SETTLING_S: Final = 3.0  # to store and to commit what was drawn until then
_PATIENCE_S: Final = 60.0  # longer than a replica takes to be replaced

logger = logging.getLogger(__name__)


def _terminate() -> None:
    """Celery's warm shutdown; the supervisor starts us anew."""
    os.kill(os.getpid(), signal.SIGTERM)


class BackgroundThread(Protocol):
    """A thread that works beside the pumps."""

    def start(self) -> None:
        """Begin."""

    def close(self) -> None:
        """End, and wait for it."""


@dataclass
class WorkerProcess:
    """A worker process: its worker_context, and what starts and stops with it."""

    ctx: WorkerContext
    helpers: Sequence[BackgroundThread]
    grace_s: float  #: what is being drawn may go on so long once the process is to end
    stopping: threading.Event = field(default_factory=threading.Event)
    leave: Callable[[], None] = _terminate
    failing_since: float | None = None  #: by the monotonic clock; None after each success


def open_worker_process(
    settings: Settings,
    generator: ImageGenerator,
    *,
    publish_demand: Callable[[Mapping[str, int]], None] | None = None,
) -> WorkerProcess:
    """Everything but the connections, which are made when first needed.

    `publish_demand` tells who decides on the number of replicas how much there is to draw.
    """
    lease = timedelta(seconds=settings.lease_s)
    sessions = open_sessions(settings.database_url.get_secret_value())
    worker_id = f"{socket.gethostname()}:{os.getpid()}:{new_id('wrk')}"
    notifier = WorkNotifier(settings)
    leases = LeaseHeartbeat(sessions, lease=lease)
    ctx = WorkerContext(
        worker_id=worker_id,
        sessions=sessions,
        registry=load_registry(settings.models_dir, settings.default_model),
        generator=generator,
        store=S3Store(settings),
        leases=leases,
        notifier=notifier,
        board=ProgressPublisher(open_progress_redis(settings)),
        seats=MemoryLimits(),
        encoders=ThreadPoolExecutor(8, thread_name_prefix="encode"),
        lease=lease,
        microbatch_timeout_s=settings.microbatch_timeout_s + _MARGIN_S,
        step_timeout_s=settings.step_timeout_s + _MARGIN_S,
        max_attempts=settings.max_attempts,
    )
    sweeper = Reaper(
        sessions,
        notifier,
        every=timedelta(seconds=settings.maintenance_interval_s),
        lease=lease,
        max_attempts=settings.max_attempts,
    )
    janitor = Cleaner(
        sessions,
        ctx.store,
        every=timedelta(seconds=_CLEAN_S),
        retention_days=settings.retention_days,
        orphan_age=timedelta(hours=settings.orphan_retention_h),
    )
    helpers: list[BackgroundThread] = [CancellationWatcher(sessions, leases), sweeper, janitor]
    if publish_demand is not None:
        helpers.append(BacklogReporter(sessions, ctx.registry, publish_demand))
    return WorkerProcess(ctx, helpers, grace_s=settings.shutdown_grace_s)


def worker_app(settings: Settings, crew: WorkerProcess, *, ready_file: Path | None) -> Celery:
    """The Celery app with its task and its life wired up."""
    app = celery_app.celery_app(settings, socket_timeout_s=5)
    app.steps["consumer"].add(SlotFreedWakeup)

    @app.task(name=celery_app.PROCESS_QUEUE)
    def _pump() -> None:
        run_process_queue(crew)

    def _init(**_: object) -> None:
        clear_queue(settings, celery_app.GENERATE_QUEUE)
        start(crew)

    def _ready(**_: object) -> None:
        crew.ctx.notifier.notify_workers()  # what waited while no worker was there
        if ready_file is not None:
            ready_file.touch()

    def _shutting_down(**_: object) -> None:
        crew.stopping.set()
        threading.Thread(target=drain, args=[crew], name="hand-over", daemon=True).start()

    def _shutdown(**_: object) -> None:
        stop(crew)

    # weak=False: these closures have no other owner
    signals.worker_init.connect(_init, weak=False)  # main thread, before Celery's signal handlers
    signals.worker_ready.connect(_ready, weak=False)
    signals.worker_shutting_down.connect(_shutting_down, weak=False)
    signals.worker_shutdown.connect(_shutdown, weak=False)
    return app


def run_process_queue(crew: WorkerProcess) -> None:
    """One pump; what it could not do is left to the sweeper's next ring."""
    try:
        drawn = process_queue(crew.ctx, stopping=crew.stopping.is_set)
    except GeneratorUnavailable as error:
        logger.warning("nobody draws, the sweeper will ring again: %s", error)
        note_failure(crew, error)
    except (StorageUnavailable, DBAPIError, PoolTimeout) as error:
        logger.warning("pump stopped, the sweeper will ring again: %s", error)
    else:
        crew.failing_since = None if drawn else crew.failing_since


def note_failure(crew: WorkerProcess, error: GeneratorUnavailable) -> None:
    """Crash-only towards Ray: a driver may never find a new cluster, a new process does.

    The second time that the cluster is told to be gone, or after a minute without a success.
    """
    now = time.monotonic()
    if crew.failing_since is None:
        crew.failing_since = now
    elif isinstance(error, GeneratorGone) or now - crew.failing_since > _PATIENCE_S:
        logger.warning("leaving, to be started anew: %s", error)
        crew.leave()


def start(crew: WorkerProcess) -> None:
    """Connect to who draws, then start the threads. Ends the process when nobody is reached."""
    try:
        crew.ctx.generator.connect()
    except Exception:
        logger.exception("could not connect to who draws")
        os._exit(EX_TEMPFAIL)  # Celery only logs what a signal handler raises, and would go on
    crew.ctx.leases.start()
    for helper in crew.helpers:
        helper.start()


def drain(crew: WorkerProcess) -> None:
    """Let what is nearly drawn be finished, then have others go on with the rest.

    While this goes on, Celery waits for the pumps to return.
    """
    crew.ctx.leases.idle_within(crew.grace_s)
    crew.ctx.leases.retire()
    crew.ctx.leases.idle_within(_SETTLING_S)
    release(crew)


def stop(crew: WorkerProcess) -> None:
    """End the threads, after the pumps have returned."""
    for helper in crew.helpers:
        helper.close()
    crew.ctx.leases.close()
    release(crew)
    crew.ctx.board.close()
    crew.ctx.notifier.close()


def release(crew: WorkerProcess) -> None:
    """Hand back whatever is still held, so that others go on at once."""
    try:
        with crew.ctx.sessions.begin() as session:
            dispatches.release(session, crew.ctx.worker_id)
    except (DBAPIError, PoolTimeout) as error:
        logger.warning("could not release, the lease will run out: %s", error)
    crew.ctx.notifier.notify_workers()


def celery_arguments(settings: Settings) -> Sequence[str]:
    """Threads, because one Ray driver serves them all; no chatter between workers."""
    return [
        "worker",
        "--pool=threads",
        f"--concurrency={settings.worker_concurrency}",
        f"--queues={celery_app.GENERATE_QUEUE}",
        f"--hostname=worker-{os.getpid()}@%h",  # two of one name would take each other's orders
        "--without-gossip",
        "--without-mingle",
        "--without-heartbeat",
        "--loglevel=INFO",
    ]


def main(arguments: Sequence[str]) -> int:  # noqa: RET503  # Celery's worker_main does not return
    """Run until SIGTERM; microbatches that finish soon may, the other jobs are requeued."""
    parser = argparse.ArgumentParser(
        prog="python -m workers run",
        description="A Celery worker: claims microbatches, generates them on Ray Serve, stores "
        "the images.",
        epilog="Configured by DARKROOM_* variables; see .env.example.",
    )
    parser.add_argument("--check", action="store_true", help="only check what it would connect to")
    asked = parser.parse_args(arguments)
    settings = load_settings()
    os.environ.setdefault(*REPLY_LIMIT)
    from workers.deploy.autoscaling import publish
    from workers.generation.ray_generator import RayGenerator
    from workers.ray_cluster.connection import check_ray

    if asked.check:
        return print_checks(settings, {"ray": lambda: check_ray(settings.ray_address)})
    ready_file = os.environ.get("DARKROOM_READY_FILE")
    models = load_registry(settings.models_dir, settings.default_model).models.values()
    generator = RayGenerator(
        settings.ray_address, on_demand=[model.name for model in models if model.on_demand]
    )
    process = open_worker_process(settings, generator, publish_demand=publish)
    app = worker_app(settings, process, ready_file=Path(ready_file) if ready_file else None)
    app.worker_main(list(celery_arguments(settings)))  # ends the process itself
