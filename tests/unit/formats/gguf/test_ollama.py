"""Ollama: the Go template is derived from the Jinja one and proven against it; the store is laid out by digests."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from packager.checkpoint.chat_template import renderer
from packager.core.errors import GateFailed
from packager.formats.gguf import ollama
from packager.formats.gguf.ollama import TurnShape, shape_of, write_store
from packager.prompts.calibration import general

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful AI assistant named SmolLM, "
    "trained by Hugging Face<|im_end|>\\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA3 = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'"
    " + message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\\n\\n' %}"
    "{% set loop_messages = messages[1:] %}{% else %}{% set first = '' %}{% set loop_messages = messages %}{% endif %}"
    "{% for message in loop_messages %}{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\\n' + (first if loop.first else '')"
    " + message['content'] | trim + '<end_of_turn>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{{ m['role'] + m['content'] }}{% endfor %}"
)
COUNTING = "{% for m in messages %}{{ loop.index ~ ' ' ~ m['role'] ~ ': ' ~ m['content'] ~ '\\n' }}{% endfor %}"
LAST_ONLY = (  # Mistral v0.3: the system prompt stands in the last user turn, wherever that is
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set rest = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if m['role'] == 'user' %}[INST] {{ system + '\n\n' if loop.last and system else '' }}"
    "{{ m['content'] }}[/INST]"
    "{% else %} {{ m['content'] }}</s>{% endif %}{% endfor %}"
)
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


def rendered(template: str, tokens: dict[str, str] | None = None) -> Any:
    return renderer(template, tokens or TOKENS)


def job(template: str) -> Any:
    tokenizer = SimpleNamespace(
        chat_template=template, special_tokens=TOKENS, bos="<s>", eos="</s>", add_bos=False, turn_end=None, sampling={}
    )
    return SimpleNamespace(checkpoint=SimpleNamespace(tokenizer=tokenizer))


def talks() -> list[list[dict[str, str]]]:
    found = [list(talk[:-1]) for talk in general().conversations]
    return [talk for talk in found if not any(m["role"] == "system" and not m["content"] for m in talk)]


@pytest.mark.parametrize("template", [CHATML, SMOLLM2, LLAMA3, GEMMA], ids=["chatml", "smollm2", "llama3", "gemma"])
def test_templates_that_only_put_text_around_messages_are_expressed(template: str) -> None:
    """The shape renders every built-in conversation as the Jinja template does, and the proof accepts it.

    Gemma's merges the system prompt into the first user turn: that too is text between two contents.
    """
    render = rendered(template)
    shape = shape_of(render)
    assert shape is not None
    for talk in talks():
        assert shape.render(talk) == render(talk, True)
    assert ollama.proven_template(job(template), False)[0] == shape.go("")


def test_the_go_template_of_chatml() -> None:
    """Each role's frame and the generation prompt, in the words of Go's templates."""
    shape = shape_of(rendered(CHATML))
    assert shape is not None
    assert shape.go("") == (
        "{{ range .Messages }}"
        '{{ if eq .Role "system" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "assistant" }}<|im_start|>assistant\n{{ .Content }}<|im_end|>\n'
        "{{ end }}{{ end }}<|im_start|>assistant\n"
    )


def test_a_default_system_prompt_stands_only_where_there_is_none() -> None:
    """SmolLM2 introduces itself when the conversation has no system message, and Go must do the same."""
    shape = shape_of(rendered(SMOLLM2))
    assert shape is not None
    text = shape.go("")
    assert "{{ if not .System }}You are a helpful AI assistant named SmolLM" in text
    assert text.index("named SmolLM") < text.index("{{ range .Messages }}")


def test_the_r1_template_is_expressed_or_refused_but_never_wrong(r1_tokenizer_folder: Path) -> None:
    """R1 drops old thoughts and trims: whatever the shape is, the proof lets it pass only when it renders the same."""
    template = (r1_tokenizer_folder / "chat_template.jinja").read_text(encoding="utf-8")
    render = rendered(template, {"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>"})
    shape = shape_of(render)
    assert shape is not None
    for talk in talks():
        assert shape.render(talk) == render(talk, True)
    assert shape.start == "<｜begin▁of▁sentence｜>"
    assert shape.user == ("<｜User｜>", "")
    assert shape.go("<｜begin▁of▁sentence｜>").startswith("{{ range .Messages }}")


@pytest.mark.parametrize("template", [NO_SYSTEM, COUNTING, LAST_ONLY], ids=["no system", "counting", "last only"])
def test_templates_that_do_more_are_refused(template: str) -> None:
    """A refused role, a numbered turn, a system prompt moved to the last turn: no bundle, exit code 6, and what to
    do.
    """
    with pytest.raises(GateFailed, match="cannot be written as an Ollama template") as caught:
        ollama.proven_template(job(template), False)
    assert "desktop target" in caught.value.fix


def test_bos_is_left_to_ollama_where_the_tokenizer_adds_it() -> None:
    """The Go template must not write a BOS that Ollama writes too."""
    shape = shape_of(rendered(LLAMA3))
    assert shape is not None
    assert shape.start == "<s>"
    assert shape.go("").startswith("<s>")
    assert not shape.go("<s>").startswith("<s>")


def test_braces_are_escaped_for_go() -> None:
    """Text that holds Go's own delimiters comes out as text, also where an action follows at once."""
    shape = TurnShape("{{x}}", "", ("", ""), ("a{", "}b"), ("", ""), "")
    text = shape.go("")
    assert text.startswith('{{ "{{" }}x}}')
    assert 'a{{ "{" }}{{ .Content }}}b' in text


