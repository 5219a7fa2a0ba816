"""Tokenizer, template and configs: what they say about the ends of a text, and every disagreement in words."""

from __future__ import annotations

from pathlib import Path

import pytest

from packager.checkpoint.tokenizer import TokenizerFacts, read_json, read_tokenizer
from packager.core.errors import InputError
from tests.unit.tiny import CHATML, CONFIG, WORDS, edit_json, tokenizer_json, write_json


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_json(tmp_path / "tokenizer.json", tokenizer_json(WORDS))
    write_json(tmp_path / "tokenizer_config.json", {"bos_token": "<s>", "eos_token": {"content": "</s>"}})
    return tmp_path


def facts(folder: Path, **config: object) -> TokenizerFacts:
    return read_tokenizer(folder, {**CONFIG, **config})


def test_a_plain_tokenizer_agrees(folder: Path) -> None:
    """Names, ids and vocabulary are read; nothing disagrees."""
    tokens = facts(folder)
    assert (tokens.bos, tokens.bos_id, tokens.eos, tokens.eos_id, tokens.pad) == ("<s>", 0, "</s>", 1, None)
    assert (tokens.vocab_size, tokens.add_bos, tokens.stop_ids, tokens.agreement) == (10, False, (1,), ())
    assert tokens.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}


def test_the_end_of_a_turn_is_a_stop_token(folder: Path) -> None:
    """The token a chat template writes after an answer stops generation, and the disagreement is reported."""
    (folder / "chat_template.jinja").write_text(CHATML)
    tokens = facts(folder)
    assert tokens.turn_end == "<|im_end|>" and tokens.stop_ids == (1, 3)
    assert "ends an answer with 3 (<|im_end|>)" in tokens.agreement[0]


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{% for m in messages if m['role'] != 'system' %}{{ m['content'] }}<|im_end|>{% endfor %}", "ignores system"),
        ("{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}" + CHATML, "refuses system"),
        ("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} {% endfor %}", "ends an answer with no token"),
    ],
)
def test_what_a_template_cannot_do_is_a_remark(folder: Path, template: str, says: str) -> None:
    """A system prompt that is lost or refused, and answers that nothing ends."""
    (folder / "chat_template.jinja").write_text(template)
    (sentence,) = facts(folder).remarks
    assert says in sentence


def test_the_marks_of_a_template_are_read(folder: Path) -> None:
    """In the order in which they stand: a user who types them writes control tokens."""
    (folder / "chat_template.jinja").write_text(CHATML)
    assert facts(folder).marks == ("<|im_start|>", "<|im_end|>")
    assert facts(folder).remarks == ()


def test_ends_that_differ_are_all_stops(folder: Path) -> None:
    """config, generation config and tokenizer each name an end; all are stops and one sentence names the three."""
    write_json(folder / "generation_config.json", {"eos_token_id": [3, 1]})
    tokens = facts(folder, eos_token_id=2)
    assert tokens.stop_ids == (1, 2, 3)
    sentence = tokens.agreement[0]
    assert "config.json says 2 (<|im_start|>)" in sentence
    assert "generation_config.json says 1 (</s>), 3 (<|im_end|>)" in sentence
    assert "the tokenizer says 1 (</s>)" in sentence


def test_the_post_processor_decides_about_bos(folder: Path) -> None:
    """tokenizer.json alone decides on BOS, as in transformers 5; a config that contradicts it is reported."""
    edit_json(folder / "tokenizer_config.json", add_bos_token=True)
    tokens = facts(folder)
    assert not tokens.add_bos
    assert "add_bos_token true, but tokenizer.json does not add BOS" in tokens.agreement[0]
    write_json(folder / "tokenizer.json", tokenizer_json(WORDS, bos=True))
    assert facts(folder).add_bos and facts(folder).agreement == ()
    inner = tokenizer_json(WORDS, bos=True)
    inner["post_processor"] = {"type": "Sequence", "processors": [{"type": "ByteLevel"}, inner["post_processor"]]}
    write_json(folder / "tokenizer.json", inner)
    assert facts(folder).add_bos


def test_bos_from_both_sides_is_reported(folder: Path) -> None:
    """A template that writes BOS on a tokenizer that adds it is named; so is another BOS in config.json."""
    write_json(folder / "tokenizer.json", tokenizer_json(WORDS, bos=True))
    (folder / "chat_template.jinja").write_text("{{ bos_token }}" + CHATML)
    tokens = facts(folder, bos_token_id=2)
    assert tokens.template_writes_bos
    assert any("both write BOS" in sentence for sentence in tokens.agreement)
    assert any("BOS differs: config.json says 2 (<|im_start|>), the tokenizer 0 (<s>)" in s for s in tokens.agreement)


