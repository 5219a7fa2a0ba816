"""Renders and tokenizes text with the checkpoint's own tokenizer, as training did: ``samples.py JOB.json``.

JOB.json: {"checkpoint", "conversations": [[{"role", "content"}, …], …], "prompts": [same], "pairs": [same],
"texts": [str, …], "training": Training.as_job() or null, "vocabulary": highest id + 1 of the tokenizer's files,
"output"}. Writes {"conversations": [ids, …], "prompts": [{"ids", "text", "trained"}, …], "pairs": [{"prompt": ids,
"whole": ids}, …], "texts": [ids, …], "refusal", "typed", "invented", "opening", "end"}.

Conversations are whole, prompts end with the generation prompt, pairs (each ends with an answer) are both. Prompts are
rendered by transformers' ``apply_chat_template`` with the checkpoint's own template; "trained" has the training
template's ids (null without one, or when it cannot render this conversation). Conversations and pairs are rendered by
the training template if there is one. A conversation that the chat template refuses (Gemma 2 has no system role) is
null, and refusal has the template's last message.

typed: the special tokens that become control tokens when a user types them. invented: tokens that transformers' class
adds and the tokenizer's files do not have (Qwen2Tokenizer adds its own <|endoftext|> to DeepSeek-R1's); a text with one
is tokenized by the files. opening: ids of a thought's opening. end: the id that ends an answer in training, null when
it ends in plain text.

The date in a template is fixed, here and in ``runtimes render``, so that comparisons do not depend on the day.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from packager.prompts.training_template import THOUGHT, Piece, Training, encode, from_job

Messages = list[dict[str, str]]
DAY = datetime(2026, 1, 1)


class Renderer:
    """One tokenizer with the checkpoint's chat template, and the training template if known."""

    def __init__(self, tokenizer: Any, training: Training | None, file: Path, vocabulary: int) -> None:
        from tokenizers import Tokenizer

        self.tokenizer, self.training = tokenizer, training
        self.files, self.vocabulary = Tokenizer.from_file(str(file)), vocabulary
        self.template = training.jinja if training else None

    def apply(self, messages: Messages, *, prompt: bool, tokenize: bool = True, template: str | None = None) -> Any:
        options = {"chat_template": template, "add_generation_prompt": prompt, "strftime_now": DAY.strftime}
        if not tokenize:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, **options)
        ids = self.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **options)
        if max(ids, default=0) >= self.vocabulary:
            return self.read(self.tokenizer.apply_chat_template(messages, tokenize=False, **options))
        return [int(token) for token in ids]

    def read(self, text: str) -> list[int]:
        """Ids by the tokenizer's files, without tokens that transformers' class adds."""
        return list(self.files.encode(text, add_special_tokens=False).ids)

    def tokens(self, text: str) -> list[int]:
        """Ids of a text: special tokens in it are recognised, none is added."""
        ids = [int(token) for token in self.tokenizer.encode(text, add_special_tokens=False)]
        return ids if max(ids, default=0) < self.vocabulary else self.read(text)

    def invented(self) -> list[str]:
        return sorted(text for text, token in self.tokenizer.get_added_vocab().items() if token >= self.vocabulary)

    def encoded(self, pieces: Sequence[Piece] | None) -> list[int] | None:
        if pieces is None:
            return None
        return encode(pieces, self.tokens, self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)

    def trained_prompt(self, messages: Messages) -> list[int] | None:
        """A prompt's ids by the training template; None when it cannot render the prompt."""
        from jinja2 import TemplateError

        if self.training is None:
            return None
        if self.training.slots:
            return self.encoded(self.training.slots.prompt(messages))
        try:
            ids: list[int] = self.apply(messages, prompt=True, template=self.training.jinja)
        except TemplateError:
            return None
        return ids

    def whole(self, messages: Messages) -> list[int] | None:
        """A conversation with its answers, by the training template if known. Raises TemplateError."""
        if self.training and self.training.slots:
            return self.encoded(self.training.slots.conversation(messages))
        ids: list[int] = self.apply(messages, prompt=False, template=self.template)
        return ids

    def pair(self, messages: Messages) -> dict[str, list[int]] | None:
        """{"prompt", "whole"} of a conversation that ends with an answer. Raises TemplateError."""
        if self.training and self.training.slots:
            slots = self.training.slots
            prompt, answer = self.encoded(slots.prompt(messages[:-1])), slots.answer(messages[-1]["content"])
            return None if prompt is None else {"prompt": prompt, "whole": prompt + (self.encoded(answer) or [])}
        template = self.template
        return {
            "prompt": self.apply(messages[:-1], prompt=True, template=template),
            "whole": self.apply(messages, prompt=False, template=template),
        }

    def end(self) -> int | None:
        """The first special token after an answer in training; None for a Jinja template or without one."""
        if self.training is None or self.training.slots is None:
            return None
        special = set(self.tokenizer.get_added_vocab().values()) | {self.tokenizer.eos_token_id}
        return next((token for token in self.encoded(self.training.slots.ends()) or [] if token in special), None)

    def typed(self) -> list[str]:
        """The tokenizer's added tokens that become control tokens when a user types their text."""
        from jinja2 import TemplateError

        added = {str(t): int(n) for t, n in self.tokenizer.get_added_vocab().items() if n < self.vocabulary}
        try:
            typing = [{"role": "user", "content": f"a {' '.join(sorted(added))} b"}]
            ids = self.apply(typing, prompt=True)
            bare = self.apply([{"role": "user", "content": "a b"}], prompt=True)
        except TemplateError:
            return []
        special = set(self.tokenizer.all_special_tokens)
        counted = {token: ids.count(token) - bare.count(token) for token in added.values()}
        marks = {token for token in added.values() if token in bare}  # those of the template itself
        return sorted(
            text for text, token in added.items() if counted[token] > 0 and (token in marks or text in special)
        )


def main(job: dict[str, Any]) -> None:
    from jinja2 import TemplateError
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job["checkpoint"], local_files_only=True)
    training = from_job(job["training"]) if job.get("training") else None
    renderer = Renderer(tokenizer, training, Path(job["checkpoint"]) / "tokenizer.json", job["vocabulary"])
    rendered: dict[str, Any] = {"conversations": [], "prompts": [], "pairs": [], "texts": [], "refusal": ""}
    for messages in job["conversations"]:
        try:
            rendered["conversations"].append(renderer.whole(messages))
        except TemplateError as error:
            rendered["conversations"].append(None)
            rendered["refusal"] = str(error)
    for messages in job["prompts"]:
        try:
            text = renderer.apply(messages, prompt=True, tokenize=False)
            ids = renderer.apply(messages, prompt=True)
            rendered["prompts"].append({"ids": ids, "text": text, "trained": renderer.trained_prompt(messages)})
        except TemplateError as error:
            rendered["prompts"].append(None)
            rendered["refusal"] = str(error)
    for messages in job["pairs"]:
        try:
            rendered["pairs"].append(renderer.pair(messages))
        except TemplateError:
            rendered["pairs"].append(None)
    for text in job["texts"]:
        rendered["texts"].append([int(token) for token in tokenizer(text)["input_ids"]])
    rendered["typed"] = renderer.typed() if tokenizer.chat_template else []
    rendered["invented"] = renderer.invented()
    rendered["opening"] = renderer.tokens(THOUGHT[0])
    rendered["end"] = renderer.end()
    Path(job["output"]).write_text(json.dumps(rendered), encoding="utf-8")


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
