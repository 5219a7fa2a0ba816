"""llama.cpp in this process, through xllamacpp's Server: continuous batching, grammars, no compiler on the box.

The behaviour of xllamacpp 2026.10 (a test in tests/real covers each point):

* A callback that returns True ends the request; its slot is free one decoding step later. During prefill, callbacks
  come only with ``return_progress``, one per batch; with it a request can be cancelled there too.
* The server always opens a listener. A host name that ends in ``.sock`` makes it a Unix socket. The socket is created
  in a private folder and unlinked once the model is loaded, so nothing can connect. On Windows it is a random loopback
  port with a random key.
* Its constructor holds the GIL until the model is loaded, so loading blocks the whole process. A destructor that runs
  before the first pass of its loop never returns, so one token is generated right after loading.
* A JSON Schema that llguidance cannot compile is dropped without an error, and the answer is unconstrained. So every
  schema is tested once: a logit bias forces a token that no JSON begins with, and only a working grammar prevents it.
* In a stream, tokens that end inside a character are not reported; ``exact_ids`` uses the answer that is not streamed.
* ``cache_ram_mib`` is 8 GiB by default; it is set to 0, because the plan's memory figure does not include it.
"""

from __future__ import annotations

import contextlib
import functools
import json
import secrets
import shutil
import socket
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from runtimes.engine import (
    Emit,
    EngineError,
    Piece,
    RequestRefused,
    Sampling,
    check_length,
    iterate,
)
from runtimes.engines.llamacpp.logits import open_scorer as open_scorer
from runtimes.engines.llamacpp.page_cache import bounded_memory
from runtimes.engines.llamacpp.replies import StreamedAnswer, capture_stderr, log_reason, logprobs, refusal
from runtimes.manifest import Run
from runtimes.process import limit_spinning
from runtimes.process import resident_bytes as resident_bytes

# Prompt tokens per prefill batch on a CPU, between two checks for a cancel. llama.cpp's own micro-batch is 512.
CPU_BATCH = 512
SCHEMAS_REMEMBERED = 256


