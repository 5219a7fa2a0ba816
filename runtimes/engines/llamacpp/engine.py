"""llama.cpp in this process, through xllamacpp's Server: continuous batching, grammars, no compiler on the box.

What xllamacpp 2026.10 was found to do (each point is covered by a test in tests/real):

* A callback that returns True ends the request, and the slot is free one decoding step later. While a long prompt is
  read callbacks come only with ``return_progress``, one per batch: that is what makes cancelling work there too.
* The server always opens a listener. A host name that ends in ``.sock`` makes it a Unix socket; it is created in a
  private folder and unlinked once the model is up, so nothing can reach it. Windows gets a random loopback port with
  a random key instead.
* Its constructor holds Python's lock until the model is loaded, and a destructor that comes before the first pass of
  its loop waits for ever: so loading blocks the whole process, and one token is asked for at once.
* A JSON Schema that llguidance cannot compile is dropped without an error, and the model answers freely. So every
  schema is probed once: a token that no JSON can begin with is forced, and only a live grammar stops it.
* In a stream, tokens that end in the middle of a character are not reported; ``exact_ids`` takes the plain answer.
* ``cache_ram_mib`` is 8 GiB by default: off, the plan's memory figure would be a lie.
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
from collections.abc import Iterator, Mapping, Sequence
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
from runtimes.engines.llamacpp.page_cache import bounded
from runtimes.engines.llamacpp.replies import Streamed, captured, log_reason, logprobs, refusal
from runtimes.manifest import Run
from runtimes.process import resident_bytes as resident_bytes
from runtimes.process import wait_politely

# Prompt tokens read between two chances to cancel, without a GPU. llama.cpp's own micro-batch is 512.
CPU_BATCH = 512
SCHEMAS_REMEMBERED = 256


class LlamaCpp:
    """One loaded GGUF. ``slots`` requests are decoded together, each with ``context`` tokens of its own.

    batch: tokens a prompt is read in. extra_buffers: allow llama.cpp's repacked copies of the weights (faster, but
    outside the mapped file). keep_listener: leave the private socket in place (benchmarks ask it).
    Raises EngineError when the file does not load.
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
        wait_politely()
        import xllamacpp

        self.context, self.slots = run.context, run.slots
        self.version = f"xllamacpp {xllamacpp.__version__}"
        self._stop_ids = frozenset(run.stop_ids)
        self._tokenizer = run.tokenizer
        self._schemas: OrderedDict[str, bool] = OrderedDict()
        self._schemas_lock = threading.Lock()
        self._folder = Path(tempfile.mkdtemp(prefix="runtimes-"))
        self._key = secrets.token_urlsafe(32)
        said: Sequence[str] = ()
        try:
            parameters = self._parameters(xllamacpp, run, batch, warmup, extra_buffers, verbose)
            with captured(not verbose) as said:
                self._server: Any = xllamacpp.Server(parameters)
        except (RuntimeError, ValueError) as error:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise EngineError(f"llama.cpp cannot load {run.model.name}: {log_reason(said) or error}") from None
        self.address = str(self._server.listening_address)
        # The first token also proves that llama.cpp's loop runs: a Server destroyed before that hangs for ever.
        self._call({"prompt": [0], "n_predict": 1, "temperature": 0.0}, lambda _: False)
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
        parameters.kv_unified = False  # every slot keeps its whole context, whatever the others do
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
        state = Streamed(sampling, self._stop_ids, emit)
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
            # greedy: the same choice, but without a softmax over the whole vocabulary (5 % of a small model's time)
            "top_k": sampling.top_k if sampling.temperature > 0 else 1,
            "min_p": sampling.min_p,
            "repeat_penalty": sampling.repetition_penalty,
            "presence_penalty": sampling.presence_penalty,
            "frequency_penalty": sampling.frequency_penalty,
            "seed": -1 if sampling.seed is None else sampling.seed & 0xFFFFFFFF,
            "verbose": True,  # the only place where a chunk carries its token id
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
        """The plain answer in one piece: it alone carries every token id. end: the end token that comes after it."""
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
            # an end token that the GGUF does not know as one, so its text is in the answer: rare, so done again
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

    def _call(self, request: Mapping[str, Any], take: Any) -> None:
        try:
            self._server.handle_completions(json.dumps(request).encode(), take)
        except RuntimeError as error:
            raise EngineError(f"llama.cpp failed: {error}") from None

    def _check_schema(self, schema: str) -> None:
        """Refuse a schema that llguidance would silently ignore."""
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
        """The ``top`` likeliest next tokens of each prompt with their log-probabilities, as the model gives them.

        All prompts are decoded in one batch, one slot each; a prompt that extends the one its slot saw before costs
        only the new tokens. Raises EngineError. (logits.Scorer does this faster, without a Server.)
        """
        # llama.cpp reports no probabilities when the token it picks ends inside a UTF-8 character: a bias makes it
        # pick a plain letter. The bias acts on the choice only; what n_probs reports are the model's own logits.
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
        """The distribution after every prefix of ``tokens``, cut to the ``top`` likeliest tokens."""
        for end in range(1, len(tokens) + 1):
            yield self.top([tokens[:end]], top)[0]

    @functools.cached_property
    def letter(self) -> int:
        """The id of the plain letter "a", which every vocabulary has."""
        from tokenizers import Tokenizer

        found = Tokenizer.from_file(str(self._tokenizer)).token_to_id("a")
        if found is None:
            raise EngineError("the tokenizer has no token for the letter a, so positions cannot be scored")
        return int(found)

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
    """The engine with resident memory near a ceiling, for the build machine. Not warmed up: that touches all weights
    while the constructor holds Python's lock, and with it the thread that gives them back.
    """
    with bounded(run.model, max_rss_bytes) as mapped:
        engine = LlamaCpp(run, warmup=False, extra_buffers=max_rss_bytes is None, verbose=verbose)
        mapped()
        yield engine
