"""/metrics: the queue, what was finished, and this process, for Prometheus."""

from collections.abc import Callable, Iterator

from fastapi import APIRouter, Response
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Gauge, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.gc_collector import GCCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from api.activity import ActivityCollector
from api.dependencies import Deps
from darkroom import __version__
from darkroom.forecast.snapshot import QueueSnapshot
from darkroom.periodic import FAILURES
from darkroom.status import Priority

router = APIRouter(tags=["health"])


def open_registry(
    activity: ActivityCollector,
    *,
    snapshot: Callable[[], QueueSnapshot | None],
    pending: Callable[[], int],
) -> CollectorRegistry:
    """Return a registry of all that this process exposes; `pending` counts jobs to be committed."""
    registry = CollectorRegistry()
    for part in (ProcessCollector, PlatformCollector, GCCollector):
        part(registry=registry)
    registry.register(QueueCollector(snapshot, pending))
    registry.register(activity)
    registry.register(FAILURES)
    build = Gauge("darkroom_build_info", "Version of this process", ("version",), registry=registry)
    build.labels(__version__).set(1)
    return registry


class QueueCollector(Collector):
    """Gauges of the queue, from the shared snapshot."""

    def __init__(
        self, snapshot: Callable[[], QueueSnapshot | None], pending: Callable[[], int]
    ) -> None:
        self._snapshot = snapshot
        self._pending = pending

    def collect(self) -> Iterator[Metric]:
        """Yield the gauges; without a database only the first two."""
        snapshot = self._snapshot()
        yield _gauge(
            "darkroom_queue_snapshot_up",
            "1 if the database answered, else 0 and no other gauge of the queue",
            float(snapshot is not None),
        )
        yield _gauge(
            "darkroom_submit_pending",
            "Single jobs that this process received and has not committed yet",
            self._pending(),
        )
        if snapshot is not None:
            yield from _depths(snapshot)
            yield from _control(snapshot)
            yield from _throughput(snapshot)


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, value=value)


def _depths(snapshot: QueueSnapshot) -> Iterator[Metric]:
    labels = ["priority", "model"]
    jobs = GaugeMetricFamily("darkroom_queue_jobs", "Queued jobs", labels=labels)
    cost = GaugeMetricFamily(
        "darkroom_queue_cost", "Denoise passes of 512 x 512 pixels that are queued", labels=labels
    )
    age = GaugeMetricFamily(
        "darkroom_queue_oldest_age_seconds", "Age of the oldest queued job", labels=labels
    )
    for depth in snapshot.scan.depths:
        values = [Priority.from_rank(depth.priority).value, depth.model]
        jobs.add_metric(values, depth.jobs)
        cost.add_metric(values, depth.cost)
        age.add_metric(values, depth.oldest_queued_s)
    yield from (jobs, cost, age)
    paused = snapshot.scan.paused_jobs
    yield _gauge("darkroom_queue_paused_jobs", "Queued jobs of paused batches", paused)


def _control(snapshot: QueueSnapshot) -> Iterator[Metric]:
    state = snapshot.control
    yield _gauge("darkroom_paused", "1 while workers claim no jobs", float(state.paused))
    yield _gauge("darkroom_draining", "1 while new jobs are rejected", float(state.draining))


def _throughput(snapshot: QueueSnapshot) -> Iterator[Metric]:
    throughput = snapshot.throughput
    running = len(throughput.running) if throughput else 0
    yield _gauge("darkroom_microbatches_running", "Microbatches in a worker", running)
    per_cost = GaugeMetricFamily(
        "darkroom_generation_seconds_per_cost_unit",
        "Seconds of the installation for a denoise pass of 512 x 512 pixels, measured",
        labels=["model"],
    )
    for model, fit in sorted(throughput.by_model.items()) if throughput else ():
        per_cost.add_metric([model], fit.per_cost_s)
    yield per_cost


@router.get("/metrics", summary="Get metrics", response_class=PlainTextResponse)
def get_metrics(deps: Deps) -> Response:
    """Return metrics in Prometheus' text format. They name no tenant."""
    return Response(generate_latest(deps.metrics), media_type=CONTENT_TYPE_LATEST)