class LlamaCpp:
    """One loaded GGUF. ``slots`` requests are decoded together, each with its own ``context`` tokens.

    batch: prompt tokens per prefill batch. extra_buffers: allow llama.cpp's repacked copies of the weights (faster, but
    outside the mapped file). keep_listener: keep the private socket (benchmarks use it). Raises EngineError when the
    file does not load.
    """

    def __init__(
        self,
        run: Run,
        *,
        batch: int = CPU_BATCH,
        warmup: bool = True,
        extra_buffers: bool = True,
        keep_listener: bool = False,
        verbose: bool = False,
    ) -> None:
        limit_spinning()
        import xllamacpp

        self.context, self.slots = run.context, run.slots
        self.version = f"xllamacpp {xllamacpp.__version__}"
        self._stop_ids = frozenset(run.stop_ids)
        self._tokenizer = run.tokenizer
        self._schemas: OrderedDict[str, bool] = OrderedDict()
        self._schemas_lock = threading.Lock()
        self._folder = Path(tempfile.mkdtemp(prefix="runtimes-"))
        self._key = secrets.token_urlsafe(32)
        log: Sequence[str] = ()
        try:
            parameters = self._parameters(xllamacpp, run, batch, warmup, extra_buffers, verbose)
            with capture_stderr(not verbose) as log:
                self._server: Any = xllamacpp.Server(parameters)
        except (RuntimeError, ValueError) as error:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise EngineError(f"llama.cpp cannot load {run.model.name}: {log_reason(log) or error}") from None
        self.address = str(self._server.listening_address)
        # One token shows that llama.cpp's loop runs: a Server that is destroyed before that never returns.
        try:
            self._call({"prompt": [0], "n_predict": 1, "temperature": 0.0}, lambda _: False)
        except BaseException:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise
        if not keep_listener:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _parameters(
        self, xllamacpp: Any, run: Run, batch: int, warmup: bool, extra_buffers: bool, verbose: bool
    ) -> Any:
        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(run.model)
        parameters.model_alias = [run.name]
        parameters.n_ctx = run.context * run.slots
        parameters.n_parallel = run.slots
        parameters.kv_unified = False  # every slot has its whole context, independent of the others
        parameters.n_batch = parameters.n_ubatch = batch
        parameters.n_gpu_layers = run.gpu_layers
        parameters.no_extra_bufts = not extra_buffers
        parameters.fit_params = False
        parameters.cache_ram_mib = 0
        parameters.ctx_shift = False
        parameters.warmup = warmup
        types = {"f16": "F16", "f32": "F32", "bf16": "BF16", "q8_0": "Q8_0", "q4_0": "Q4_0"}
        if run.kv_type not in types:
            raise ValueError(f"kv_type is {run.kv_type!r}, known are {', '.join(types)}")
        kv = getattr(xllamacpp.ggml_type, f"GGML_TYPE_{types[run.kv_type]}")
        parameters.cache_type_k = parameters.cache_type_v = kv
        flash = xllamacpp.llama_flash_attn_type
        parameters.flash_attn_type = (
            flash.LLAMA_FLASH_ATTN_TYPE_ENABLED if run.flash_attention else flash.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = run.threads or -1
        parameters.verbosity = 4 if verbose else 1
        parameters.ui = parameters.endpoint_slots = parameters.endpoint_props = False
        parameters.api_keys = [self._key]
        parameters.port = 0
        parameters.hostnames = [str(self._folder / "s.sock") if hasattr(socket, "AF_UNIX") else "127.0.0.1"]
        parameters.n_threads_http = 1
        parameters.offline = True
        return parameters

    # -- generating ---------------------------------------------------------------------------------------------

    def stream(self, prompt: Sequence[int], sampling: Sampling, emit: Emit) -> None:
        """Generate in the calling thread; ``emit`` is called for every piece and cancels by returning True."""
        check_length(prompt, self.context)
        if sampling.schema is not None:
            self._check_schema(sampling.schema)
        request = self._request(prompt, sampling)
        if sampling.exact_ids:
            self._whole(request, sampling, emit)
            return
        state = StreamedAnswer(sampling, self._stop_ids, emit)
        request["stream"] = True
        self._call(request, state.take)
        if state.error is not None:
            raise state.error

    def generate(self, prompt: Sequence[int], sampling: Sampling) -> Iterator[Piece]:
        """The pieces of one answer; closing the iterator cancels and frees the slot."""
        return iterate(lambda emit: self.stream(prompt, sampling, emit))

    def _request(self, prompt: Sequence[int], sampling: Sampling) -> dict[str, Any]:
        request: dict[str, Any] = {
            "prompt": list(prompt),
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            # greedy: the same choice without a softmax over the whole vocabulary (5 % of a small model's time)
            "top_k": sampling.top_k if sampling.temperature > 0 else 1,
            "min_p": sampling.min_p,
            "repeat_penalty": sampling.repetition_penalty,
            "presence_penalty": sampling.presence_penalty,
            "frequency_penalty": sampling.frequency_penalty,
            "seed": -1 if sampling.seed is None else sampling.seed & 0xFFFFFFFF,
            "verbose": True,  # only the verbose part of a chunk has its token id
            "return_tokens": True,
            "return_progress": True,
            "n_predict": -1 if sampling.max_tokens is None else sampling.max_tokens,
        }
        if sampling.logprobs is not None:
            request["n_probs"] = max(1, sampling.logprobs)
        if sampling.logit_bias:
            request["logit_bias"] = [[token, bias] for token, bias in sampling.logit_bias.items()]
        if sampling.schema is not None:
            request["json_schema"] = json.loads(sampling.schema)
        return request

    def _whole(self, request: dict[str, Any], sampling: Sampling, emit: Emit, end: tuple[int, ...] = ()) -> None:
        """The answer in one piece, not streamed: only it has every token id. end: the end token to add to its ids."""
        request["stream"] = False
        if sampling.stop:
            request["stop"] = list(sampling.stop)
        answers: list[dict[str, Any]] = []

        def take(data: bytes) -> bool:
            answers.append(json.loads(data))
            return False

        self._call(request, take)
        answer = answers[-1]
        if "error" in answer:
            raise refusal(answer["error"])
        choice, usage, extra = answer["choices"][0], answer["usage"], answer["__verbose"]
        text, ids, finish = choice["text"], tuple(extra["tokens"]), choice["finish_reason"]
        met = next((at for at, token in enumerate(ids) if token in self._stop_ids), None)
        if met is not None and (met + 1 < len(ids) or finish == "length"):
            # an end token that the GGUF does not mark as one: its text is in the answer, so generate up to it again
            if met == 0:
                emit(Piece("", ids[:1], 1, (), "stop", usage["prompt_tokens"]))
                return
            self._whole({**request, "n_predict": met}, sampling, emit, ids[met : met + 1])
            return
        emit(
            Piece(
                text=text.rstrip("\ufffd") if finish == "length" else text,
                ids=(*ids, *end),
                tokens=usage["completion_tokens"] + len(end),
                logprobs=logprobs(choice, sampling),
                finish="stop" if end or met is not None else finish,
                prompt_tokens=usage["prompt_tokens"],
                cached_tokens=usage["prompt_tokens_details"]["cached_tokens"],
            )
        )

    def _call(self, request: Mapping[str, Any], take: Callable[[bytes], object]) -> None:
        try:
            self._server.handle_completions(json.dumps(request).encode(), take)
        except RuntimeError as error:
            raise EngineError(f"llama.cpp failed: {error}") from None

    def _check_schema(self, schema: str) -> None:
        """Raise RequestRefused for a schema that llguidance would silently ignore."""
        with self._schemas_lock:
            known = self._schemas.get(schema)
        if known is None:
            known = self._grammar_holds(schema)
            with self._schemas_lock:
                self._schemas[schema] = known
                while len(self._schemas) > SCHEMAS_REMEMBERED:
                    self._schemas.popitem(last=False)
        if not known:
            raise RequestRefused(
                "This JSON Schema cannot be enforced (an unknown type, an unresolved $ref or an unsupported keyword).",
                code="invalid_json_schema",
                param="response_format",
            )

    def _grammar_holds(self, schema: str) -> bool:
        request = self._request([0], Sampling(temperature=0.0, max_tokens=1, schema=schema))
        request |= {"stream": False, "cache_prompt": False, "logit_bias": [["~", 1000.0]]}
        answers: list[dict[str, Any]] = []
        self._call(request, lambda data: answers.append(json.loads(data)))
        return "error" not in answers[-1] and "~" not in answers[-1]["choices"][0]["text"]

    # -- the rest of the protocol -------------------------------------------------------------------------------

    def top(self, prompts: Sequence[Sequence[int]], top: int) -> list[dict[int, float]]:
        """The ``top`` likeliest next tokens of each prompt with their log-probabilities, before any sampling.

        All prompts are decoded in one batch, one slot each; a prompt that extends the one in its slot's cache costs
        only the new tokens. Raises EngineError. (logits.Scorer does this faster, without a Server.)
        """
        # llama.cpp reports no probabilities when the chosen token ends inside a UTF-8 character, so a bias makes it
        # choose a letter. The bias changes the choice only; n_probs reports the model's own logits.
        request = {
            "prompt": [list(prompt) for prompt in prompts],
            "temperature": 0.0,
            "n_predict": 1,
            "n_probs": top,
            "logit_bias": [[self.letter, 1000.0]],
        }
        answers: list[dict[str, Any]] = []
        self._call(request, lambda data: answers.append(json.loads(data)))
        answer = answers[-1]
        if "error" in answer:
            raise refusal(answer["error"])
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        rows = [choice["logprobs"]["content"][0]["top_logprobs"] if choice["logprobs"] else [] for choice in choices]
        return [{entry["id"]: entry["logprob"] for entry in row} for row in rows]

    def score(self, tokens: Sequence[int], top: int) -> Iterator[Mapping[int, float]]:
        """The ``top`` likeliest tokens after every prefix of ``tokens``."""
        for end in range(1, len(tokens) + 1):
            yield self.top([tokens[:end]], top)[0]

    @functools.cached_property
    def letter(self) -> int:
        """The id of the plain letter "a", which every vocabulary has."""
        from tokenizers import Tokenizer

        token = Tokenizer.from_file(str(self._tokenizer)).token_to_id("a")
        if token is None:
            raise EngineError("the tokenizer has no token for the letter a, so positions cannot be scored")
        return int(token)

    def memory(self) -> int:
        """Resident bytes of this process; the model runs in it."""
        return resident_bytes()

    def close(self) -> None:
        """Stop llama.cpp's threads and free the model. Running generations must have ended."""
        self._server = None
        shutil.rmtree(self._folder, ignore_errors=True)


def load(run: Run, *, verbose: bool) -> LlamaCpp:
    """The engine of a manifest. Raises EngineError."""
    return LlamaCpp(run, verbose=verbose)


@contextlib.contextmanager
def load_within(run: Run, max_rss_bytes: int | None, *, verbose: bool) -> Iterator[LlamaCpp]:
    """The engine with resident memory near ``max_rss_bytes``, for the build machine. Without the warm-up, which reads
    all weights while the constructor holds the GIL and so blocks the thread that drops their pages. Raises EngineError.
    """
    with bounded_memory(run.model, max_rss_bytes) as mapped:
        engine = LlamaCpp(run, warmup=False, extra_buffers=max_rss_bytes is None, verbose=verbose)
        mapped()
        yield engine
