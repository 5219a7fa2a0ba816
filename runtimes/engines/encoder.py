"""Pre- and post-processing of encoders: texts to token ids, hidden states to a vector, logits to scores.

As in sentence-transformers and transformers' pipelines; the manifest's ``run.settings`` choose the variant.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from runtimes.engine import EngineError, RequestRefused
from runtimes.manifest import Run

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

POOLINGS = ("mean", "cls", "max", "mean_sqrt_len")


@dataclass(frozen=True)
class Text:
    """One text (or pair) as token ids. types: 1 for the second of a pair. cut: tokens that were truncated."""

    ids: tuple[int, ...]
    types: tuple[int, ...]
    cut: int = 0


@dataclass(frozen=True)
class Settings:
    """run.settings, checked. labels and scores: of classifiers; pad_id and token_types: of both; the rest: of
    embedders.
    """

    pad_id: int
    token_types: bool
    pooling: str
    normalize: bool
    lower_case: bool
    prompt: str
    labels: tuple[str, ...]
    scores: str

    @classmethod
    def of(cls, run: Run) -> Settings:
        """The settings of a run. Raises EngineError for a pooling or scores that this runtime does not know."""
        given = run.settings
        pooling, scores = str(given.get("pooling", "mean")), str(given.get("scores", "softmax"))
        if pooling not in POOLINGS or scores not in ("softmax", "sigmoid", "none"):
            raise EngineError(f"This runtime does not support the pooling {pooling!r} or the scores {scores!r}.")
        return cls(
            pad_id=int(given.get("pad_id", 0)),
            token_types=bool(given.get("token_types", False)),
            pooling=pooling,
            normalize=bool(given.get("normalize", False)),
            lower_case=bool(given.get("lower_case", False)),
            prompt=str(given.get("prompt", "")),
            labels=tuple(str(label) for label in given.get("labels") or ()),
            scores=scores,
        )


class Encoder(Protocol):
    """A loaded embedder or classifier. ``compute`` may be called from one thread at a time. details: the engine's
    facts for /health and /v1/models.
    """

    task: str
    context: int
    slots: int
    version: str
    settings: Settings
    reader: Reader

    @property
    def details(self) -> Mapping[str, str]: ...

    def compute(self, texts: Sequence[Text]) -> list[NDArray[np.float32]]:
        """A vector of float32 for each text: the embedding, or the logits. Raises EngineError."""
        ...

    def memory(self) -> int:
        """Bytes resident now, device memory included where the library reports it."""
        ...

    def close(self) -> None: ...


class Reader:
    """The tokenizer, with its own padding and truncation off: tokenizer.json often has another limit than the model
    was trained with. Thread-safe. Raises EngineError.
    """

    def __init__(self, run: Run, settings: Settings) -> None:
        from tokenizers import Tokenizer

        try:
            self._tokenizer = Tokenizer.from_file(str(run.tokenizer))
        except Exception as error:  # the library raises bare Exception for a file it cannot read
            raise EngineError(f"The tokenizer {run.tokenizer} cannot be read: {error}") from None
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._lock = threading.Lock()  # truncation is state of the tokenizer
        self.longest, self.settings = run.context, settings
        self.vocabulary = int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def read(self, text: str, pair: str | None = None, *, truncate: bool = False, param: str = "input") -> Text:
        """The text with its special tokens. Raises RequestRefused for an empty text, and for one that is longer than
        the model's limit unless ``truncate``.
        """
        if not text:
            raise RequestRefused("A text is empty.", param=param)
        whole = self.settings.prompt + text
        if self.settings.lower_case:
            whole, pair = whole.lower(), pair.lower() if pair is not None else None
        try:
            (whole + (pair or "")).encode("utf-8")
        except UnicodeEncodeError as error:
            raise RequestRefused(
                f"A text has half a character, an unpaired surrogate (position {error.start}).", param=param
            ) from None
        with self._lock:
            encoding = self._tokenizer.encode(whole, pair)
            count = len(encoding.ids)
            if count > self.longest and truncate:
                self._tokenizer.enable_truncation(self.longest)  # longest_first, as transformers has it
                try:
                    encoding = self._tokenizer.encode(whole, pair)
                finally:
                    self._tokenizer.no_truncation()
        if len(encoding.ids) > self.longest:
            raise self._too_long(count, param)
        return Text(tuple(encoding.ids), tuple(encoding.type_ids), count - len(encoding.ids))

    def from_ids(self, ids: Sequence[int], *, truncate: bool = False, param: str = "input") -> Text:
        """Token ids, to which no special tokens are added. Raises RequestRefused."""
        if not ids:
            raise RequestRefused("A list of token ids is empty.", param=param)
        if not all(0 <= token < self.vocabulary for token in ids):
            raise RequestRefused(f"Token ids go from 0 to {self.vocabulary - 1}.", param=param)
        if len(ids) > self.longest and not truncate:
            raise self._too_long(len(ids), param)
        kept = tuple(ids[: self.longest])
        return Text(kept, (0,) * len(kept), len(ids) - len(kept))

    def _too_long(self, count: int, param: str) -> RequestRefused:
        return RequestRefused(
            f'A text has {count} tokens and this model takes {self.longest}; shorten it, or send "truncate": true.',
            code="context_length_exceeded",
            param=param,
        )


def require_encoder(run: Run) -> None:
    """Raise EngineError unless the manifest is an embedder's or a classifier's."""
    if run.task not in ("embed", "classify"):
        raise EngineError(f"The manifest's run.task is {run.task!r}; this engine embeds or classifies.")


def require_inputs(names: Sequence[str], settings: Settings, model: str) -> None:
    """Raise EngineError unless a model's inputs are those of ``padded``."""
    if set(names) != {"input_ids", "attention_mask"} | ({"token_type_ids"} if settings.token_types else set()):
        raise EngineError(f"{model} takes {', '.join(sorted(names))}; the manifest says otherwise.")


