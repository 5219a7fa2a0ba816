"""What an encoder's files say: pooling, lengths, labels; and one sentence for each thing that is not served."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from packager.checkpoint.checkpoint import Checkpoint, open_checkpoint
from packager.checkpoint.encoder import EncoderFacts, read_encoder
from packager.cli.console import Console
from packager.core.errors import InputError
from packager.planning.catalog import load_recipe, load_target
from packager.planning.plan import make_plan
from tests.unit.tiny_encoder import tiny_encoder

MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
]
CLS = {"word_embedding_dimension": 16, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}


def opened(tmp_path: Path, **changes: Any) -> Checkpoint:
    folder = tiny_encoder(tmp_path / "tiny", **changes)
    return open_checkpoint(str(folder), progress=Console(quiet=True), cache=tmp_path / "cache")


def facts(tmp_path: Path, longest: int = 4096, **changes: Any) -> EncoderFacts:
    return read_encoder(opened(tmp_path, **changes), longest=longest)


def test_sentence_transformers_files_are_followed(tmp_path: Path) -> None:
    """Pooling, normalisation, the longest text, lower case and the default prompt."""
    encoder = facts(
        tmp_path,
        files={
            "modules.json": MODULES,
            "1_Pooling/config.json": CLS,
            "sentence_bert_config.json": {"max_seq_length": 32, "do_lower_case": True},
            "config_sentence_transformers.json": {"prompts": {"query": "query: "}, "default_prompt_name": "query"},
        },
    )
    assert (encoder.task, encoder.pooling, encoder.normalize, encoder.max_length) == ("embed", "cls", True, 32)
    assert (encoder.lower_case, encoder.prompt, encoder.token_types, encoder.pad_id) == (True, "query: ", True, 0)
    assert encoder.settings()["pooling"] == "cls"


def test_a_plain_checkpoint_is_pooled_as_sentence_transformers_would(tmp_path: Path) -> None:
    """Mean without normalisation, and its origin; the longest text is the positions, or the user's lower bound."""
    encoder = facts(tmp_path)
    assert (encoder.pooling, encoder.normalize, encoder.max_length) == ("mean", False, 64)
    assert "modules.json" in encoder.origin
    assert facts(tmp_path / "b", longest=20).max_length == 20


def test_roberta_positions_begin_after_the_padding_id(tmp_path: Path) -> None:
    """514 positions hold 512 tokens."""
    encoder = facts(
        tmp_path,
        architectures=["RobertaModel"],
        model_type="roberta",
        max_position_embeddings=514,
        pad_token_id=1,
        type_vocab_size=1,
    )
    assert (encoder.max_length, encoder.token_types) == (512, False)


@pytest.mark.parametrize(
    ("changes", "scores"),
    [
        ({"id2label": {"0": "no", "1": "yes"}}, "softmax"),
        ({"id2label": {"0": "no", "1": "yes"}, "problem_type": "multi_label_classification"}, "sigmoid"),
        ({"id2label": {"0": "fits"}}, "sigmoid"),
        ({"id2label": {"0": "stars"}, "problem_type": "regression"}, "none"),
    ],
)
def test_scores_follow_the_pipeline(tmp_path: Path, changes: dict[str, Any], scores: str) -> None:
    """As transformers' text-classification pipeline chooses between softmax, sigmoid and nothing."""
    encoder = facts(tmp_path, architectures=["BertForSequenceClassification"], **changes)
    assert (encoder.task, encoder.scores) == ("classify", scores)
    assert list(encoder.labels) == list(changes["id2label"].values())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"files": {"modules.json": [*MODULES[:2], {"path": "2_Dense", "type": "x.Dense"}]}}, "module Dense"),
        ({"files": {"modules.json": MODULES}}, "1_Pooling/config.json is missing"),
        ({"files": {"modules.json": MODULES, "1_Pooling/config.json": {**CLS, "pooling_mode_mean_tokens": True}}},
         "cls with mean"),
        ({"files": {"modules.json": MODULES, "1_Pooling/config.json": {"pooling_mode_lasttoken": True}}}, "lasttoken"),
        ({"files": {"modules.json": {"no": "list"}}}, "not a list"),
        ({"architectures": ["BertForTokenClassification"]}, "single tokens"),
        ({"architectures": ["BertForSequenceClassification"], "id2label": {"0": "a", "2": "b"}}, "ids"),
    ],
)  # fmt: skip
def test_what_is_not_served_is_one_sentence(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    """Named in the error, and a refusal of the plan."""
    checkpoint = opened(tmp_path, **changes)
    with pytest.raises(InputError, match=says):
        read_encoder(checkpoint, longest=64)
    recipe = load_recipe("onnx_int8")
    plan = make_plan(checkpoint, load_target("desktop_linux_x86_64"), recipe, recipe.options())
    assert any(says in refusal for refusal in plan.refusals)


def test_the_plan_of_an_encoder(tmp_path: Path) -> None:
    """More than a byte a parameter, less than four; no KV cache; the model's own length; refusals that fit the kind."""
    checkpoint = opened(tmp_path)
    recipe = load_recipe("onnx_int8")
    plan = make_plan(checkpoint, load_target("t4"), recipe, recipe.options())
    assert not plan.refusals
    assert plan.estimate.kv_bytes == 0 and plan.estimate.context == 64
    assert checkpoint.parameters < plan.estimate.artifact_bytes < 4 * checkpoint.parameters
    fidelity = make_plan(checkpoint, load_target("t4"), recipe, recipe.options(favour="fidelity"))
    assert not fidelity.refusals  # 16 inputs are one block
    pooled = make_plan(
        opened(tmp_path / "c", architectures=["BertForSequenceClassification"]),
        load_target("t4"),
        recipe,
        recipe.options(pooling="cls"),
    )
    assert "is a classifier" in pooled.refusals[0]
    four = make_plan(checkpoint, load_target("t4"), recipe, recipe.options(bits=4))
    assert "bits=4 is for language models" in four.refusals[0]
