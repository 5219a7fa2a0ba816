"""For Ollama: a Modelfile, and a store that can be copied into ``~/.ollama/models`` as it is.

Ollama renders prompts with Go templates, not with the GGUF's Jinja. The Go template is derived from the checkpoint's
own template by rendering marked messages, then proven: what it yields (go_template.py evaluates it; Ollama is not run
here) must equal what the Jinja template yields for every conversation of the contract, or there is no bundle. Store
layout: Ollama's ``docs`` on the registry format (schema version 2).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packager.core.errors import GateFailed
from packager.core.store import Cost, Step
from packager.formats.gguf.contract import adds_bos
from packager.prompts.contract import EDGES
from packager.prompts.go_template import render as render_go
from packager.recipe import Job

MARK = "\u2045{}\u2046"  # quill brackets: no chat template has them
PARAMETERS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}


@dataclass(frozen=True)
class TurnShape:
    """A chat template as Ollama can say it: what stands around each role's text.

    start: before everything. default_system: what stands there when the conversation has no system message.
    """

    start: str
    default_system: str
    system: tuple[str, str]
    user: tuple[str, str]
    assistant: tuple[str, str]
    generation: str

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The text that the Go template below yields for these messages."""
        has_system = any(message["role"] == "system" and message["content"] for message in messages)
        parts = [self.start, "" if has_system else self.default_system]
        for message in messages:
            before, after = {"system": self.system, "user": self.user, "assistant": self.assistant}[message["role"]]
            if message["role"] != "system" or message["content"]:
                parts += [before, message["content"], after]
        return "".join([*parts, self.generation])

    def go(self, bos: str) -> str:
        """The Go template; BOS is left out where Ollama puts it itself."""
        start = self.start.removeprefix(bos) if bos else self.start
        turns = "".join(
            f'{{{{ {"if" if role == "system" else "else if"} eq .Role "{role}" }}}}'
            f"{_go(before)}{{{{ .Content }}}}{_go(after)}"
            for role, (before, after) in (("system", self.system), ("user", self.user), ("assistant", self.assistant))
        )
        default = f"{{{{ if not .System }}}}{_go(self.default_system)}{{{{ end }}}}" if self.default_system else ""
        return f"{_go(start)}{default}{{{{ range .Messages }}}}{turns}{{{{ end }}}}{{{{ end }}}}{_go(self.generation)}"


def _go(text: str) -> str:
    """Text for Go: its own opening braces are quoted, also one at the end that would join the action behind it."""
    return re.sub(r"\{{2,}|\{\Z", lambda braces: f'{{{{ "{braces[0]}" }}}}', text)


def shape_of(render: Any) -> TurnShape | None:
    """The turns of a chat template, found by rendering marked messages with ``render(messages,
    add_generation_prompt)``.

    None when the template does more than put text around each message.
    """

    def text(*turns: tuple[str, str], generate: bool = False) -> str:
        return str(render([{"role": role, "content": content} for role, content in turns], generate))

    a, b, c, d = (MARK.format(letter) for letter in "abcd")
    try:
        whole = text(("system", d), ("user", a), ("assistant", b), ("user", c))
        bare = text(("user", a), ("assistant", b), ("user", c))
        generation = text(("user", a), generate=True).removeprefix(text(("user", a)))
        between_ab, between_bc = whole.split(a)[1].split(b)[0], whole.split(b)[1].split(c)[0]
        before_a = whole.split(d)[1].split(a)[0]
        end = whole.split(c)[1]
        user_close = end
        user_open = _common_tail(between_bc, before_a)
        if user_close and user_open.startswith(
            user_close
        ):  # every turn ends alike: that end belongs to the turn before
            user_open = user_open.removeprefix(user_close)
        assistant_open = between_ab.removeprefix(user_close)
        assistant_close = between_bc.removesuffix(user_open)
        system_close = before_a.removesuffix(user_open)
        head = whole.split(d)[0]
        bare_head = bare.split(a)[0].removesuffix(user_open)
        start = _common_head(head, bare_head)
        system_open = head.removeprefix(start)
        return TurnShape(
            start,
            bare_head.removeprefix(start),
            (system_open, system_close),
            (user_open, user_close),
            (assistant_open, assistant_close),
            generation,
        )
    except Exception:  # a template is a program: it may refuse the probe in any way, and then has no such shape
        return None


def _common_tail(left: str, right: str) -> str:
    count = 0
    while count < min(len(left), len(right)) and left[-1 - count] == right[-1 - count]:
        count += 1
    return left[len(left) - count :]


def _common_head(left: str, right: str) -> str:
    count = 0
    while count < min(len(left), len(right)) and left[count] == right[count]:
        count += 1
    return left[:count]


def make(job: Job, model: Path, context: int, steps: list[Step]) -> tuple[dict[str, Path], list[str]]:
    """The bundle's ``ollama/`` folder, and notes on the prompt. Raises GateFailed when the chat template cannot be
    said in Ollama's language.
    """
    tokenizer = job.checkpoint.tokenizer
    template, notes = "", list[str]()
    if tokenizer.chat_template is not None:
        template, notes = proven_template(job, adds_bos(model, tokenizer.add_bos))

    def build(folder: Path, cost: Cost) -> None:
        write_store(folder / "ollama", model, job.checkpoint.name, template, _parameters(job, context))

    step = job.store.step(
        "ollama",
        {
            "model": model.parent.name,
            "checkpoint": job.checkpoint.digest,
            "context": context,
            "name": job.checkpoint.name,
            "template": template,
        },
        build,
        progress=job.progress,
    )
    steps.append(step)
    return {"ollama": step.path / "ollama"}, notes


