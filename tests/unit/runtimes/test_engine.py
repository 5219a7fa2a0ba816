"""Stop strings, iterators over callbacks, and the manifest's run object."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from runtimes.engine import Emit, EngineError, Piece, StopScanner, iterate
from runtimes.engines.llamacpp.logits import _plain_top
from runtimes.manifest import ManifestError, inside, parse_run, read_bundle


@pytest.mark.parametrize(
    ("stops", "pieces", "text", "stopped"),
    [
        (["end"], ["the ", "e", "n", "d of"], "the ", True),
        (["end"], ["e", "e", "nd"], "e", True),
        (["aab"], ["a", "a", "a", "b"], "a", True),
        (["xyz"], ["x", "y"], "xy", False),
        (["b", "abc"], ["a", "b", "c"], "a", True),
        ([], ["a", "b"], "ab", False),
        (["。"], ["你", "好。", "吗"], "你好", True),
    ],
)
def test_stop_strings_across_pieces(stops: list[str], pieces: list[str], text: str, stopped: bool) -> None:
    """Nothing of a stop string is ever sent, and nothing else is lost."""
    scanner, out, hit = StopScanner(stops), "", False
    for piece in pieces:
        more, hit = scanner.feed(piece)
        out += more
        if hit:
            break
    if not hit:
        out += scanner.rest()
    assert (out, hit) == (text, stopped)


def test_text_that_cannot_become_a_stop_string_is_sent_at_once() -> None:
    scanner = StopScanner(["stop"])
    assert scanner.feed("a st") == ("a ", False)
    assert scanner.feed("art") == ("start", False)


def test_closing_the_iterator_cancels() -> None:
    """And waits until the engine has really ended."""
    ended = threading.Event()

    def endless(emit: Emit) -> None:
        while not emit(Piece("x")):
            pass
        ended.set()

    pieces = iterate(endless)
    assert next(pieces).text == "x"
    pieces.close()  # type: ignore[attr-defined]
    assert ended.is_set()


def test_an_error_in_the_engine_reaches_the_reader() -> None:
    def failing(emit: Emit) -> None:
        emit(Piece("x"))
        raise EngineError("no")

    pieces = iterate(failing)
    assert next(pieces).text == "x"
    with pytest.raises(EngineError, match="no"):
        next(pieces)


def test_log_probabilities_sum_to_one_and_ties_go_to_the_lower_id() -> None:
    import math

    row = _plain_top([1.0, 3.0, 3.0, -2.0], 4)
    assert list(row) == [1, 2, 0, 3]
    assert math.isclose(sum(math.exp(value) for value in row.values()), 1.0)


def test_no_path_leads_out_of_the_bundle(tmp_path: Path) -> None:
    """Neither upwards, nor absolute, nor through a link."""
    (tmp_path / "secret").write_text("x")
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    (bundle / "file").write_text("x")
    (bundle / "link").symlink_to(tmp_path / "secret")
    assert inside(bundle, "file") == (bundle / "file").resolve()
    for path in ("../secret", str(tmp_path / "secret"), "link", "missing", "."):
        with pytest.raises(ManifestError):
            inside(bundle, path)


def test_a_manifest_is_read_or_refused_in_one_sentence(tmp_path: Path) -> None:
    """Missing, broken, of another version, without a run object."""
    with pytest.raises(ManifestError, match="no manifest"):
        read_bundle(tmp_path)
    for text, word in (
        ("{", "cannot be read"),
        ('{"schema_version": 9}', "version 1"),
        ('{"schema_version": 1}', "no run object"),
        ('{"schema_version": 1, "run": {"engine": "llamacpp"}}', "run.model"),
    ):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(ManifestError, match=word):
            read_bundle(tmp_path)
    for name in ("model.gguf", "tokenizer.json"):
        (tmp_path / name).write_text("")
    run = {"engine": "llamacpp", "model": "model.gguf", "tokenizer": "tokenizer.json", "slots": 2}
    (tmp_path / "manifest.json").write_text(json.dumps({"schema_version": 1, "name": "m", "run": run}))
    read = read_bundle(tmp_path)
    assert (read.name, read.slots, read.context, read.chat_template) == ("m", 2, 4096, None)
    with pytest.raises(ManifestError, match="cannot be used"):
        parse_run({**run, "slots": "many"})
