"""Chat templates: set up as transformers does, sandboxed, refusals in the template's words."""

from __future__ import annotations

from pathlib import Path

import pytest

from runtimes.decoding.chat_template import Prompts, TemplateRefused, compile_template
from runtimes.manifest import ManifestError
from tests.unit.runtimes.serving import make_run, write_tokenizer


def rendered(template: str, **values: object) -> str:
    return compile_template(template).render(**values)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{% if true %}\n  x\n{% endif %}\ny", "  x\ny"),
        ("{{ {'b': '<ä>', 'a': 1} | tojson }}", '{"b": "<ä>", "a": 1}'),
        ("{{ [1] | tojson(indent=2) }}", "[\n  1\n]"),
        ("{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "1"),
        ("a{% generation %}b{% endgeneration %}c", "abc"),
        ("{% set x = 1 %}{% generation %}{% set x = 2 %}{% endgeneration %}{{ x }}", "1"),
        ("{% set ns = namespace(n=0) %}{% for i in [1, 2] %}{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n }}", "3"),
        ("{{ dict(a=1)['a'] }}", "1"),
        ("{{ strftime_now('%Y') | length }}", "4"),
    ],
)
def test_the_environment_is_transformers(template: str, text: str) -> None:
    """Block trimming, tojson without escapes, loop controls, generation, namespace, dict, strftime_now."""
    assert rendered(template) == text


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ namespace(__class__=1) }}",
        "{% set ns = namespace() %}{% set ns._x = 1 %}",
        "{{ messages[0]['content'].format.__globals__['x'] }}",
        "{{ range(10 ** 9) | list }}",
    ],
)
def test_a_template_cannot_leave_the_sandbox(template: str, tmp_path: Path) -> None:
    """It is refused like any other failing template; nothing is reached or changed."""
    run = make_run(tmp_path)
    assert run.chat_template is not None
    run.chat_template.write_text(template)
    with pytest.raises(TemplateRefused):
        Prompts(run).render([{"role": "user", "content": "x"}])


def test_a_refusal_carries_the_templates_words(tmp_path: Path) -> None:
    prompts = Prompts(make_run(tmp_path))
    with pytest.raises(TemplateRefused, match=r"^System message must be first$"):
        prompts.chat([{"role": "user", "content": "x"}, {"role": "system", "content": "y"}])


def test_missing_values_are_refused_not_rendered(tmp_path: Path) -> None:
    """A message without content must not become the text "None"."""
    prompts = Prompts(make_run(tmp_path))
    run = make_run(tmp_path)
    assert run.chat_template is not None
    run.chat_template.write_text("{% for m in messages %}{{ 'a' + m['content'] }}{% endfor %}")
    with pytest.raises(TemplateRefused, match="content"):
        Prompts(run).render([{"role": "assistant", "content": None}])
    assert prompts.has_template


def test_a_template_that_does_not_compile_stops_the_start(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    assert run.chat_template is not None
    run.chat_template.write_text("{% if %}")
    with pytest.raises(ManifestError, match="does not compile"):
        Prompts(run)


def test_line_ends_of_the_template_file_are_part_of_the_prompt(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    assert run.chat_template is not None
    run.chat_template.write_bytes(b"a{{ '\\r\\n' }}b")
    assert Prompts(run).render([]) == "a\r\nb"


def test_bos_is_added_to_plain_text_only_when_the_tokenizer_does(tmp_path: Path) -> None:
    """And never to a rendered conversation."""
    plain = Prompts(make_run(tmp_path))
    with_bos = Prompts(make_run(tmp_path, bos_id=9, add_bos=True))
    assert with_bos.plain("ab") == [9, *plain.plain("ab")]
    messages = [{"role": "user", "content": "ab"}]
    assert with_bos.chat(messages) == plain.chat(messages)


def test_special_tokens_in_text_are_recognised(tmp_path: Path) -> None:
    """As in transformers: one id, whoever wrote it."""
    assert len(Prompts(make_run(tmp_path)).encode("<|assistant|>")) == 1


def test_a_broken_tokenizer_file_is_told(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    write_tokenizer(tmp_path).write_text("{}")
    with pytest.raises(ManifestError, match=r"tokenizer\.json"):
        Prompts(run)
