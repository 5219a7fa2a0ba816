"""The model's own distributions, from the C interface of the llama.cpp library in xllamacpp.

xllamacpp has no Python call for logits. Its Server gives one position per request, reads all weights while it holds the
GIL, and leaves out positions whose greedy token ends inside a character. The shared library exports the C functions;
called through ctypes they release the GIL, and one pass over a sequence gives all of its positions.

The two parameter structs below are those of llama.h in xllamacpp 2026.10. The library's own ``*_default_params`` fill
them, and they are compared with the known defaults before use, so that another layout is refused and not misread.
"""

from __future__ import annotations

import contextlib
import ctypes
import heapq
import math
import os
from collections.abc import Callable, Iterator, Sequence
from ctypes import POINTER, Structure, c_bool, c_char_p, c_float, c_int8, c_int32, c_size_t, c_uint32, c_void_p
from dataclasses import replace
from typing import Any

from runtimes.engine import EngineError
from runtimes.engines.llamacpp.page_cache import bounded_memory
from runtimes.manifest import Run
from runtimes.process import limit_spinning

_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, c_char_p, c_void_p)
_ERROR = 4
# Logits take tokens x vocabulary x 4 bytes: 64 keeps them at 39 MB for 152,000 entries.
SCORE_BATCH = 64
KV_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 8, "bf16": 30}


class _ModelParams(Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("devices", "buffer_overrides")),
        *((name, c_int32) for name in ("n_gpu_layers", "split_mode", "load_mode", "lazy_mode", "main_gpu")),
        *((name, c_void_p) for name in ("tensor_split", "progress", "progress_data", "kv_overrides")),
        *((name, c_bool) for name in ("vocab_only", "check_tensors", "use_extra_bufts", "no_host", "no_alloc", "mtp")),
    )


