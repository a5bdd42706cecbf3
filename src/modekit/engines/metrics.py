"""What the front counts, in Prometheus's text format."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from modekit.engines.workers import Worker

_EDGES_S = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5)


class Metrics:
    """Requests by expert and status, the time that deciding takes, and how busy each worker is."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter("modekit_requests", "Requests.", ["expert", "status"], registry=self._registry)
        self._deciding = Histogram(
            "modekit_deciding_seconds", "From the request to the expert.", buckets=_EDGES_S, registry=self._registry
        )
        self._busy = Gauge("modekit_worker_busy", "Requests that a worker is at.", ["worker"], registry=self._registry)

    def decided(self, seconds: float) -> None:
        """An expert was chosen, or a model named, within this time."""
        self._deciding.observe(seconds)

    def answered(self, expert: str, status: int) -> None:
        """Somebody answered, or nobody did (503)."""
        self._requests.labels(expert, str(status)).inc()

    def text(self, workers: Iterable[Worker]) -> bytes:
        """All of it."""
        for worker in workers:
            self._busy.labels(worker.name).set(worker.busy)
        return generate_latest(self._registry)
