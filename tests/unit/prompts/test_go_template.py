"""Go templates are evaluated as Ollama would, and what is not understood is refused."""

from __future__ import annotations

import pytest

from packager.prompts.go_template import NotUnderstood, render

USER = {"role": "user", "content": "Hi"}
SYSTEM = {"role": "system", "content": "Be brief."}
FACTORY = (
    "<s>{{ if .System }}<sys>{{ .System }}</sys>{{ end }}"
    '{{ range .Messages }}{{ if eq .Role "user" }}<user>{{ .Content }}<bot>'
    '{{ else if eq .Role "assistant" }}{{ .Content }}</s>{{ end }}{{ end }}'
)


def test_llama_factorys_own_modelfile_is_rendered() -> None:
    """A system text in front, turns by role, no branch for system among the messages."""
    talk = [SYSTEM, USER, {"role": "assistant", "content": "Yo"}, {"role": "user", "content": "Bye"}]
    assert render(FACTORY, talk) == "<s><sys>Be brief.</sys><user>Hi<bot>Yo</s><user>Bye<bot>"
    assert render(FACTORY, [USER]) == "<s><user>Hi<bot>"


def test_the_modelfiles_system_stands_where_the_conversation_has_none() -> None:
    """As Ollama puts it in front of the messages."""
    assert "<sys>Kind.</sys>" in render(FACTORY, [USER], "Kind.")
    assert "Kind." not in render(FACTORY, [SYSTEM, USER], "Kind.")


def test_neighbours_of_one_role_are_joined() -> None:
    """Ollama collates them with a blank line."""
    assert render("{{ range .Messages }}<{{ .Content }}>{{ end }}", [USER, USER]) == "<Hi\n\nHi>"


def test_else_not_quoted_text_and_trimming() -> None:
    """Every construct that is understood, each with its effect."""
    template = '{{ if not .System }}none{{ else }}some{{ end }}\n {{- "{{" }} {{ range .Messages }}{{ .Role }}{{ end }}'
    assert render(template, [USER]) == "none{{ user"
    assert render(template, [SYSTEM]) == "some{{ system"
    assert render('{{ range .Messages }}{{ if ne .Role "user" }}x{{ end }}{{ $.System }}{{ end }}', [USER, SYSTEM]) == (
        "Be brief.xBe brief."
    )


@pytest.mark.parametrize(
    "template",
    ["{{ .Prompt }}", "{{ with .System }}x{{ end }}", "{{ range $i, $_ := .Messages }}{{ end }}", "{{ end }}",
     "{{ if .System }}x", "{{ range .Messages }}x", '{{ if and .System (eq .Role "x") }}y{{ end }}'],
)  # fmt: skip
def test_what_is_not_understood_is_refused(template: str) -> None:
    """A guess would be worse than no answer."""
    with pytest.raises(NotUnderstood):
        render(template, [USER])
