"""The server's instruments, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

_SECONDS = (0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0)
_ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256)


class Metrics:
    """All instruments of one server in a registry of their own; every one has the label ``model``."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        model = ["model"]

        def gauge(name: str, text: str, labels: list[str] = model) -> Gauge:
            return Gauge(f"yunque_{name}", text, labels, registry=self.registry)

        def counter(name: str, text: str, labels: list[str] = model) -> Counter:
            return Counter(f"yunque_{name}", text, labels, registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
            return Histogram(f"yunque_{name}", text, model, buckets=buckets, registry=self.registry)

        self.queued = gauge("queued", "Texts that wait for a place.")
        self.running = gauge("running", "Texts in the running batch.")
        self.max_rows = gauge("max_rows", "Texts that the batch may hold.")
        self.cache_bytes = gauge("cache_bytes", "Bytes that the caches take now.")
        self.budget_bytes = gauge("cache_budget_bytes", "Bytes that caches and working memory may take.")
        self.tokens_per_s = gauge("tokens_per_second", "New tokens a second, over the last seconds with work.")
        self.info = gauge("model_info", "1 for each served model.", ["model", "kind", "manifest_sha256"])
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts read.")
        self.new_tokens = counter("new_tokens", "Tokens made.")
        self.finished = counter("finished", "Texts that ended, by reason.", ["model", "reason"])
        self.refused = counter("refused", "Requests refused, by reason.", ["model", "reason"])
        self.restarts = counter("worker_restarts", "Times that an engine's worker failed and began again.")
        self.swaps = counter("swaps", "Swaps of a model's folder, by outcome.", ["model", "outcome"])
        self.guarded = counter("guarded", "Answers that the guard scored, by what it did.", ["model", "action"])
        self.batch_size = histogram("batch_size", "Texts given a token by one step.", _ROWS)
        self.step_s = histogram("step_seconds", "Seconds of one step.")
        self.queue_s = histogram("queue_seconds", "Seconds from arrival to joining the batch.")
        self.first_token_s = histogram("time_to_first_token_seconds", "Seconds from arrival to the first token.")
        self.inter_token_s = histogram("inter_token_seconds", "Seconds between two tokens of a text.")
        self.request_s = histogram("request_seconds", "Seconds from arrival to the end of a text.")

    def exposition(self) -> bytes:
        """All values in Prometheus' text format, of type ``content_type``."""
        return bytes(generate_latest(self.registry))


class EngineMetrics:
    """The instruments of one model."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        self.all = metrics
        self.model = model
        self.queued = metrics.queued.labels(model)
        self.running = metrics.running.labels(model)
        self.max_rows = metrics.max_rows.labels(model)
        self.cache_bytes = metrics.cache_bytes.labels(model)
        self.budget_bytes = metrics.budget_bytes.labels(model)
        self.tokens_per_s = metrics.tokens_per_s.labels(model)
        self.prompt_tokens = metrics.prompt_tokens.labels(model)
        self.new_tokens = metrics.new_tokens.labels(model)
        self.restarts = metrics.restarts.labels(model)
        self.batch_size = metrics.batch_size.labels(model)
        self.step_s = metrics.step_s.labels(model)
        self.queue_s = metrics.queue_s.labels(model)
        self.first_token_s = metrics.first_token_s.labels(model)
        self.inter_token_s = metrics.inter_token_s.labels(model)
        self.request_s = metrics.request_s.labels(model)

    def finished(self, reason: str) -> None:
        """Count a text that ended."""
        self.all.finished.labels(self.model, reason).inc()

    def refused(self, reason: str) -> None:
        """Count a request that was not taken."""
        self.all.refused.labels(self.model, reason).inc()

    def guarded(self, action: str) -> None:
        """Count an answer that the guard scored: ``passed``, ``flagged`` or ``blocked``."""
        self.all.guarded.labels(self.model, action).inc()
