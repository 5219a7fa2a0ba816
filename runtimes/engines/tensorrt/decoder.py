"""Language models through TensorRT: the typed ONNX of packager/formats/tensorrt/decoder_graph.py; slots are batched.

Sampling, templates and the queue are in runtimes/decoding/ (scheduler.py), as for onnxruntime. The KV cache differs: on
the GPU the engine updates it in place (TensorRT's KVCacheUpdate), so input and output have one address and nothing is
copied. On the CPU, for ``--device cpu`` and for the comparison on the build machine, the cache is arrays that the
session returns.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from runtimes.decoding.scheduler import Scheduler, Scorer
from runtimes.engine import EngineError
from runtimes.engines.tensorrt.open import home_of, kernels_file, prepare
from runtimes.engines.tensorrt.plan import Plan, Profile, read_plan
from runtimes.manifest import ManifestError, Run

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

DEVICES = ("gpu", "cpu")
PAST, PRESENT, LOGITS = "past_key_values.", "present.", "logits"


class Caches(Protocol):
    """A session and its rows of the KV cache."""

    def step(self, inputs: Mapping[str, NDArray[Any]], slot: int, rows: int) -> NDArray[np.float32]:
        """The logits, with the new keys and values written for the rows from ``slot`` on. Raises EngineError."""
        ...

    def memory(self) -> int: ...

    def close(self) -> None: ...


class Model:
    """An opened engine with a row of the KV cache for each slot. Not thread-safe. Raises EngineError."""

    def __init__(self, caches: Caches, profile: Profile, vocabulary: int, version: str, rows: int) -> None:
        self._caches, self.vocabulary, self.version = caches, vocabulary, version
        self._rows, self._tokens = rows, profile["input_ids"].max[1]
        self._kept = profile["wanted"].max[0]
        self._span = profile["places"]

    def run(
        self, ids: NDArray[np.int64], lengths: Sequence[int], *, slot: int = 0, kept: int = 1
    ) -> NDArray[np.float32]:
        """See runtimes.decoding.scheduler.Model. Raises EngineError for more than the engine's profile allows."""
        import numpy as np

        rows, tokens = ids.shape
        after = max(lengths) + tokens
        if slot + rows > self._rows or tokens > self._tokens or kept > self._kept or after > self._span.max[0]:
            raise EngineError(f"{rows} rows of {tokens} tokens up to {after} are more than the engine takes")
        span = min(max(rounded(after), self._span.min[0]), self._span.max[0])
        inputs = {
            "input_ids": np.ascontiguousarray(ids, np.int64),
            "start": np.array(lengths, np.int64),
            "places": np.arange(span, dtype=np.int64),
            "wanted": np.arange(tokens - kept, tokens, dtype=np.int64),
        }
        return self._caches.step(inputs, slot, rows)

    def memory(self) -> int:
        """Known bytes on the device."""
        return self._caches.memory()

    def close(self) -> None:
        """Free the engine."""
        self._caches.close()


def rounded(places: int) -> int:
    """The attended cache positions, rounded up to a power of two from 64 on: few shapes, because each new one costs."""
    return max(64, 1 << (places - 1).bit_length())


class HostCaches:
    """onnxruntime on the CPU, with the KV cache as arrays: every run takes them and returns new ones.

    The graph is run as it is in the file: folding would keep every weight in float32, and fusing would skip roundings
    to float16 that TensorRT does. rows: concurrent conversations. Raises EngineError.
    """

    def __init__(self, plan: Plan, rows: int, *, threads: int, verbose: bool) -> None:
        import numpy as np

        from runtimes.engines.onnxruntime.session import open_session, quiet_onnxruntime

        self._session: Any = open_session(plan.onnx, threads=threads, verbose=verbose, optimized=False)
        self.version = f"onnxruntime {quiet_onnxruntime().__version__}"
        self._outputs = [one.name for one in plan.outputs]
        shapes = {name: shapes.max for name, shapes in plan.profiles[0].items() if name.startswith(PAST)}
        self._held = {name: np.zeros((rows, *shape[1:]), np.float16) for name, shape in shapes.items()}

    def step(self, inputs: Mapping[str, NDArray[Any]], slot: int, rows: int) -> NDArray[np.float32]:
        past = {name: held[slot : slot + rows] for name, held in self._held.items()}
        try:
            made = self._session.run(self._outputs, {**inputs, **past})
        except Exception as error:  # onnxruntime's errors share no class of their own
            raise EngineError(f"onnxruntime failed: {error}") from None
        outputs = dict(zip(self._outputs, made, strict=True))
        for name, held in self._held.items():
            held[slot : slot + rows] = outputs[PRESENT + name.removeprefix(PAST)]
        logits: NDArray[np.float32] = outputs[LOGITS]
        return logits

    def memory(self) -> int:
        """0: the arrays are in this process."""
        return 0

    def close(self) -> None:
        """Free the session and the arrays."""
        self._session = None
        self._held.clear()


def open_model(run: Run, *, rows: int, verbose: bool) -> Model:
    """The engine of a manifest. Raises ManifestError or EngineError with one sentence."""
    plan = read_plan(run.model)
    device = run.device or str(run.settings.get("device", DEVICES[0]))
    profile = plan.profiles[0]
    if not {"input_ids", "start", "places", "wanted"} <= profile.keys():
        raise ManifestError(f"{run.model.name} is not a language model's plan; copy the bundle again.")
    if device not in DEVICES:
        raise EngineError(f"There is no device {device!r}; choose {', '.join(DEVICES)}.")
    if device == "cpu":
        caches = HostCaches(plan, rows, threads=run.threads, verbose=verbose)
        vocabulary = _vocabulary(run, caches)
        return Model(caches, profile, vocabulary, caches.version, rows)
    from runtimes.engines.tensorrt.cache_session import CacheSession

    home = home_of(run)
    ready = prepare(plan, home)
    kernels = kernels_file(plan, home, ready.device)
    session = CacheSession(plan, ready.profile, ready.engine, kernels=kernels, verbose=verbose)
    return Model(session, ready.profile, _vocabulary(run, session), session.version, rows)


def _vocabulary(run: Run, caches: Caches) -> int:
    """The size of the vocabulary, from one decoded token; a model that cannot compute fails here, at start-up."""
    import numpy as np

    one = {
        "input_ids": np.zeros((1, 1), np.int64),
        "start": np.zeros(1, np.int64),
        "places": np.arange(64, dtype=np.int64),
        "wanted": np.zeros(1, np.int64),
    }
    return int(caches.step(one, 0, 1).shape[2])


@contextlib.contextmanager
def open_scorer(run: Run, *, longest: int, max_rss_bytes: int | None, verbose: bool) -> Iterator[Scorer]:
    """A Scorer. The plan's profile limits the length; max_rss_bytes has no effect."""
    model = open_model(run, rows=1, verbose=verbose)
    try:
        yield Scorer(run, model)
    finally:
        model.close()


def load(run: Run, *, verbose: bool) -> Scheduler:
    """The engine of a manifest. Raises ManifestError or EngineError."""
    return Scheduler(run, open_model(run, rows=run.slots, verbose=verbose))
