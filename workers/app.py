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
from typing import Final

from celery import Celery, signals
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from darkroom.db.connection import Sessions, open_sessions
from darkroom.errors import GeneratorGone, GeneratorUnavailable, StorageUnavailable
from darkroom.generation.model_registry import load_registry
from darkroom.health import print_checks
from darkroom.ids import new_id
from darkroom.jobs.progress import open_progress_redis
from darkroom.periodic import PeriodicTask
from darkroom.queue import celery_app, dispatches
from darkroom.queue.notifier import WorkNotifier, clear_queue
from darkroom.settings import Settings, load_settings
from darkroom.storage.images import S3Store
from workers.deploy.backlog_reporter import backlog_reporter
from workers.generation.cancellation import cancellation_watcher
from workers.generation.celery_wakeup import SlotFreedWakeup
from workers.generation.context import WorkerContext
from workers.generation.generator import ImageGenerator
from workers.generation.heartbeat import LeaseHeartbeat
from workers.generation.memory_limits import MemoryLimits
from workers.generation.microbatch import process_queue
from workers.generation.progress_publisher import ProgressPublisher
from workers.maintenance.cleaner import Cleaner
from workers.maintenance.maintenance import Maintenance
from workers.maintenance.reaper import Reaper

#: Bytes of the largest reply of a replica: one image, and 2048 x 2048 take 12 MiB. Ray reads it
#: once, when ray.serve is imported; its own default is 4 MiB.
REPLY_LIMIT: Final = ("RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH", str(64 * 2**20))
EX_TEMPFAIL: Final = 75  # sysexits.h: the supervisor should try again
_MARGIN_S: Final = 10.0  # the replica gives up before its caller does
_SETTLE_S: Final = 3.0  # to store and to commit what was generated until then
_UNAVAILABLE_S: Final = 60.0  # longer than a replica takes to be replaced

logger = logging.getLogger(__name__)


def _terminate() -> None:
    """Start Celery's warm shutdown; the supervisor starts a new process."""
    os.kill(os.getpid(), signal.SIGTERM)


@dataclass
class WorkerProcess:
    """Context of a worker process, and what starts and stops with it."""

    ctx: WorkerContext
    background: Sequence[PeriodicTask | Maintenance]
    grace_s: float  #: how long generation goes on once the process is to stop
    stopping: threading.Event = field(default_factory=threading.Event)
    leave: Callable[[], None] = _terminate
    failing_since: float | None = None  #: by the monotonic clock; None after each success


def open_worker_process(
    settings: Settings,
    generator: ImageGenerator,
    *,
    publish_backlog: Callable[[Mapping[str, int]], None] | None = None,
) -> WorkerProcess:
    """Make everything but the connections, which are opened when first needed.

    `publish_backlog` reports the microbatches that wait to the autoscaler.
    """
    sessions = open_sessions(settings.database_url.get_secret_value())
    ctx = _open_context(settings, sessions, generator)
    background: list[PeriodicTask | Maintenance] = [
        cancellation_watcher(sessions, ctx.heartbeat),
        _open_maintenance(settings, ctx),
    ]
    if publish_backlog is not None:
        background.append(backlog_reporter(sessions, ctx.registry, publish_backlog))
    return WorkerProcess(ctx, background, grace_s=settings.shutdown_grace_s)


def _open_context(
    settings: Settings, sessions: Sessions, generator: ImageGenerator
) -> WorkerContext:
    lease = timedelta(seconds=settings.lease_s)
    return WorkerContext(
        worker_id=f"{socket.gethostname()}:{os.getpid()}:{new_id('wrk')}",
        sessions=sessions,
        registry=load_registry(settings.models_dir, settings.default_model),
        generator=generator,
        store=S3Store(settings),
        heartbeat=LeaseHeartbeat(sessions, lease=lease),
        notifier=WorkNotifier(settings),
        progress=ProgressPublisher(open_progress_redis(settings)),
        memory_limits=MemoryLimits(),
        encoders=ThreadPoolExecutor(8, thread_name_prefix="encode"),
        lease=lease,
        microbatch_timeout_s=settings.microbatch_timeout_s + _MARGIN_S,
        step_timeout_s=settings.step_timeout_s + _MARGIN_S,
        max_attempts=settings.max_attempts,
    )


def _open_maintenance(settings: Settings, ctx: WorkerContext) -> Maintenance:
    return Maintenance(
        Reaper(ctx.sessions, ctx.notifier, lease=ctx.lease, max_attempts=ctx.max_attempts),
        Cleaner(
            ctx.sessions,
            ctx.store,
            retention_days=settings.retention_days,
            orphan_age=timedelta(hours=settings.orphan_retention_h),
        ),
        interval=timedelta(seconds=settings.maintenance_interval_s),
    )


