"""`/metrics`: counters and gauges for Prometheus; no member, key, prompt or answer is in them.

Names follow the OpenTelemetry GenAI conventions where one exists, else vLLM's with our prefix. On
the public address they are served only where that is loopback and the request is visibly local:
behind a proxy a stranger's request comes from loopback too.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from anser import __version__
from anser.api.context import Services
from anser.core.errors import NotFound
from anser.core.health import NodeState
from anser.services.pool import view_of
from anser.services.stats import Histogram
from anser.wire.doors import is_loopback

__all__ = ["PATHS", "PoolCollector", "routes", "visibly_local"]

PATHS = (("GET", "/metrics"),)
"""(method, path) of every address here."""
_HOST = re.compile(r"(\[(?P<six>[0-9a-f:.]+)\]|(?P<name>[^:\[\]]+))(:[0-9]{1,5})?")
_FORWARDED = (
    "forwarded",
    "origin",  # a page of another site, which CORS may let read
    "via",
    "x-forwarded-for",
    "x-forwarded-host",
    "x-forwarded-proto",
    "x-real-ip",
)


def routes(services: Services, *, public: bool) -> list[Route]:
    """The route, for the admin application, or for a public one that is bound to loopback."""
    if public and not is_loopback(services.config.server.host):
        return []
    registry = CollectorRegistry()
    registry.register(PoolCollector(services))
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)

    async def metrics(request: Request) -> Response:
        if public and not visibly_local(request):
            raise NotFound("Metrics are served on loopback and on the admin listener only.")
        encode, kind = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(registry), headers={"content-type": kind})

    return [Route("/metrics", metrics, methods=["GET"])]


def visibly_local(request: Request) -> bool:
    """Whether a request comes from this machine, names it so, and shows no trace of a proxy."""
    peer = request.client.host if request.client else ""
    if "proxy" in request.scope or any(name in request.headers for name in _FORWARDED):
        return False
    if request.scope["http_version"] != "1.1":  # what proxies speak that are not told otherwise
        return False
    return is_loopback(peer) and _names_loopback(request.headers.get("host", ""))


class PoolCollector(Collector):
    """Reads gateway and fleet at the moment when it is asked."""

    def __init__(self, services: Services) -> None:
        self._services = services

    def describe(self) -> list[Metric]:
        """Nothing: the names are known when collected."""
        return []

    def collect(self) -> Iterator[Metric]:
        """All families."""
        yield from self._gateway()
        yield from self._totals()
        yield from self._fleet()
        build = GaugeMetricFamily("anser_build_info", "The version that runs.", labels=["version"])
        build.add_metric([__version__], 1)
        yield build

    def _gateway(self) -> Iterator[Metric]:
        snapshot = self._services.gateway.snapshot()
        stats = self._services.gateway.stats
        yield GaugeMetricFamily(
            "anser_num_requests_waiting", "Requests in the queue.", value=snapshot.queued
        )
        yield GaugeMetricFamily(
            "anser_num_requests_running", "Requests that hold a lease.", value=snapshot.running
        )
        yield GaugeMetricFamily(
            "anser_draining", "1 while the platform takes nothing new.", value=snapshot.draining
        )
        yield _histogram(
            "gen_ai_server_time_to_first_token_seconds",
            "From admission to the first token delivered.",
            stats.first_token_s,
        )
        yield _histogram(
            "gen_ai_server_request_duration_seconds",
            "From admission to the end of the answer.",
            stats.duration_s,
        )
        yield _histogram(
            "anser_request_queue_time_seconds", "From admission to a lease.", stats.queue_s
        )

    def _totals(self) -> Iterator[Metric]:
        stats = self._services.gateway.stats
        requests = CounterMetricFamily(
            "anser_requests", "Requests that have ended.", labels=["operation", "outcome"]
        )
        for (operation, outcome), count in sorted(stats.outcomes.items()):
            requests.add_metric([operation, outcome], count)
        yield requests
        tokens = CounterMetricFamily(
            "anser_tokens", "Tokens delivered.", labels=["gen_ai_token_type"]
        )
        tokens.add_metric(["input"], stats.tokens["prompt"])
        tokens.add_metric(["output"], stats.tokens["completion"])
        yield tokens
        yield CounterMetricFamily(
            "anser_cached_tokens", "Input tokens taken from a cache.", value=stats.tokens["cached"]
        )
        yield CounterMetricFamily(
            "anser_retries",
            "Leases that failed and whose requests went elsewhere.",
            value=stats.retries,
        )
        yield CounterMetricFamily(
            "anser_continued",
            "Answers that another node went on with after theirs had died.",
            value=stats.continued,
        )
        yield CounterMetricFamily(
            "anser_hedged",
            "Requests that had a second lease, because their first one was slow.",
            value=stats.hedged,
        )

    def _fleet(self) -> Iterator[Metric]:
        views = view_of(self._services.fleet, self._services.gateway).nodes
        states = Counter(view.status.state for view in views)
        nodes = GaugeMetricFamily("anser_nodes", "Nodes by state.", labels=["state"])
        for state in NodeState:
            nodes.add_metric([state.value], states[state])
        yield nodes
        up = GaugeMetricFamily("anser_node_up", "1 while the node takes work.", labels=["node"])
        slots = GaugeMetricFamily("anser_node_slots", "Answers at once.", labels=["node"])
        running = GaugeMetricFamily("anser_node_running", "Leases on the node.", labels=["node"])
        for view in views:
            status, node = view.status, view.status.node.id
            up.add_metric([node], status.state is NodeState.UP)
            slots.add_metric([node], status.slots or 0)
            running.add_metric([node], view.busy)
        yield from (up, slots, running)


def _histogram(name: str, text: str, histogram: Histogram) -> Metric:
    """Cumulative buckets, as Prometheus wants them."""
    buckets: list[tuple[str, float]] = []
    so_far = 0
    for bound, count in zip([*histogram.bounds, None], histogram.counts, strict=True):
        so_far += count
        buckets.append(("+Inf" if bound is None else repr(bound), so_far))
    return HistogramMetricFamily(name, text, buckets=buckets, sum_value=histogram.total)


def _names_loopback(host: str) -> bool:
    match = _HOST.fullmatch(host.lower())
    return match is not None and is_loopback(match["six"] or match["name"])
