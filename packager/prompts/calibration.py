"""Calibration data: text and fine-tuning pairs, and how they are cut into token samples.

Pairs are rendered with the checkpoint's own chat template, as training did (workers/samples.py). Formats read: alpaca
JSON or JSONL (instruction, input, output, system, history), messages or ShareGPT conversations, and plain text. Texts
with labels, for classifiers: JSON or JSONL records {"text", "label"}, or a .csv or .tsv with these columns.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packager.core.errors import InputError

DATA = Path(__file__).parent / "data"
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "system": "system", "user": "user", "assistant": "assistant"}

Message = dict[str, str]
Conversation = tuple[Message, ...]


@dataclass(frozen=True)
class Calibration:
    """conversations: whole dialogues with their answers. texts: plain text. digest: SHA-256 of the file's bytes. name:
    its name. labels: one for each text, for a classifier; None for a text without one, empty when no text has one.
    """

    conversations: tuple[Conversation, ...]
    texts: tuple[str, ...]
    digest: str
    name: str
    labels: tuple[str | None, ...] = ()


def load(path: Path) -> Calibration:
    """Read a calibration file. Raises InputError with the record that is wrong."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"the calibration file {path} cannot be read: {error.strerror}.",
            fix="Give --calibration a text file or a JSON file of fine-tuning pairs.",
        ) from error
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"the calibration file {path} is not UTF-8 text (byte {error.start}).", fix="Save it as UTF-8."
        ) from error
    if not text.strip():
        raise InputError(f"the calibration file {path} is empty.", fix="Give some fine-tuning pairs or a text.")
    digest = hashlib.sha256(raw).hexdigest()
    if path.suffix.lower() in (".csv", ".tsv"):
        return _table(path, text, digest)
    if path.suffix.lower() not in (".json", ".jsonl"):
        return Calibration((), (text,), digest, path.name)
    conversations: list[Conversation] = []
    texts: list[str] = []
    labels: list[str | None] = []
    for number, record in enumerate(_records(path, text), 1):
        if isinstance(record, Mapping) and isinstance(record.get("text"), str):
            texts.append(record["text"])
            labels.append(None if record.get("label") is None else str(record["label"]))
        else:
            conversations.append(_conversation(path, number, record))
    if not conversations and not texts:
        raise InputError(f"the calibration file {path} holds no record.", fix="Give some fine-tuning pairs or a text.")
    known = tuple(labels) if any(label is not None for label in labels) else ()
    return Calibration(tuple(conversations), tuple(texts), digest, path.name, known)


def _table(path: Path, text: str, digest: str) -> Calibration:
    """A .csv or .tsv with a header that has "text" and, for a classifier, "label"."""
    import csv
    import io

    rows = csv.DictReader(io.StringIO(text), delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
    try:
        if "text" not in (rows.fieldnames or ()):
            raise InputError(
                f"the calibration file {path} has no column called text.",
                why=f"Its columns are: {', '.join(rows.fieldnames or ())}.",
                fix='Write the header "text,label" (or "text" alone) into its first line.',
            )
        records = [(row["text"], row.get("label") or None) for row in rows if row["text"]]
    except csv.Error as error:
        raise InputError(f"the calibration file {path} is no table (line {rows.line_num}): {error}.") from error
    if not records:
        raise InputError(f"the calibration file {path} holds no record.", fix="Give some fine-tuning pairs or a text.")
    labels = tuple(label for _, label in records)
    return Calibration((), tuple(row for row, _ in records), digest, path.name, labels if any(labels) else ())


def general() -> Calibration:
    """The text and conversations included in the package, for a build without calibration data."""
    text = (DATA / "general.txt").read_text(encoding="utf-8")
    talks = (DATA / "conversations.json").read_text(encoding="utf-8")
    digest = hashlib.sha256((text + talks).encode()).hexdigest()
    return Calibration(tuple(tuple(talk) for talk in json.loads(talks)), (text,), digest, "general (built in)")


def _records(path: Path, text: str) -> Sequence[Any]:
    try:
        if path.suffix.lower() == ".jsonl":
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        loaded = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(
            f"the calibration file {path} is not valid JSON: {error.msg} (line {error.lineno}).",
            fix="Correct that line; a file with one record on each line must end in .jsonl.",
        ) from error
    if not isinstance(loaded, list):
        raise InputError(
            f"the calibration file {path} holds a JSON {type(loaded).__name__}, not a list of records.",
            fix="Wrap the records in [ ].",
        )
    return loaded


def _conversation(path: Path, number: int, record: Any) -> Conversation:
    where = f"record {number} of {path}"
    if not isinstance(record, Mapping):
        raise InputError(f"{where} is not an object.", fix="Each record is an alpaca pair or has a list of messages.")
    talk = record.get("messages", record.get("conversations"))
    if talk is not None:
        return _talk(where, talk, record.get("system"))
    if not isinstance(record.get("instruction"), str) or not isinstance(record.get("output"), str):
        raise InputError(
            f"{where} has neither messages nor instruction and output.",
            why=f"Its keys are: {', '.join(map(str, record)) or 'none'}.",
            fix='Use {"instruction", "input", "output"} or {"messages": [{"role", "content"}, …]}.',
        )
    messages: list[Message] = []
    if record.get("system"):
        messages.append({"role": "system", "content": str(record["system"])})
    history = record.get("history") or []
    for pair in history if isinstance(history, list) else [None]:
        if not (isinstance(pair, list) and len(pair) == 2):
            raise InputError(f"the history of {where} is not a list of [question, answer] pairs.")
        messages += [{"role": "user", "content": str(pair[0])}, {"role": "assistant", "content": str(pair[1])}]
    # LLaMA-Factory joins instruction and input with one newline
    question = "\n".join(part for part in (record["instruction"], str(record.get("input") or "")) if part)
    messages += [{"role": "user", "content": question}, {"role": "assistant", "content": record["output"]}]
    return tuple(messages)


def _talk(where: str, talk: Any, system: Any) -> Conversation:
    messages: list[Message] = [{"role": "system", "content": system}] if isinstance(system, str) and system else []
    for turn in talk if isinstance(talk, list) and talk else [None]:
        if not isinstance(turn, Mapping):
            raise InputError(f"the messages of {where} are not a list of objects.")
        role = turn.get("role", turn.get("from"))
        content = turn.get("content", turn.get("value"))
        if not isinstance(role, str) or role not in SHAREGPT_ROLES or not isinstance(content, str):
            raise InputError(
                f"a message of {where} has the role {role!r}, or no text.",
                fix="Roles are system, user and assistant (or human and gpt); content is text.",
            )
        messages.append({"role": SHAREGPT_ROLES[role], "content": content})
    return tuple(messages)


def split(tokens: Sequence[int], length: int) -> list[list[int]]:
    """Pieces of ``length`` tokens; a last piece shorter than an eighth of that is dropped."""
    pieces = [list(tokens[start : start + length]) for start in range(0, len(tokens), length)]
    return [piece for piece in pieces if len(piece) * 8 >= length] or pieces[:1]


def spread(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Evenly spaced positions (1 … length - 1) for each sequence, about ``budget`` in total, determined by the lengths.

    Position p is the prediction of token p from the p tokens before it.
    """
    total = sum(max(length - 1, 0) for length in lengths)
    if total == 0:
        return [[] for _ in lengths]
    share = min(1.0, budget / total)
    chosen: list[list[int]] = []
    for length in lengths:
        count = max(1, round((length - 1) * share)) if length > 1 else 0
        chosen.append(sorted({1 + (2 * i + 1) * (length - 1) // (2 * count) for i in range(count)}))
    return chosen