def test_a_store_is_laid_out_by_digests(tmp_path: Path) -> None:
    """Every blob is named by its SHA-256, and the manifest lists model, template and parameters with their sizes."""
    model = tmp_path / "model.gguf"
    model.write_bytes(b"GGUF and weights")
    write_store(
        tmp_path / "ollama", model, "my-model", "{{ .Prompt }}", {"temperature": 0.6, "stop": ["</s>"], "num_ctx": 4096}
    )
    store = tmp_path / "ollama" / "models"
    manifest = json.loads((store / "manifests/registry.ollama.ai/library/my-model/latest").read_text(encoding="utf-8"))
    assert manifest["schemaVersion"] == 2
    assert [layer["mediaType"].rsplit(".", 1)[1] for layer in manifest["layers"]] == ["model", "template", "params"]
    named = [*manifest["layers"], manifest["config"]]
    for layer in named:
        blob = store / "blobs" / layer["digest"].replace(":", "-")
        assert hashlib.sha256(blob.read_bytes()).hexdigest() == layer["digest"].removeprefix("sha256:")
        assert blob.stat().st_size == layer["size"]
    assert len(list((store / "blobs").iterdir())) == len(named)
    config = json.loads((store / "blobs" / manifest["config"]["digest"].replace(":", "-")).read_text(encoding="utf-8"))
    assert config["rootfs"]["diff_ids"] == [layer["digest"] for layer in manifest["layers"]]


def test_a_modelfile_says_the_same(tmp_path: Path) -> None:
    """FROM, TEMPLATE and one PARAMETER line a value."""
    model = tmp_path / "model.gguf"
    model.write_bytes(b"x")
    write_store(tmp_path / "ollama", model, "m", "T", {"stop": ["</s>", "<end>"], "num_ctx": 4096})
    lines = (tmp_path / "ollama" / "Modelfile").read_text(encoding="utf-8").splitlines()
    assert lines[1:] == [
        "FROM ../model/model.gguf",
        'TEMPLATE """T"""',
        "PARAMETER num_ctx 4096",
        'PARAMETER stop "</s>"',
        'PARAMETER stop "<end>"',
    ]


def test_a_model_without_a_template_has_no_template_layer(tmp_path: Path) -> None:
    """A base model is completed, not chatted with."""
    model = tmp_path / "model.gguf"
    model.write_bytes(b"x")
    write_store(tmp_path / "ollama", model, "m", "", {"num_ctx": 1})
    assert "TEMPLATE" not in (tmp_path / "ollama" / "Modelfile").read_text(encoding="utf-8")
    place = tmp_path / "ollama/models/manifests/registry.ollama.ai/library/m/latest"
    assert len(json.loads(place.read_text(encoding="utf-8"))["layers"]) == 2


def test_the_same_store_twice_is_the_same_bytes(tmp_path: Path) -> None:
    """No time, no path, no order of chance."""
    model = tmp_path / "model.gguf"
    model.write_bytes(b"x")
    found = []
    for name in ("a", "b"):
        write_store(tmp_path / name, model, "m", "T", {"stop": ["</s>"], "num_ctx": 1})
        found.append(
            {
                str(p.relative_to(tmp_path / name)): p.read_bytes()
                for p in sorted((tmp_path / name).rglob("*"))
                if p.is_file()
            }
        )
    assert found[0] == found[1]