class _ContextParams(Structure):
    _fields_ = (
        *((name, c_uint32) for name in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_rs_seq")),
        *((name, c_uint32) for name in ("n_outputs_max", "n_outputs_max_per_seq")),
        *((name, c_int32) for name in ("n_threads", "n_threads_batch", "ctx_type", "rope_scaling", "pooling")),
        *((name, c_int32) for name in ("attention", "flash_attention")),
        *((name, c_float) for name in ("rope_base", "rope_scale", "yarn_ext", "yarn_attn", "yarn_fast", "yarn_slow")),
        ("yarn_context", c_uint32),
        ("defrag", c_float),
        *((name, c_void_p) for name in ("eval_callback", "eval_data")),
        *((name, c_int32) for name in ("type_k", "type_v")),
        ("moe_cache", c_size_t),
        *((name, c_void_p) for name in ("abort_callback", "abort_data")),
        *((name, c_bool) for name in ("embeddings", "offload_kqv", "no_perf", "op_offload", "swa_full", "kv_unified")),
        ("samplers", c_void_p),
        ("n_samplers", c_size_t),
        ("other", c_void_p),
    )


class _Batch(Structure):
    _fields_ = (
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", POINTER(c_float)),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    )


_MODEL_DEFAULTS: dict[str, object] = {
    **{"n_gpu_layers": -1, "split_mode": 1, "load_mode": -1, "lazy_mode": 1, "main_gpu": 0, "kv_overrides": None},
    **{"check_tensors": False, "use_extra_bufts": True, "no_alloc": False},
}
_CONTEXT_DEFAULTS: dict[str, object] = {
    **{"n_ctx": 512, "n_batch": 2048, "n_ubatch": 512, "n_seq_max": 1, "n_outputs_max_per_seq": 1},
    **{"flash_attention": -1, "yarn_slow": -1.0, "defrag": -1.0, "eval_callback": None, "type_k": 1, "type_v": 1},
    **{"abort_data": None, "offload_kqv": True, "no_perf": True, "kv_unified": False, "other": None},
}


class Scorer:
    """One loaded model for scoring. batch: tokens per decode; logits take batch x vocabulary x 4 bytes.

    extra_buffers: allow repacked copies of the weights. loaded: called once the file is mapped. Raises EngineError.
    """

    def __init__(
        self, run: Run, *, batch: int, extra_buffers: bool, verbose: bool, loaded: Callable[[], None] = lambda: None
    ) -> None:
        limit_spinning()
        import xllamacpp

        self.version = f"xllamacpp {xllamacpp.__version__}"
        self._batch = batch
        self._model = self._context = None
        self._library = library = _library(xllamacpp.xllamacpp.__file__)
        model, context = library.llama_model_default_params(), library.llama_context_default_params()
        _check(model, _MODEL_DEFAULTS, self.version)
        _check(context, _CONTEXT_DEFAULTS, self.version)
        if run.kv_type not in KV_TYPES:
            raise EngineError(f"kv_type is {run.kv_type!r}, known are {', '.join(KV_TYPES)}.")
        model.n_gpu_layers, model.use_extra_bufts = run.gpu_layers, extra_buffers
        context.n_ctx, context.n_batch, context.n_ubatch = run.context, batch, batch
        context.n_outputs_max, context.n_outputs_max_per_seq = batch, 0
        context.n_threads = context.n_threads_batch = run.threads or _cores()
        context.flash_attention = int(run.flash_attention)
        context.type_k = context.type_v = KV_TYPES[run.kv_type]
        errors: list[str] = []
        self._log = _LOG(
            lambda level, text, _: errors.append(text.decode(errors="replace")) if level == _ERROR else None
        )
        if not verbose:
            library.llama_log_set(self._log, None)
        library.llama_backend_init()
        self._model = library.llama_model_load_from_file(os.fsencode(run.model), model)
        loaded()
        if self._model:
            self._context = library.llama_init_from_model(self._model, context)
        if not self._context:
            self.close()
            raise EngineError(f"llama.cpp cannot load {run.model.name}: {_reason(errors)}")
        self._vocabulary = library.llama_model_get_vocab(self._model)
        self.size = int(library.llama_vocab_n_tokens(self._vocabulary))

    def top(self, ids: Sequence[int], positions: Sequence[int], top: int) -> Iterator[tuple[int, dict[int, float]]]:
        """For each position p, ascending: p and the ``top`` likeliest tokens after ids[:p], with log-probabilities."""
        ordered = sorted(set(positions))
        if not ordered:
            return
        if ordered[0] < 1 or ordered[-1] > len(ids):
            raise ValueError(f"positions {ordered[0]} to {ordered[-1]} do not lie in a sequence of {len(ids)} tokens")
        if any(not 0 <= token < self.size for token in ids):
            raise ValueError(f"a token id lies outside the vocabulary of {self.size}")
        library = self._library
        library.llama_memory_clear(library.llama_get_memory(self._context), True)
        wanted = set(ordered)
        for start in range(0, ordered[-1], self._batch):
            chunk = list(ids[start : min(start + self._batch, ordered[-1])])
            rows = [at for at in range(len(chunk)) if start + at + 1 in wanted]
            self._decode(chunk, start, rows)
            for row in rows:
                logits = library.llama_get_logits_ith(self._context, row)
                if not logits:
                    raise EngineError(f"llama.cpp gave no logits for position {start + row + 1}")
                yield start + row + 1, top_logprobs(ctypes.cast(logits, POINTER(c_float * self.size)).contents, top)

    def _decode(self, part: Sequence[int], start: int, rows: Sequence[int]) -> None:
        """Compute tokens at positions start…; only ``rows`` of them get logits."""
        count = len(part)
        sequence = (c_int32 * 1)(0)
        kept = set(rows)
        batch = _Batch(
            n_tokens=count,
            token=(c_int32 * count)(*part),
            pos=(c_int32 * count)(*range(start, start + count)),
            n_seq_id=(c_int32 * count)(*([1] * count)),
            seq_id=(POINTER(c_int32) * count)(*([ctypes.cast(sequence, POINTER(c_int32))] * count)),
            logits=(c_int8 * count)(*(int(at in kept) for at in range(count))),
        )
        code = self._library.llama_decode(self._context, batch)
        if code != 0:
            raise EngineError(f"llama.cpp cannot compute positions {start} to {start + count} (code {code})")

    def tokenize(self, text: str) -> list[int]:
        """The GGUF's own tokenizer: special tokens recognised, none added."""
        raw = text.encode()
        room = len(raw) + 16
        out = (c_int32 * room)()
        count = self._library.llama_tokenize(self._vocabulary, raw, len(raw), out, room, False, True)
        if count < 0:
            raise EngineError("llama.cpp cannot tokenize the text")
        return list(out[:count])

    def vocabulary(self, ids: Sequence[int]) -> dict[str, object]:
        """llama.cpp's reading of the GGUF's tokens: whether it puts BOS before a text, and which of ``ids`` it takes
        for end tokens.
        """
        library, vocabulary = self._library, self._vocabulary
        return {
            "adds_bos": bool(library.llama_vocab_get_add_bos(vocabulary)),
            "ends": [token for token in ids if library.llama_vocab_is_eog(vocabulary, token)],
        }

    def close(self) -> None:
        """Free the context and the model."""
        if self._context:
            self._library.llama_free(self._context)
        if self._model:
            self._library.llama_model_free(self._model)
        self._context = self._model = None


@contextlib.contextmanager
def open_scorer(run: Run, *, longest: int, max_rss_bytes: int | None, verbose: bool) -> Iterator[Scorer]:
    """A Scorer for sequences of up to ``longest`` tokens. max_rss_bytes also turns off llama.cpp's repacked copies of
    the weights, which are outside the mapped file. Raises EngineError.
    """
    # llama.cpp rounds contexts up to multiples of 256
    run = replace(run, slots=1, context=max(256, (longest + 255) // 256 * 256))
    with bounded_memory(run.model, max_rss_bytes) as loaded:
        scorer = Scorer(run, batch=SCORE_BATCH, extra_buffers=max_rss_bytes is None, verbose=verbose, loaded=loaded)
        with contextlib.closing(scorer):
            yield scorer


def top_logprobs(logits: Any, top: int) -> dict[int, float]:
    """The ``top`` likeliest tokens and their natural log-probabilities (softmax over all), likeliest first.

    logits: a ctypes array of floats. Of equal ones the lower id comes first. Uses numpy where it is installed.
    """
    with contextlib.suppress(ImportError):
        import numpy

        values = numpy.ctypeslib.as_array(logits).astype(numpy.float64)
        highest = values.max()
        total = float(highest + numpy.log(numpy.exp(values - highest).sum()))
        count = min(top, len(values))
        edge = numpy.partition(values, len(values) - count)[len(values) - count]
        near = numpy.flatnonzero(values >= edge)
        best = near[numpy.argsort(-values[near], kind="stable")][:count]
        return {int(token): float(values[token]) - total for token in best}
    return _plain_top(list(logits), top)


def _plain_top(values: list[float], top: int) -> dict[int, float]:
    highest = max(values)
    total = highest + math.log(math.fsum(math.exp(value - highest) for value in values))
    best = heapq.nsmallest(top, range(len(values)), key=lambda token: (-values[token], token))
    return {token: values[token] - total for token in best}


def _library(path: str) -> Any:
    """The library with the C types of its functions that are used here. Raises EngineError."""
    library = ctypes.CDLL(path)
    for name, result, arguments in (
        ("llama_log_set", None, (_LOG, c_void_p)),
        ("llama_backend_init", None, ()),
        ("llama_model_default_params", _ModelParams, ()),
        ("llama_context_default_params", _ContextParams, ()),
        ("llama_model_load_from_file", c_void_p, (c_char_p, _ModelParams)),
        ("llama_init_from_model", c_void_p, (c_void_p, _ContextParams)),
        ("llama_model_get_vocab", c_void_p, (c_void_p,)),
        ("llama_vocab_n_tokens", c_int32, (c_void_p,)),
        ("llama_get_memory", c_void_p, (c_void_p,)),
        ("llama_vocab_get_add_bos", c_bool, (c_void_p,)),
        ("llama_vocab_is_eog", c_bool, (c_void_p, c_int32)),
        ("llama_memory_clear", None, (c_void_p, c_bool)),
        ("llama_decode", c_int32, (c_void_p, _Batch)),
        ("llama_get_logits_ith", POINTER(c_float), (c_void_p, c_int32)),
        ("llama_tokenize", c_int32, (c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool)),
        ("llama_free", None, (c_void_p,)),
        ("llama_model_free", None, (c_void_p,)),
    ):
        try:
            function = getattr(library, name)
        except AttributeError:
            raise EngineError(f"this xllamacpp does not export {name}; install the bundle's version") from None
        function.restype, function.argtypes = result, arguments
    return library


def _check(parameters: Structure, defaults: dict[str, object], version: str) -> None:
    actual = {name: getattr(parameters, name) for name in defaults}
    if actual != defaults:
        raise EngineError(f"{version} lays out llama.cpp's parameters in an unknown way; install the bundle's version.")


def _reason(errors: Sequence[str]) -> str:
    """The first error llama.cpp logged, without the name of the function."""
    return errors[0].partition(": ")[2].strip() if errors else "--verbose shows its log"


def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1