def test_templates_are_read_from_every_place(folder: Path) -> None:
    """The file comes first, then a string in tokenizer_config, then the one named default in a list."""
    edit_json(folder / "tokenizer_config.json", chat_template=[{"name": "tool_use", "template": "t"}])
    assert facts(folder).chat_template is None
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    edit_json(folder / "tokenizer_config.json", chat_template=named)
    assert facts(folder).chat_template == "d"
    edit_json(folder / "tokenizer_config.json", chat_template="s")
    assert facts(folder).chat_template == "s"
    (folder / "chat_template.jinja").write_text("f")
    assert facts(folder).chat_template == "f"


def test_a_template_cannot_reach_out(folder: Path) -> None:
    """A template that reaches for Python's objects is stopped by the sandbox and reported, never run."""
    attack = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    (folder / "chat_template.jinja").write_text(attack)
    tokens = facts(folder)
    assert tokens.turn_end is None
    assert "cannot be rendered" in tokens.agreement[0] and "unsafe" in tokens.agreement[0]


def test_a_broken_template_is_reported(folder: Path) -> None:
    """A template with a syntax error does not stop the reading, but is named."""
    (folder / "chat_template.jinja").write_text("{% for %}")
    assert "cannot be rendered (TemplateSyntaxError" in facts(folder).agreement[0]


def test_sampling_is_what_the_model_asks_for(folder: Path) -> None:
    """Defaults come from generation_config.json; a config that does not sample keeps only the penalty."""
    settings = {"temperature": 0.6, "top_p": 0.95, "top_k": None, "repetition_penalty": 1.1}
    write_json(folder / "generation_config.json", {"do_sample": True, **settings})
    assert facts(folder).sampling == {"temperature": 0.6, "top_p": 0.95, "repetition_penalty": 1.1}
    write_json(folder / "generation_config.json", {"do_sample": False, **settings})
    assert facts(folder).sampling == {"repetition_penalty": 1.1}


def test_a_missing_eos_is_taken_from_the_config(folder: Path) -> None:
    """A tokenizer that names no EOS takes the config's, which is reported; so is a token outside the vocabulary."""
    write_json(folder / "tokenizer_config.json", {"bos_token": "<nowhere>"})
    tokens = facts(folder)
    assert tokens.eos == "</s>" and tokens.bos_id is None
    assert any("names no EOS" in sentence for sentence in tokens.agreement)
    assert any("<nowhere> is not in its vocabulary" in sentence for sentence in tokens.agreement)


def test_later_tokens_count(folder: Path) -> None:
    """The vocabulary reaches to the highest id, wherever the token was added; Unigram lists are read too."""
    edit_json(folder / "tokenizer_config.json", added_tokens_decoder={"40": {"content": "<x>"}})
    assert facts(folder).vocab_size == 41
    write_json(folder / "added_tokens.json", {"<y>": 50})
    assert facts(folder).vocab_size == 51
    unigram = {"model": {"type": "Unigram", "vocab": [["<s>", 0.0], ["</s>", 0.0], ["a", -1.5]]}}
    write_json(folder / "tokenizer.json", unigram)
    (folder / "added_tokens.json").unlink()
    write_json(folder / "tokenizer_config.json", {"eos_token": "</s>"})
    assert facts(folder).vocab_size == 3


def test_a_tokenizer_file_of_another_kind_is_refused(folder: Path) -> None:
    """JSON that is no tokenizer is refused in words."""
    write_json(folder / "tokenizer.json", {"hello": 1})
    with pytest.raises(InputError, match="not a tokenizer's file"):
        facts(folder)
    (folder / "tokenizer.json").write_text("[1]")
    with pytest.raises(InputError, match="not a JSON object"):
        facts(folder)


def test_the_r1_tokenizer_is_read_right(r1_tokenizer_folder: Path) -> None:
    """DeepSeek-R1-Distill-Qwen: BOS 151646 added by the tokenizer and written by the template, EOS 151643."""
    tokens = read_tokenizer(r1_tokenizer_folder, read_json(r1_tokenizer_folder / "config.json"))
    assert (tokens.bos_id, tokens.eos_id, tokens.add_bos, tokens.template_writes_bos) == (151646, 151643, True, True)
    assert tokens.stop_ids == (151643,) and tokens.vocab_size == 151665
    assert tokens.turn_end == "<｜end▁of▁sentence｜>"
    assert len(tokens.agreement) == 1 and "both write BOS" in tokens.agreement[0]
