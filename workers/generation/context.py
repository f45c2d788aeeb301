"""Context of a worker process."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta

from darkroom.db.connection import Sessions
from darkroom.generation.model_registry import ModelRegistry
from darkroom.queue.notifier import WorkNotifier
from darkroom.storage.images import ImageStore
from workers.generation.generator import ImageGenerator
from workers.generation.heartbeat import LeaseHeartbeat
from workers.generation.memory_limits import MemoryLimits
from workers.generation.progress_publisher import ProgressPublisher


@dataclass(frozen=True)
class WorkerContext:
    """Resources and limits that are the same for each microbatch."""

    worker_id: str
    sessions: Sessions
    registry: ModelRegistry
    generator: ImageGenerator
    store: ImageStore
    heartbeat: LeaseHeartbeat
    notifier: WorkNotifier
    progress: ProgressPublisher
    memory_limits: MemoryLimits
    encoders: ThreadPoolExecutor
    lease: timedelta
    microbatch_timeout_s: float
    step_timeout_s: float
    max_attempts: int