def worker_app(settings: Settings, process: WorkerProcess, *, ready_file: Path | None) -> Celery:
    """Make the Celery app with its task, and connect the process to its signals."""
    app = celery_app.celery_app(settings, socket_timeout_s=5)
    app.steps["consumer"].add(SlotFreedWakeup)

    @app.task(name=celery_app.PROCESS_QUEUE)
    def _process_queue() -> None:
        run_process_queue(process)

    def _init(**_: object) -> None:
        clear_queue(settings, celery_app.GENERATE_QUEUE)
        start(process)

    def _ready(**_: object) -> None:
        process.ctx.notifier.notify_workers()  # for jobs queued while no worker ran
        if ready_file is not None:
            ready_file.touch()

    def _shutting_down(**_: object) -> None:
        process.stopping.set()
        threading.Thread(target=drain, args=[process], name="drain", daemon=True).start()

    def _shutdown(**_: object) -> None:
        stop(process)

    # weak=False: these closures have no other owner
    signals.worker_init.connect(_init, weak=False)  # main thread, before Celery's signal handlers
    signals.worker_ready.connect(_ready, weak=False)
    signals.worker_shutting_down.connect(_shutting_down, weak=False)
    signals.worker_shutdown.connect(_shutdown, weak=False)
    return app


def run_process_queue(process: WorkerProcess) -> None:
    """Run microbatches; jobs left after a failure wait for the reaper's next wake-up."""
    try:
        done = process_queue(process.ctx, stopping=process.stopping.is_set)
    except GeneratorUnavailable as error:
        logger.warning(
            "no replica available: %s; jobs stay queued, next attempt at the next maintenance pass",
            error,
        )
        note_failure(process, error)
    except (StorageUnavailable, DBAPIError, PoolTimeout) as error:
        logger.warning(
            "stopped claiming: %s: %s; next attempt at the next maintenance pass",
            type(error).__name__,
            error,
        )
    else:
        process.failing_since = None if done else process.failing_since


def note_failure(process: WorkerProcess, error: GeneratorUnavailable) -> None:
    """Exit if Ray stays unavailable: a driver may never find a new cluster, a new process does.

    The process exits at the second GeneratorGone in a row, or after a minute without a success.
    """
    now = time.monotonic()
    if process.failing_since is None:
        process.failing_since = now
    elif isinstance(error, GeneratorGone) or now - process.failing_since > _UNAVAILABLE_S:
        logger.warning("exiting for a restart: %s", error)
        process.leave()


def start(process: WorkerProcess) -> None:
    """Connect to Ray Serve, then start the threads; exit the process if it cannot be reached."""
    try:
        process.ctx.generator.connect()
    except Exception:
        logger.exception("could not connect to Ray Serve; exiting for a restart")
        os._exit(EX_TEMPFAIL)  # Celery only logs what a signal handler raises, and would go on
    process.ctx.heartbeat.start()
    for task in process.background:
        task.start()


def drain(process: WorkerProcess) -> None:
    """Let microbatches finish within the grace period, then requeue the unfinished jobs.

    Meanwhile Celery waits for its tasks to return.
    """
    process.ctx.heartbeat.wait_idle(process.grace_s)
    process.ctx.heartbeat.stop_accepting()
    process.ctx.heartbeat.wait_idle(_SETTLE_S)
    release(process)


def stop(process: WorkerProcess) -> None:
    """End the threads, after Celery's tasks have returned."""
    for task in process.background:
        task.close()
    process.ctx.heartbeat.close()
    release(process)
    process.ctx.progress.close()
    process.ctx.notifier.close()


def release(process: WorkerProcess) -> None:
    """Requeue the jobs of dispatches that are still open, and wake other workers."""
    try:
        with process.ctx.sessions.begin() as session:
            dispatches.release(session, process.ctx.worker_id)
    except (DBAPIError, PoolTimeout) as error:
        logger.warning("could not requeue unfinished jobs: %s; their leases will lapse", error)
    process.ctx.notifier.notify_workers()


def celery_arguments(settings: Settings) -> Sequence[str]:
    """Return Celery's arguments: threads, which share one Ray driver, and no talk among workers."""
    return [
        "worker",
        "--pool=threads",
        f"--concurrency={settings.worker_concurrency}",
        f"--queues={celery_app.GENERATE_QUEUE}",
        f"--hostname=worker-{os.getpid()}@%h",  # two of one name would take each other's commands
        "--without-gossip",
        "--without-mingle",
        "--without-heartbeat",
        "--loglevel=INFO",
    ]


def main(arguments: Sequence[str]) -> int:
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
    process = open_worker_process(settings, generator, publish_backlog=publish)
    app = worker_app(settings, process, ready_file=Path(ready_file) if ready_file else None)
    start: Callable[[list[str]], int | None] = app.start  # its types say that it never returns
    return start(list(celery_arguments(settings))) or 0  # None after a warm shutdown
