"""Renders and tokenizes text with the checkpoint's own tokenizer, as training did: ``samples.py JOB.json``.

JOB.json: {"checkpoint", "conversations": [[{"role", "content"}, …], …], "prompts": [same], "pairs": [same],
"texts": [str, …], "training": packager.training's form or null, "vocabulary": highest id + 1 of the tokenizer's files,
"output"}. Writes {"conversations": [ids, …], "prompts": [{"ids", "text", "trained"}, …], "pairs": [{"prompt": ids,
"whole": ids}, …], "texts": [ids, …], "refusal", "typed", "invented", "opening", "end"}.

Conversations are whole, prompts end with the generation prompt, pairs (each ends with an answer) are both. Prompts are
transformers' ``apply_chat_template`` on the checkpoint's own template, with the training template's ids as "trained"
(null where it is not known or cannot say this conversation); conversations and pairs are rendered by the training
template where there is one. A conversation that the chat template refuses (Gemma 2 takes no system role) is null, and
refusal has the template's last words.

typed: the special tokens that become themselves when a user types them. invented: tokens that transformers' class adds
and the tokenizer's files do not have (Qwen2Tokenizer adds its own <|endoftext|> to DeepSeek-R1's); a text with one is
read as the files read it. opening: ids of a thought's opening. end: the id that ends an answer in training, null where
that is plain text.

The date in a template is fixed, here and in ``runtimes render``: what is compared does not change overnight.
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
    """One tokenizer with the checkpoint's chat template, and the training template where it is known."""

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
        """Ids by the tokenizer's files alone."""
        return list(self.files.encode(text, add_special_tokens=False).ids)

    def tokens(self, text: str) -> list[int]:
        """Ids of a text: special tokens in it recognised, none added."""
        ids = [int(token) for token in self.tokenizer.encode(text, add_special_tokens=False)]
        return ids if max(ids, default=0) < self.vocabulary else self.read(text)

    def invented(self) -> list[str]:
        return sorted(text for text, token in self.tokenizer.get_added_vocab().items() if token >= self.vocabulary)

    def encoded(self, found: Sequence[Piece] | None) -> list[int] | None:
        if found is None:
            return None
        return encode(found, self.tokens, self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)

    def trained_prompt(self, messages: Messages) -> list[int] | None:
        """A prompt's ids by the training template; None where it cannot say it."""
        from jinja2 import TemplateError

        if self.training is None:
            return None
        if self.training.slots:
            return self.encoded(self.training.slots.prompt(messages))
        try:
            found: list[int] = self.apply(messages, prompt=True, template=self.training.jinja)
        except TemplateError:
            return None
        return found

    def whole(self, messages: Messages) -> list[int] | None:
        """A conversation with its answers, as training saw it where that is known. Raises TemplateError."""
        if self.training and self.training.slots:
            return self.encoded(self.training.slots.conversation(messages))
        found: list[int] = self.apply(messages, prompt=False, template=self.template)
        return found

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
        """The first special token after an answer in training; None for a Jinja template or where there is none."""
        if self.training is None or self.training.slots is None:
            return None
        special = set(self.tokenizer.get_added_vocab().values()) | {self.tokenizer.eos_token_id}
        return next((token for token in self.encoded(self.training.slots.ends()) or [] if token in special), None)

    def typed(self) -> list[str]:
        """Special tokens that a user's own text turns into, among those that the tokenizer adds to its vocabulary."""
        from jinja2 import TemplateError

        added = {str(t): int(n) for t, n in self.tokenizer.get_added_vocab().items() if n < self.vocabulary}
        try:
            asked = [{"role": "user", "content": f"a {' '.join(sorted(added))} b"}]
            ids = self.apply(asked, prompt=True)
            bare = self.apply([{"role": "user", "content": "a b"}], prompt=True)
        except TemplateError:
            return []
        special = set(self.tokenizer.all_special_tokens)
        counted = {token: ids.count(token) - bare.count(token) for token in added.values()}
        marks = {token for token in added.values() if token in bare}  # what the template itself marks turns with
        return sorted(
            text for text, token in added.items() if counted[token] > 0 and (token in marks or text in special)
        )


def main(job: dict[str, Any]) -> None:
    from jinja2 import TemplateError
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job["checkpoint"], local_files_only=True)
    training = from_job(job["training"]) if job.get("training") else None
    renderer = Renderer(tokenizer, training, Path(job["checkpoint"]) / "tokenizer.json", job["vocabulary"])
    found: dict[str, Any] = {"conversations": [], "prompts": [], "pairs": [], "texts": [], "refusal": ""}
    for messages in job["conversations"]:
        try:
            found["conversations"].append(renderer.whole(messages))
        except TemplateError as error:
            found["conversations"].append(None)
            found["refusal"] = str(error)
    for messages in job["prompts"]:
        try:
            text = renderer.apply(messages, prompt=True, tokenize=False)
            ids = renderer.apply(messages, prompt=True)
            found["prompts"].append({"ids": ids, "text": text, "trained": renderer.trained_prompt(messages)})
        except TemplateError as error:
            found["prompts"].append(None)
            found["refusal"] = str(error)
    for messages in job["pairs"]:
        try:
            found["pairs"].append(renderer.pair(messages))
        except TemplateError:
            found["pairs"].append(None)
    for text in job["texts"]:
        found["texts"].append([int(token) for token in tokenizer(text)["input_ids"]])
    found["typed"] = renderer.typed() if tokenizer.chat_template else []
    found["invented"] = renderer.invented()
    found["opening"] = renderer.tokens(THOUGHT[0])
    found["end"] = renderer.end()
    Path(job["output"]).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
