"""Renders and tokenizes text with the checkpoint's own tokenizer, as training did: ``samples.py JOB.json``.

JOB.json: {"checkpoint", "conversations": [[{"role", "content"}, …], …], "prompts": [same], "pairs": [same],
"texts": [str, …], "output"}. Writes {"conversations": [ids, …], "prompts": [{"ids", "text"}, …], "pairs": [{"prompt":
ids, "whole": ids}, …], "texts": [ids, …], "refusal"}: conversations whole, prompts with the generation prompt, pairs
(each ends with an answer) as both, all by transformers' ``apply_chat_template``. A conversation
that the chat template refuses (Gemma 2 takes no system role) is null there, and refusal has the template's last words.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def render(tokenizer: Any, messages: list[dict[str, str]], *, prompt: bool) -> list[int]:
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=True, return_dict=False)
    return [int(token) for token in ids]


def main(job: dict[str, Any]) -> None:
    from jinja2 import TemplateError
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job["checkpoint"], local_files_only=True)
    found: dict[str, Any] = {"conversations": [], "prompts": [], "pairs": [], "texts": [], "refusal": ""}
    for messages in job["conversations"]:
        try:
            found["conversations"].append(render(tokenizer, messages, prompt=False))
        except TemplateError as error:
            found["conversations"].append(None)
            found["refusal"] = str(error)
    for messages in job["prompts"]:
        try:
            text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            found["prompts"].append({"ids": render(tokenizer, messages, prompt=True), "text": text})
        except TemplateError as error:
            found["prompts"].append(None)
            found["refusal"] = str(error)
    for messages in job["pairs"]:
        try:
            prompt, whole = render(tokenizer, messages[:-1], prompt=True), render(tokenizer, messages, prompt=False)
            found["pairs"].append({"prompt": prompt, "whole": whole})
        except TemplateError:
            found["pairs"].append(None)
    for text in job["texts"]:
        found["texts"].append([int(token) for token in tokenizer(text)["input_ids"]])
    Path(job["output"]).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
