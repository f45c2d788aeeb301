"""What a worker process works with."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta

from darkroom.catalogue import Catalogue
from darkroom.database import Sessions
from darkroom.queue import Bell
from darkroom.storage import ImageStore
from workers.generator import ImageGenerator
from workers.leases import Leases
from workers.noticeboard import Noticeboard
from workers.seats import Seats


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
