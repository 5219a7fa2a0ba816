"""The targets of the repository, and what the strict reader says to a file that is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from packager.core.errors import UsageError
from packager.target import GIB, load_target, target_keys, wheel_platforms
from tests.conftest import ROOT

TARGETS = ROOT / "targets"
GOOD = """
title = "A box"
[platform]
system = "linux"
machine = "aarch64"
python = ["3.10"]
wheel_tag = "manylinux_2_35_aarch64"
glibc = "2.35"
[memory]
total_gib = 8
reserved_gib = 1.5
bandwidth_gb_s = 68
[recipes]
default = "gguf"
supported = ["gguf"]
[options.gguf]
quant = "Q4_0"
"""


def write(tmp_path: Path, text: str, name: str = "box.toml") -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_a_small_file_is_enough(tmp_path: Path) -> None:
    """Name from the file, sizes in bytes, options as written, a digest of the file."""
    target = load_target(write(tmp_path, GOOD))
    assert (target.name, target.system, target.machine, target.glibc) == ("box", "linux", "aarch64", "2.35")
    assert (target.memory_bytes, target.reserved_bytes) == (8 * GIB, GIB * 3 // 2)
    assert target.budget("gguf") == GIB * 13 // 2
    assert target.bandwidth == 68e9
    assert target.options["gguf"]["quant"] == "Q4_0"
    assert len(target.digest) == 64
    assert load_target(write(tmp_path, GOOD + "# seen\n")).digest != target.digest


@pytest.mark.parametrize("file", sorted(TARGETS.glob("*.toml")), ids=lambda file: file.stem)
def test_every_target_of_the_repository_is_whole(file: Path) -> None:
    """It loads, prints as JSON, and every fact has a source: a comment stands above memory and platform figures."""
    target = load_target(file)
    assert json.loads(json.dumps(target.as_dict()))["name"] == file.stem
    assert target.recipe in target.recipes.supported
    assert target.wheel_platforms[0] == target.platform.wheel_tag
    lines = file.read_text(encoding="utf-8").splitlines()
    for key in ("bandwidth_gb_s", "reserved_gib"):
        numbers = [number for number, line in enumerate(lines) if line.startswith(key)]
        assert all("#" in "".join(lines[max(0, number - 3) : number]) for number in numbers), key


def test_the_issue_s_targets_exist() -> None:
    """Ten devices, and the figures that a plan rests on."""
    targets = {file.stem: load_target(file) for file in TARGETS.glob("*.toml")}
    assert {name: targets[name].memory.bandwidth_gb_s for name in targets if name.startswith("jetson")} == {
        "jetson_orin_nano_8gb": 68.0,
        "jetson_orin_nx_16gb": 102.4,
        "jetson_agx_orin_64gb": 204.8,
        "jetson_xavier_nx": 59.7,
        "jetson_thor": 273.0,
    }
    assert {"desktop_linux_x86_64", "desktop_windows_x86_64", "desktop_macos_arm64", "ollama", "t4"} < set(targets)
    t4 = targets["t4"]
    assert t4.gpu is not None
    assert (t4.gpu.architecture, t4.gpu.memory, t4.gpu.bandwidth_gb_s) == ("sm_75", "discrete", 320.0)
    assert t4.bandwidth_for("gguf") < 320e9, "the CPU build does not read the T4's memory"
    xavier = targets["jetson_xavier_nx"]
    assert xavier.python == ("3.8",) and xavier.software[0].tensorrt == "8.5.2"


def test_a_recipe_on_a_discrete_gpu_has_its_memory(tmp_path: Path) -> None:
    """Its budget and bandwidth are the card's; those of other recipes stay the host's."""
    card = '[gpu]\nname = "T4"\narchitecture = "sm_75"\nmemory = "discrete"\nmemory_gib = 15\nbandwidth_gb_s = 320\n'
    both = GOOD.replace('supported = ["gguf"]', 'supported = ["gguf", "gptq_int4"]')
    target = load_target(write(tmp_path, both + card + 'recipes = ["gptq_int4"]\n'))
    assert (target.budget("gptq_int4"), target.bandwidth_for("gptq_int4")) == (15 * GIB, 320e9)
    assert target.bandwidth_for("gguf") == 68e9


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("total_gib", "total_gb", 'unknown key "memory.total_gb". Did you mean "total_gib"?'),
        ("title =", "tilte =", 'unknown key "tilte". Did you mean "title"?'),
        ('title = "A box"', "title = 3", "title has to be text, and is 3"),
        ("total_gib = 8", 'total_gib = "8"', "memory.total_gib has to be number, and is '8'"),
        ("total_gib = 8", "total_gib = true", "memory.total_gib has to be number"),
        ("total_gib = 8", "total_gib = nan", "memory.total_gib has to be number"),
        ("total_gib = 8", "total_gib = 1", "leaves nothing"),
        ("total_gib = 8\n", "", 'the key "memory.total_gib" is missing. It is the installed memory, GiB.'),
        ("[memory]", "[memroy]", 'unknown key "memroy". Did you mean "memory"?'),
        ("bandwidth_gb_s = 68", "bandwidth_gb_s = 0", "has to be above 0"),
        ('system = "linux"', 'system = "linus"', 'platform.system is "linus". Did you mean "linux"?'),
        ('system = "linux"', "system = 1", 'platform.system is "1"'),
        ('python = ["3.10"]', 'python = "3.10"', "platform.python has to be list of text"),
        ('python = ["3.10"]', 'python = ["py310"]', "platform.python is ['py310']"),
        ("_2_35_a", "_a", "platform.wheel_tag cannot be used"),
        ('glibc = "2.35"', 'glibc = "2.31"', "both must name the same one"),
        ('glibc = "2.35"', "", "platform.glibc is None"),
        ('default = "gguf"', 'default = "onnx"', 'recipes.default is "onnx"'),
        ("[options.gguf]", "[options.ggfu]", 'the recipe "ggfu" is not in recipes.supported. Did you mean "gguf"?'),
        ("[options.gguf]", "[options]", "[options] has to hold one table a recipe"),
        ("[platform]", '[gpu]\nname="x"\narchitecture="y"\nmemory="discrete"\n[platform]', "gpu.memory is discrete"),
        ("[platform]", "software = 1\n[platform]", "software has to be a list of tables"),
        ("[platform]", "[[software]]\njetpack = 6\n[platform]", "software[0].jetpack has to be text"),
        ("[platform]", "[platform", "cannot be read"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, old: str, new: str, says: str) -> None:
    """File, key path and, where one is near, the key that was meant."""
    assert old in GOOD
    with pytest.raises(UsageError) as caught:
        load_target(write(tmp_path, GOOD.replace(old, new, 1)))
    assert says in str(caught.value)
    assert "box.toml" in str(caught.value)


def test_missing_table_and_bad_file_name(tmp_path: Path) -> None:
    """A table is called a table; a name that would not do for a folder is refused."""
    with pytest.raises(UsageError, match=r"the table \[platform\] is missing"):
        load_target(write(tmp_path, 'title = "x"'))
    with pytest.raises(UsageError, match="lower-case letters"):
        load_target(write(tmp_path, GOOD, "My Box.toml"))
    with pytest.raises(UsageError, match="cannot be read"):
        load_target(tmp_path / "none.toml")


def test_glibc_is_linux_only(tmp_path: Path) -> None:
    """A Mac with a glibc is a mistake in the file."""
    text = GOOD.replace('"linux"', '"macos"').replace("manylinux_2_35_aarch64", "macosx_13_0_arm64")
    with pytest.raises(UsageError, match="Only Linux has it"):
        load_target(write(tmp_path, text))


def test_wheel_platforms() -> None:
    """Newest first, with the legacy names where they belong."""
    tags = wheel_platforms("manylinux_2_31_aarch64")
    assert (tags[0], tags[-2:]) == ("manylinux_2_31_aarch64", ("manylinux_2_17_aarch64", "manylinux2014_aarch64"))
    assert "manylinux1_x86_64" in wheel_platforms("manylinux_2_28_x86_64")
    assert wheel_platforms("macosx_12_0_arm64")[-1] == "macosx_11_0_universal2"
    assert wheel_platforms("win_amd64") == ("win_amd64",)


def test_keys_for_the_reference() -> None:
    """Every key of every target file is documented, with its type."""
    keys = {key: (kind, doc) for key, kind, doc in target_keys()}
    assert keys["memory.total_gib"] == ("number", "installed memory, GiB")
    assert keys["platform.glibc"][0] == "text, optional"
    assert keys["software[].tensorrt"][0] == "text, optional"
    assert keys["options.RECIPE.OPTION"][0] == "as the recipe's option, optional"
    assert all(doc for _, doc in keys.values())