def proven_template(job: Job, bos_first: bool) -> tuple[str, list[str]]:
    """The Go template that renders as the checkpoint's own, and notes on what Ollama's language cannot say. bos_first:
    Ollama puts BOS before what it yields, because the GGUF says so. Raises GateFailed naming the first character that
    differs.
    """
    from packager.checkpoint.chat_template import renderer
    from packager.fidelity.samples import contract_prompts
    from packager.prompts.calibration import general

    tokenizer = job.checkpoint.tokenizer
    render = renderer(tokenizer.chat_template or "", tokenizer.special_tokens)
    shape = shape_of(render)
    fix = "Build for a desktop target instead: its server runs the checkpoint's own template."
    if shape is None:
        raise GateFailed(
            "the chat template cannot be written as an Ollama template.",
            why="It does more than put text around each message.",
            fix=fix,
        )
    bos = tokenizer.bos or "" if bos_first else ""
    template = shape.go(bos)
    notes: list[str] = []
    for number, prompt in enumerate(contract_prompts(general().conversations, ()), 1):
        messages = prompt["messages"]
        try:
            expected = str(render(messages, True))
        except Exception:
            expected = ""  # a template that refuses a role: Ollama's would not, so it is no equal
        found = bos + render_go(template, messages)
        if expected != found and prompt["kind"] in EDGES:
            notes.append(f"Ollama renders conversations of the kind {prompt['kind']!r} otherwise than the checkpoint")
        elif expected != found:
            at = next(
                (i for i, (x, y) in enumerate(zip(expected, found, strict=False)) if x != y),
                min(len(expected), len(found)),
            )
            raise GateFailed(
                "the chat template cannot be written as an Ollama template.",
                why=f"Conversation {number} ({prompt['kind']}) differs at character {at}: {found[at : at + 24]!r} "
                f"instead of {expected[at : at + 24]!r}.",
                fix=fix,
            )
    return template, sorted(set(notes))


def _parameters(job: Job, context: int) -> dict[str, Any]:
    tokenizer = job.checkpoint.tokenizer
    found: dict[str, Any] = {
        PARAMETERS[key]: value for key, value in sorted(tokenizer.sampling.items()) if key in PARAMETERS
    }
    stops = sorted({text for text in (tokenizer.eos, tokenizer.turn_end) if text})
    return {"num_ctx": context, **found, **({"stop": stops} if stops else {})}


def write_store(folder: Path, model: Path, name: str, template: str, parameters: Mapping[str, Any]) -> None:
    """Write Modelfile, README and ``models/`` (blobs by SHA-256 and one manifest) for a GGUF file."""
    blobs = folder / "models" / "blobs"
    blobs.mkdir(parents=True)
    layers = [_blob_of_file(blobs, model, "application/vnd.ollama.image.model")]
    if template:
        layers.append(_blob(blobs, template.encode(), "application/vnd.ollama.image.template"))
    layers.append(_blob(blobs, json.dumps(parameters, sort_keys=True).encode(), "application/vnd.ollama.image.params"))
    config = json.dumps(
        {
            "model_format": "gguf",
            "model_family": "",
            "model_families": None,
            "model_type": "",
            "file_type": "",
            "architecture": "amd64",
            "os": "linux",
            "rootfs": {"type": "layers", "diff_ids": [layer["digest"] for layer in layers]},
        },
        sort_keys=True,
    )
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
        "config": _blob(blobs, config.encode(), "application/vnd.docker.container.image.v1+json"),
        "layers": layers,
    }
    place = folder / "models" / "manifests" / "registry.ollama.ai" / "library" / name / "latest"
    place.parent.mkdir(parents=True)
    place.write_text(json.dumps(manifest, sort_keys=True), encoding="utf-8")
    lines = [
        "# made by packager; beside a copy of the bundle: ollama create NAME -f ollama/Modelfile",
        "FROM ../model/model.gguf",
    ]
    if template:
        lines.append(f'TEMPLATE """{template}"""')
    for key, value in sorted(parameters.items()):
        lines += [
            f"PARAMETER {key} {json.dumps(item, ensure_ascii=False)}"
            for item in (value if isinstance(value, list) else [value])
        ]
    (folder / "Modelfile").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(
        f"# {name} in Ollama\n\nWithout a network, copy the store and run it:\n\n"
        "    cp -rn ollama/models/. ~/.ollama/models/\n"
        f"    ollama run {name}\n\nOr let Ollama import it: `ollama create {name} -f ollama/Modelfile`.\n"
        "Where Ollama runs as a service its store is the folder in OLLAMA_MODELS, often "
        "/usr/share/ollama/.ollama/models.\n",
        encoding="utf-8",
    )


def _blob(blobs: Path, content: bytes, media: str) -> dict[str, Any]:
    digest = hashlib.sha256(content).hexdigest()
    (blobs / f"sha256-{digest}").write_bytes(content)
    return {"mediaType": media, "digest": f"sha256:{digest}", "size": len(content)}


def _blob_of_file(blobs: Path, path: Path, media: str) -> dict[str, Any]:
    import os

    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    os.link(path, blobs / f"sha256-{digest}")  # both stay in the store, which nobody edits
    return {"mediaType": media, "digest": f"sha256:{digest}", "size": path.stat().st_size}
