"""What a worker process works with."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta

from darkroom.db.connection import Sessions
from darkroom.generation.model_registry import Catalogue
from darkroom.queue.notifier import Bell
from darkroom.storage.images import ImageStore
from workers.generation.generator import ImageGenerator
from workers.generation.heartbeat import Leases
from workers.generation.memory_limits import Seats
from workers.generation.progress_publisher import Noticeboard


@dataclass(frozen=True)
class Workshop:
    """Everything that is made once and used for each microbatch."""

    worker_id: str
    sessions: Sessions
    catalogue: Catalogue
    generator: ImageGenerator
    store: ImageStore
    leases: Leases
    bell: Bell
    board: Noticeboard
    seats: Seats
    encoders: ThreadPoolExecutor
    lease: timedelta
    generate_timeout_s: float
    silence_timeout_s: float
    max_attempts: int
