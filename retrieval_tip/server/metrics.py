"""Prometheus metrics of the server. Each process has one set of metrics."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

REGISTRY = CollectorRegistry()
ProcessCollector(registry=REGISTRY)  # memory, CPU seconds and open files

REQUESTS = Counter("retrieval_tip_requests", "Requests answered", ["route", "method", "status"], registry=REGISTRY)
SECONDS = Histogram(
    "retrieval_tip_request_seconds", "Time to answer a request", ["route"], registry=REGISTRY,
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
)  # fmt: skip
IN_FLIGHT = Gauge("retrieval_tip_in_flight", "Requests in progress", registry=REGISTRY)
CLASSIFIED = Counter("retrieval_tip_classified", "Images and features classified", ["index"], registry=REGISTRY)
WAITING = Gauge("retrieval_tip_waiting", "Items that are waiting for the next batch", ["lane"], registry=REGISTRY)
BATCHES = Histogram(
    "retrieval_tip_batch_items", "Items per batch", ["lane"], registry=REGISTRY,
    buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256, 1024),
)  # fmt: skip
REFUSED = Counter(
    "retrieval_tip_refused", "Requests refused because the client fills its share of the queue", registry=REGISTRY
)
VERSION = Gauge("retrieval_tip_index_version", "Version of a served index", ["index"], registry=REGISTRY)
KEYS = Gauge("retrieval_tip_index_keys", "Keys of a served index", ["index"], registry=REGISTRY)
RELOADS = Counter("retrieval_tip_reloads", "New versions found", ["index", "outcome"], registry=REGISTRY)
