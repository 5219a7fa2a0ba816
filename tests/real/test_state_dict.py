"""State dicts become safetensors without running what a pickle may carry."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from packager.checkpoint.checkpoint import Checkpoint, open_checkpoint
from packager.core.errors import InputError
from packager.core.progress import Silent
from tests.unit.tiny import CONFIG, tiny_checkpoint, tiny_values, write_json

torch = pytest.importorskip("torch")


def tensors(config: dict[str, Any] = CONFIG) -> dict[str, Any]:
    return {name: torch.from_numpy(array).to(torch.bfloat16) for name, array in tiny_values(config).items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint folder without its safetensors."""
    made = tiny_checkpoint(tmp_path / "tiny")
    (made / "model.safetensors").unlink()
    return made


def opened(ref: Path) -> Checkpoint:
    place = ref if ref.is_dir() else ref.parent
    return open_checkpoint(str(ref), progress=Silent(), cache=place.parent / "cache")


def same(found: Checkpoint, tmp_path: Path) -> bool:
    wanted = open_checkpoint(str(tiny_checkpoint(tmp_path / "w" / "x")), progress=Silent(), cache=tmp_path / "cache")

    def data(checkpoint: Checkpoint) -> dict[str, bytes]:
        read = {name: (checkpoint.path / t.file, t) for name, t in checkpoint.tensors.items()}
        return {name: path.read_bytes()[t.start : t.start + t.nbytes] for name, (path, t) in read.items()}

    return data(found) == data(wanted)


@pytest.mark.parametrize(
    ("name", "wrap"),
    [
        ("pytorch_model.bin", lambda state: state),
        ("final.pth", lambda state: {"state_dict": state, "epoch": 3}),
        ("model.pt", lambda state: {f"module.{name}": tensor for name, tensor in state.items()}),
    ],
)
def test_a_state_dict_is_converted(
    folder: Path, tmp_path: Path, name: str, wrap: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    """A state dict alone, in a wrapper, and with DataParallel's prefix: the same tensors come out."""
    torch.save(wrap(tensors()), folder / name)
    (folder / "training_args.bin").write_bytes(b"not weights")
    found = opened(folder)
    assert found.origin.kind == "state_dict" and found.name == "tiny"
    assert same(found, tmp_path)
    assert opened(folder / name).path == found.path  # the file itself may be named; nothing is converted twice
    assert not list((folder.parent / "cache" / "state_dicts").glob(".part*"))


def test_shards_of_a_state_dict_are_converted(folder: Path, tmp_path: Path) -> None:
    """Several .bin files with an index are read in order; a missing one is named."""
    state = tensors()
    names = list(state)
    halves = {"pytorch_model-00001-of-00002.bin": names[:5], "pytorch_model-00002-of-00002.bin": names[5:]}
    for file, part in halves.items():
        torch.save({name: state[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in halves.items() for name in part}
    write_json(folder / "pytorch_model.bin.index.json", {"weight_map": weight_map})
    assert same(opened(folder), tmp_path)
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(InputError, match="pytorch_model-00002-of-00002"):
        opened(folder)


class Attack:
    """A pickle that would write a file when it is loaded."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


def test_a_pickle_with_code_never_runs(folder: Path, tmp_path: Path) -> None:
    """A state dict that carries code is refused, says so, and the code has not run."""
    target = tmp_path / "ran"
    torch.save({**tensors(), "extra": Attack(target)}, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="could run code") as caught:
        opened(folder)
    assert not target.exists()
    assert "save_pretrained" in caught.value.fix and "mkdir" in caught.value.why
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert target.exists()  # the attack is a real one


def test_what_is_no_state_dict_is_refused(folder: Path) -> None:
    """A cut file, a list, a legacy file that cannot be mapped, and a state dict without a config: each in words."""
    path = folder / "pytorch_model.bin"
    torch.save(tensors(), path)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(InputError, match="not a state dict that torch can read"):
        opened(folder)
    torch.save([1, 2], path)
    with pytest.raises(InputError, match="holds a list"):
        opened(folder)
    torch.save({**tensors(), "step": 3}, path)
    with pytest.raises(InputError, match="entry 'step' is a int"):
        opened(folder)
    torch.save(tensors(), path, _use_new_zipfile_serialization=False)
    with pytest.raises(InputError, match="without a copy in memory"):
        opened(folder)
    torch.save(tensors(), path)
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match=r"no config\.json"):
        opened(folder)


def test_a_tied_head_is_stored_once(tmp_path: Path) -> None:
    """torch saves a tied output layer beside the embedding; converted, it is there once."""
    folder = tiny_checkpoint(tmp_path / "tied", tie_word_embeddings=True)
    (folder / "model.safetensors").unlink()
    state = tensors({**CONFIG, "tie_word_embeddings": True})
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    torch.save(state, folder / "pytorch_model.bin")
    found = opened(folder)
    assert "lm_head.weight" not in found.tensors
    assert found.parameters == sum(int(np.prod(tensor.shape)) for tensor in found.tensors.values())
