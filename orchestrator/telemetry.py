"""Counters and histograms in Prometheus form, and one log line per decision.

Each replica counts for itself; Prometheus adds them up. Prompts and answers are never recorded.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from orchestrator.decision import Decision, RequestContext

__all__ = ["CONTENT_TYPE_LATEST", "Telemetry"]

decisions_log = logging.getLogger("collegium.decisions")

_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Telemetry:
    """What one replica has seen. Names are listed in ``docs/telemetry.md``.

    Args:
        in_flight: Tells how many requests are in work.
    """

    def __init__(self, in_flight: Callable[[], int] = lambda: 0) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "collegium_requests_total",
            "Requests finished, by what they asked for, who answered, and HTTP status.",
            ["model", "expert", "status"],
            registry=self.registry,
        )
        self.calls = Counter(
            "collegium_expert_calls_total",
            "Experts asked, by what for and how that ended: ok, an error's name, or cancelled.",
            ["expert", "purpose", "outcome"],
            registry=self.registry,
        )
        self.peers_lost = Counter(
            "collegium_peers_lost_total",
            "Answers that an expert was to be listened to for, and that went on without it.",
            ["expert"],
            registry=self.registry,
        )
        self.cost_usd = Counter(
            "collegium_cost_usd_total",
            "US dollars by the prices of the experts' cards.",
            ["expert"],
            registry=self.registry,
        )
        self.tokens = Counter(
            "collegium_tokens_total",
            "Tokens read and written, by expert.",
            ["expert", "kind"],
            registry=self.registry,
        )
        self.in_flight = Gauge(
            "collegium_in_flight_requests", "Requests in work.", registry=self.registry
        )
        self.in_flight.set_function(in_flight)
        self.seconds = Histogram(
            "collegium_request_seconds",
            "Seconds from a request's arrival to its end.",
            ["expert"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.first_chunk_seconds = Histogram(
            "collegium_first_chunk_seconds",
            "Seconds from a request's arrival to the first piece of its streamed answer.",
            ["expert"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.router_seconds = Histogram(
            "collegium_router_seconds",
            "Seconds the router took, waiting for a free thread included.",
            buckets=_SECONDS,
            registry=self.registry,
        )

        self.memory_errors = Counter(
            "collegium_memory_errors_total",
            "What the store did not do, or not in time, by the feature that went on without.",
            ["feature"],
            registry=self.registry,
        )

        self.cache_lookups = Counter(
            "collegium_cache_lookups_total",
            "Requests by what the response cache had for them, as x-collegium-cache says.",
            ["state"],
            registry=self.registry,
        )
        self.shadows = Counter(
            "collegium_shadow_total",
            "Copies of requests to a route's shadow, by what became of them.",
            ["route", "outcome"],
            registry=self.registry,
        )

    def render(self) -> bytes:
        """All series in Prometheus' text format."""
        return generate_latest(self.registry)

    def decided(self, decision: Decision, context: RequestContext) -> None:
        """Note a decision in the log and the router's time."""
        if decision.router is not None:
            self.router_seconds.observe(context.router_s)
        if decisions_log.isEnabledFor(logging.INFO):
            decisions_log.info(
                json.dumps(
                    {
                        "decision_id": decision.id,
                        "route": decision.route,
                        "experiment": decision.experiment,
                        "arm": decision.arm,
                        "policy": decision.policy,
                        "experts": decision.experts,
                        "category": decision.category,
                        "confidence": decision.confidence,
                        "fallback": decision.fallback,
                        "router_ms": round(context.router_s * 1000, 3),
                    }
                )
            )

    def memory_failed(self, feature: str) -> None:
        """Note that the store did not do something."""
        self.memory_errors.labels(feature).inc()

    def first_chunk(self, context: RequestContext) -> None:
        """Note the time to the first piece."""
        elapsed_s = time.monotonic() - context.received
        self.first_chunk_seconds.labels(context.expert or "").observe(elapsed_s)

    def finished(self, model: str, context: RequestContext, status: int) -> None:
        """Note the end of a request. ``status`` 499 means that the client left."""
        expert = context.expert or ""
        self.requests.labels(model, expert, str(status)).inc()
        self.seconds.labels(expert).observe(time.monotonic() - context.received)
        if context.cache is not None:
            self.cache_lookups.labels(context.cache.state).inc()
        self._called(context)

    def shadowed(self, route: str, outcome: str, context: RequestContext) -> None:
        """Note what became of a copy of a request, and what it cost."""
        self.shadows.labels(route, outcome).inc()
        self._called(context, "shadow_")

    def _called(self, context: RequestContext, prefix: str = "") -> None:
        for call in context.calls:
            self.calls.labels(call.expert, prefix + call.purpose, call.error or "ok").inc()
            self.tokens.labels(call.expert, "prompt").inc(call.usage.prompt_tokens)
            self.tokens.labels(call.expert, "completion").inc(call.usage.completion_tokens)
            self.cost_usd.labels(call.expert).inc(call.cost_usd)
            if call.error == "lost":
                self.peers_lost.labels(call.expert).inc()