def padded(texts: Sequence[Text], settings: Settings) -> dict[str, NDArray[np.int64]]:
    """The model's inputs [texts, longest text], int64."""
    import numpy as np

    shape = len(texts), max(len(text.ids) for text in texts)
    ids = np.full(shape, settings.pad_id, np.int64)
    mask, types = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    for row, text in enumerate(texts):
        end = len(text.ids)
        ids[row, :end], mask[row, :end], types[row, :end] = text.ids, 1, text.types
    inputs = {"input_ids": ids, "attention_mask": mask}
    return {**inputs, "token_type_ids": types} if settings.token_types else inputs


def rows(output: NDArray[Any], mask: NDArray[Any], task: str, settings: Settings) -> list[NDArray[np.float32]]:
    """A float32 vector for each text of a batch, from the model's output: the embedding, or the logits."""
    import numpy as np

    values = output.astype(np.float32, copy=False)  # sums in float16 would lose digits
    return list(values if task == "classify" else pooled(values, mask, settings))


def pooled(states: NDArray[Any], mask: NDArray[Any], settings: Settings) -> NDArray[np.float32]:
    """Vectors [texts, hidden] from token states [texts, length, hidden], padding excluded."""
    import numpy as np

    weights = mask[:, :, None].astype(np.float32)
    if settings.pooling == "cls":
        vectors = states[:, 0]
    elif settings.pooling == "max":
        vectors = np.where(weights > 0, states, -np.inf).max(axis=1)
    else:
        count = np.maximum(weights.sum(axis=1), 1e-9)
        vectors = (states * weights).sum(axis=1) / (np.sqrt(count) if settings.pooling == "mean_sqrt_len" else count)
    if settings.normalize:
        vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    result: NDArray[np.float32] = vectors.astype(np.float32)
    return result


def scored(logits: NDArray[Any], settings: Settings) -> list[float]:
    """Scores of one text's logits [labels]: softmax, sigmoid, or the logits themselves for a regression."""
    import numpy as np

    values = logits.astype(np.float64)
    if settings.scores == "softmax":
        values = np.exp(values - values.max())
        values /= values.sum()
    elif settings.scores == "sigmoid":
        values = 1 / (1 + np.exp(-values))
    return [float(value) for value in values]


def labelled(logits: NDArray[Any], settings: Settings) -> Mapping[str, object]:
    """The answer for one text: the best label with its score, and all scores."""
    scores = scored(logits, settings)
    names = settings.labels or tuple(f"LABEL_{number}" for number in range(len(scores)))
    best = max(range(len(scores)), key=lambda number: scores[number])
    return {
        "label": names[best],
        "score": scores[best],
        "scores": dict(zip(names, scores, strict=True)),
        "probs": scores,
        "num_classes": len(scores),
    }
