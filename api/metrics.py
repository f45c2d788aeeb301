"""/metrics: the queue and this process, for Prometheus."""

from collections.abc import Iterator

from fastapi import APIRouter, Response
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.gc_collector import GCCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from api.dependencies import Deps
from darkroom import __version__
from darkroom.forecast.snapshot import QueueSnapshot
from darkroom.status import Priority

router = APIRouter(tags=["health"])


class _Queue(Collector):
    """The look as gauges."""

    def __init__(self, look: QueueSnapshot | None, dropped: int) -> None:
        self._look = look
        self._dropped = dropped

    def collect(self) -> Iterator[Metric]:
        """In the order in which they are read."""
        up = self._look is not None
        yield _gauge("darkroom_queue_snapshot_up", "1 if the database could be asked", float(up))
        yield _gauge("darkroom_submit_pending", "POSTed jobs not committed yet", self._dropped)
        if self._look is not None:
            yield from _depths(self._look)
            yield from _state(self._look)
            yield from _pace(self._look)


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, value=value)


def _depths(look: QueueSnapshot) -> Iterator[Metric]:
    labels = ["priority", "model"]
    jobs = GaugeMetricFamily("darkroom_queue_jobs", "Jobs that wait", labels=labels)
    cost = GaugeMetricFamily("darkroom_queue_cost", "Passes of 512 x 512 that wait", labels=labels)
    age = GaugeMetricFamily("darkroom_queue_oldest_age_seconds", "Of what waits", labels=labels)
    for depth in look.scan.depths:
        of = [list(Priority)[depth.priority].value, depth.model]
        jobs.add_metric(of, depth.jobs)
        cost.add_metric(of, depth.cost)
        age.add_metric(of, depth.oldest_queued_s)
    yield from (jobs, cost, age)
    yield _gauge("darkroom_queue_paused_jobs", "Jobs of paused batches", look.scan.paused_jobs)


def _state(look: QueueSnapshot) -> Iterator[Metric]:
    yield _gauge("darkroom_paused", "1 while nothing is claimed", float(look.control.paused))
    yield _gauge("darkroom_draining", "1 while nothing is accepted", float(look.control.draining))


def _pace(look: QueueSnapshot) -> Iterator[Metric]:
    pace = look.pace
    running = len(pace.running) if pace else 0
    yield _gauge("darkroom_microbatches_running", "Dispatches under way", running)
    rate = pace.images_per_s if pace else 0.0
    yield _gauge("darkroom_images_per_second", "Over the last minute", rate)
    per_cost = GaugeMetricFamily(
        "darkroom_generation_seconds_per_cost_unit",
        "Of the installation, as measured lately",
        labels=["model"],
    )
    for model, fit in sorted(pace.by_model.items()) if pace else ():
        per_cost.add_metric([model], fit.per_cost_s)
    yield per_cost


@router.get("/metrics", summary="Get metrics", response_class=PlainTextResponse)
def get_metrics(deps: Deps) -> Response:
    """In Prometheus' text format; needs no key, and names no tenant."""
    registry = CollectorRegistry()
    for part in (ProcessCollector, PlatformCollector, GCCollector):
        part(registry=registry)
    registry.register(_Queue(deps.snapshot_cache.now(), deps.group_committer.waiting))
    build = GaugeMetricFamily("darkroom_build_info", "Version", labels=["version"])
    build.add_metric([__version__], 1)
    return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)
