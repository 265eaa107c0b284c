"""Prometheus metrics of the server. Each process has one set."""

from prometheus_client import Counter, Gauge, Histogram

TIMES = 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30
SIZES = 1, 2, 4, 8, 16, 32, 64, 128, 256, 1024
REQUESTS = Counter("retrieval_tip_requests", "Requests answered", ["route", "method", "status"])
SECONDS = Histogram(
    "retrieval_tip_request_seconds", "Time to answer a request", ["route"], buckets=TIMES
)
IN_FLIGHT = Gauge("retrieval_tip_in_flight", "Requests in progress")
CLASSIFIED = Counter("retrieval_tip_classified", "Images and features classified", ["index"])
WAITING = Gauge("retrieval_tip_waiting", "Items that are waiting for the next batch", ["lane"])
BATCHES = Histogram("retrieval_tip_batch_items", "Items per batch", ["lane"], buckets=SIZES)
REFUSED = Counter(
    "retrieval_tip_refused", "Requests refused because the client fills its share of the queue"
)
VERSION = Gauge("retrieval_tip_index_version", "Version of a served index", ["index"])
KEYS = Gauge("retrieval_tip_index_keys", "Keys of a served index", ["index"])
RELOADS = Counter("retrieval_tip_reloads", "New versions found", ["index", "outcome"])
