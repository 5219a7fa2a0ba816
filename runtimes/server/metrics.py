"""The metrics of /metrics, for Prometheus. Times in seconds, sizes in bytes; counters never fall."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_BETWEEN = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5)


_COMPUTE = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_TEXTS = (1, 2, 4, 8, 16, 32, 64)


class BaseMetrics:
    """The metrics of every model's server. One registry per server, so that two in one process do not mix.

    memory: returns resident bytes; called at every scrape.
    """

    def __init__(self, memory: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        self.requests = Counter(
            "packager_requests", "Requests answered, by path and HTTP status", ["path", "status"], registry=registry
        )
        self.prompt_tokens = Counter("packager_prompt_tokens", "Tokens of all prompts", registry=registry)
        self.ready = Gauge("packager_ready", "1 when the model is loaded and has answered", registry=registry)
        resident = Gauge(
            "packager_resident_memory_bytes", "Memory of the server, known device memory included", registry=registry
        )
        resident.set_function(memory)

    def text(self) -> bytes:
        """The exposition format, version 0.0.4."""
        return generate_latest(self.registry)


class EncoderMetrics(BaseMetrics):
    """The metrics of an encoder's server. device: returns the bytes on the GPU; None for an engine without a GPU."""

    def __init__(self, memory: Callable[[], int], device: Callable[[], int] | None = None) -> None:
        super().__init__(memory)
        registry = self.registry
        if device is not None:
            held = Gauge("packager_device_memory_bytes", "Device memory that the engine holds", registry=registry)
            held.set_function(device)
        self.batch = Histogram("packager_batch_texts", "Texts computed together", buckets=_TEXTS, registry=registry)
        self.compute = Histogram(
            "packager_batch_seconds", "Time to compute one batch", buckets=_COMPUTE, registry=registry
        )
        self.waited = Histogram(
            "packager_wait_seconds", "From a text's arrival to its batch", buckets=_COMPUTE, registry=registry
        )
        self.waiting = Gauge("packager_waiting", "Texts that wait for a batch", registry=registry)


class Metrics(BaseMetrics):
    """The metrics of a language model's server."""

    def __init__(self, memory: Callable[[], int]) -> None:
        super().__init__(memory)
        registry = self.registry
        self.cancelled = Counter("packager_cancelled", "Answers that the client cancelled", registry=registry)
        self.cached_tokens = Counter(
            "packager_cached_prompt_tokens", "Prompt tokens taken from a slot's KV cache", registry=registry
        )
        self.tokens = Counter("packager_generated_tokens", "Tokens generated", registry=registry)
        self.first = Histogram(
            "packager_time_to_first_token_seconds",
            "From the request's arrival to its first token, queueing included",
            buckets=_FIRST,
            registry=registry,
        )
        self.between = Histogram(
            "packager_inter_token_seconds", "Between two tokens of one answer", buckets=_BETWEEN, registry=registry
        )
        self.running = Gauge("packager_running", "Answers being generated", registry=registry)
        self.waiting = Gauge("packager_waiting", "Requests that wait for a slot", registry=registry)
