"""The engine that a box builds for itself: when it is built, when not, what is kept, what a killed build leaves.

The GPU, TensorRT and trtexec are the stand-ins of gpu_double/; the processes, locks and files are real.
"""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from runtimes.engine import EngineError
from runtimes.engines.tensorrt import cache
from runtimes.engines.tensorrt.build import MEMORY, NONE_LEFT, judge_failure, require_model, run_build
from runtimes.engines.tensorrt.cache import Key
from runtimes.engines.tensorrt.command import main
from runtimes.engines.tensorrt.device import Device, full_version, unfit
from runtimes.engines.tensorrt.plan import Plan, read_plan
from runtimes.install.install import Refused, provide_engine
from runtimes.install.launchers import verbs, write_launchers
from runtimes.preflight.sources import Box
from tests.conftest import ROOT
from tests.unit.runtimes.gpu_bundle import DOUBLE, environment, make_bundle, write_plan

pytestmark = pytest.mark.real  # every test starts processes; `make unit` leaves it out, `make test` does not

DEVICE = Device("Orin", "8.7", 8_000_000_000, "12.6", "tensorrt", "10.3.0.30")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "bundle")


@pytest.fixture
def plan(bundle: Path) -> Plan:
    return read_plan(bundle / "model" / "plan.json")


def engine(bundle: Path, *words: str, **more: Any) -> tuple[int, dict[str, Any], str]:
    """``bin/engine``: exit code, its JSON and its progress on standard error."""
    out, log = io.StringIO(), io.StringIO()
    env = environment(bundle.parent, **more)
    with mock.patch.dict(os.environ, env, clear=True), redirect_stdout(out), redirect_stderr(log):
        code = main(["--bundle", str(bundle), "--json", *words])
    return code, json.loads(out.getvalue()), log.getvalue()


def builds(log: Path) -> list[list[str]]:
    """The calls of trtexec so far."""
    return [json.loads(line) for line in log.read_text("utf-8").splitlines()] if log.exists() else []


def kept(bundle: Path) -> list[str]:
    return sorted(path.name for path in (bundle / "cache" / "engines").iterdir() if path.name != cache.LOCK)


def test_an_engine_is_built_once(bundle: Path, tmp_path: Path) -> None:
    """The second call finds it; its name says for what it is, and its entry what was built and how."""
    wish = {"log": str(tmp_path / "log")}
    code, first, log = engine(bundle, "build", trtexec=wish)
    assert code == 0, (first, log)
    assert "building the engine for Orin with TensorRT 10.3.0.30, input_ids up to 4x64" in log
    assert first["engine"].startswith("sm8.7-10.3.0.30-cuda12.6-") and first["largest"]["input_ids"] == [4, 64]
    entry = json.loads((bundle / "cache" / "engines" / first["engine"] / "entry.json").read_text("utf-8"))
    assert (entry["profile"], entry["made"]["by"], entry["key"]["device"]) == (0, "trtexec", "Orin")
    code, second, _ = engine(bundle, "build", trtexec=wish)
    assert (code, second["engine"]) == (0, first["engine"])
    (call,) = builds(tmp_path / "log")
    assert call[0] == "--onnx=model.onnx" and call[-1].startswith("--saveEngine=/")
    assert engine(bundle, "build", "--force", trtexec=wish)[0] == 0
    assert len(builds(tmp_path / "log")) == 2


@pytest.mark.parametrize(
    "update",
    [{"tensorrt": "10.3.0.31"}, {"cuda": "12.8"}],
    ids=["another build number", "another driver"],
)
def test_an_update_of_the_box_builds_anew_and_removes_the_old_one(
    bundle: Path, tmp_path: Path, update: dict[str, str]
) -> None:
    """Nobody has to ask; the old engine goes when the new one is there, not before."""
    wish = {"log": str(tmp_path / "log")}
    before = engine(bundle, "build", trtexec=wish)[1]["engine"]
    code, _, log = engine(bundle, "build", device=update, trtexec={**wish, "fail": "[E] no such luck"})
    assert code == 9 and kept(bundle) == [before], log
    code, result, log = engine(bundle, "build", device=update, trtexec=wish)
    assert code == 0 and result["engine"] != before
    assert kept(bundle) == [result["engine"]]
    assert f"removing the engine that this box no longer uses: {before}" in log


def test_a_plan_that_changed_is_another_engine(bundle: Path, plan: Plan) -> None:
    write_plan(bundle, workspace_bytes=1 << 30)
    other = read_plan(bundle / "model" / "plan.json")
    assert Key.of(plan, DEVICE).name != Key.of(other, DEVICE).name
    assert Key.of(plan, DEVICE).name == Key.of(plan, replace(DEVICE, bytes=1)).name
    changes = [{"sm": "8.6"}, {"name": "Orin NX"}, {"cuda": "13.2"}, {"version": "10.3.0.31"}]
    others = {Key.of(plan, replace(DEVICE, **change)).name for change in changes}
    assert len({*others, Key.of(plan, DEVICE).name}) == 5


def test_an_engine_that_was_damaged_is_built_again(bundle: Path, tmp_path: Path) -> None:
    wish = {"log": str(tmp_path / "log")}
    result = Path(engine(bundle, "build", trtexec=wish)[1]["file"])
    result.write_bytes(result.read_bytes().replace(b"8.7", b"8.6"))
    assert engine(bundle, "show")[1]["built"] is False
    assert engine(bundle, "build", trtexec=wish)[0] == 0
    assert len(builds(tmp_path / "log")) == 2 and engine(bundle, "show")[1]["built"] is True


@pytest.mark.parametrize("how", [{}, {"kill": True}], ids=["reported by TensorRT", "killed by the kernel"])
def test_a_build_that_runs_out_of_memory_takes_the_smaller_profile(bundle: Path, how: dict[str, Any]) -> None:
    """4 texts of 64 tokens do not fit, 2 of 32 do; the engine is then of that profile, and says so."""
    code, result, log = engine(bundle, "build", trtexec={"most": 100, **how})
    assert code == 0, log
    assert result["largest"]["input_ids"] == [2, 32]
    assert "the build ran out of memory (" in log and "trying the next smaller profile" in log
    assert ("Cuda Runtime (out of memory)" in log) is not bool(how)
    assert "because a larger one did not fit into memory" in log


def test_too_little_memory_for_the_smallest_is_one_sentence(bundle: Path) -> None:
    code, result, _ = engine(bundle, "build", trtexec={"most": 10})
    assert code == 9
    assert result["error"].startswith(
        "Memory: expected enough to build even the smallest engine (input_ids up to 2x32)"
    )
    assert "end other programs" in result["error"] and kept(bundle) == []


def test_an_error_of_another_kind_is_told_and_nothing_smaller_is_tried(bundle: Path, tmp_path: Path) -> None:
    """A model that TensorRT does not understand is not a matter of memory; what it skipped for memory is none."""
    wish = {
        "log": str(tmp_path / "log"),
        "fail": "[11/22/2024] [E] [TRT] ModelImporter.cpp:948: While parsing",
        "skipped": "[W] [TRT] Skipping tactic 13 due to insufficient memory on requested size of 4229 detected",
    }
    code, result, log = engine(bundle, "build", trtexec=wish)
    assert code == 9 and len(builds(tmp_path / "log")) == 1
    assert "TensorRT could not build the engine (ModelImporter.cpp:948: While parsing)" in result["error"]
    assert "Local timing cache in use" in log  # TensorRT's own last lines are shown


@pytest.mark.parametrize(
    ("status", "lines", "kills", "memory"),
    [
        (1, ["[E] Error[2]: [virtualMemoryBuffer.cpp::resizePhysical::144] Error Code 2: OutOfMemory"], 0, True),
        (1, ["NvMapMemAllocInternalTagged: 1075072515 error 12", "[E] Engine could not be created"], 0, True),
        (1, ["terminate called after throwing an instance of 'std::bad_alloc'"], 0, True),
        (
            1,
            [
                "[W] [TRT] Skipping tactic 3 due to insufficient memory on requested size of 4226 detected",
                "[E] Error[10]: Error Code 10: (Could not find any implementation for node {X}.)",
            ],
            0,
            True,
        ),
        (
            1,
            [
                "[W] [TRT] Skipping tactic 3 due to insufficient memory on requested size of 4226 detected",
                "[E] [TRT] Error[4]: network has no output",
            ],
            0,
            False,
        ),
        (1, ["[E] Error[10]: Error Code 10: (Could not find any implementation for node {X}.)"], 0, False),
        (-signal.SIGKILL, [], 1, True),
        (137, [], 0, True),
        (-signal.SIGSEGV, ["[I] Building"], 0, False),
        (1, ["[E] Error[4]: kernel not supported"], 0, False),
        (0, ["[I] done"], 0, False),
    ],
)
def test_what_running_out_of_memory_looks_like(status: int, lines: list[str], kills: int, memory: bool) -> None:
    hints = [line for line in lines if MEMORY.search(line) or NONE_LEFT in line]
    result = judge_failure(status, lines, hints, kills)
    assert (result.fine, result.memory) == (False, memory)
    assert result.reason


def test_two_starts_at_once_build_one_engine(bundle: Path, tmp_path: Path) -> None:
    """The second waits for the first, says so, and takes what it made."""
    env = environment(tmp_path, trtexec={"log": str(tmp_path / "log"), "sleep": 1.5})
    command = [sys.executable, "-m", "runtimes", "engine", "--bundle", bundle, "build", "--json"]
    children = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)]
    ended = [child.communicate(timeout=60) for child in children]
    assert [child.returncode for child in children] == [0, 0], ended
    assert len(builds(tmp_path / "log")) == 1
    assert sum(b"another process builds an engine here" in log for _, log in ended) == 1
    assert len({json.loads(out)["engine"] for out, _ in ended}) == 1


def test_a_killed_build_leaves_nothing_that_counts(bundle: Path, tmp_path: Path) -> None:
    """Its half engine has no name, its lock dies with it, its child too, and the next build sweeps what is left."""
    log = tmp_path / "log"
    env = environment(tmp_path, trtexec={"log": str(log), "sleep": 60})
    child = subprocess.Popen(
        [sys.executable, "-m", "runtimes", "engine", "--bundle", bundle, "build"], env=env, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while not builds(log) and time.monotonic() < deadline:
        time.sleep(0.02)
    child.kill()
    child.wait()
    (left,) = kept(bundle)
    assert left.startswith(".sm8.7") and not (bundle / "cache" / "engines" / left / "entry.json").exists()
    code, result, _ = engine(bundle, "build")
    assert code == 0 and kept(bundle) == [result["engine"]]


def test_a_full_or_foreign_folder_is_told(plan: Plan, tmp_path: Path) -> None:
    """Where no folder can be written nothing is built in vain, and a disk that is full in the end is a sentence."""
    (tmp_path / "file").write_text("", encoding="utf-8")
    never = [tmp_path / "file" / "engines"]
    with pytest.raises(EngineError, match="expected a folder that this user may write"):
        cache.ensure(never, Key.of(plan, DEVICE), plan, lambda goal: pytest.fail("built"), print)

    def full(goal: Path) -> tuple[int, dict[str, Any]]:
        raise OSError(28, "No space left on device")

    with pytest.raises(EngineError, match="No space left on device"):
        cache.ensure([tmp_path / "engines"], Key.of(plan, DEVICE), plan, full, print)
    assert list(cache.entries(tmp_path / "engines")) == []


def test_where_engines_are_kept(tmp_path: Path) -> None:
    """A service's own folder first, then the install, then the user's cache; the first that can be written takes it."""
    home = tmp_path / "prefix"
    result = cache.places(home, {"CACHE_DIRECTORY": "/var/cache/tiny:/other", "HOME": "/u"})
    assert [str(path) for path in result] == [
        "/var/cache/tiny/engines",
        f"{home}/cache/engines",
        "/u/.cache/packager/prefix/engines",
    ]
    assert cache.places(home, {"XDG_CACHE_HOME": "/c"})[-1] == Path("/c/packager/prefix/engines")
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert cache.writable([tmp_path / "file" / "x", tmp_path / "yes"]) == tmp_path / "yes"


def test_where_somebody_stands_does_not_matter(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with a package of the same name: the children take the install's own runtime all the same."""
    (tmp_path / "runtimes").mkdir()
    (tmp_path / "runtimes" / "__init__.py").write_text("raise SystemExit('the wrong runtime')\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    code, result, _ = engine(bundle, "show")
    assert code == 0 and result["device"]["name"] == "Orin", result


def test_clear_removes_engines_alone(bundle: Path) -> None:
    engine(bundle, "build")
    (bundle / "cache" / "engines" / "somebody's.txt").write_text("mine", encoding="utf-8")
    code, result, _ = engine(bundle, "clear")
    assert code == 0 and len(result["removed"]) == 1
    assert kept(bundle) == ["somebody's.txt"]


@pytest.mark.parametrize(
    ("facts", "sentence"),
    [
        ({"sm": "8.6", "name": "NVIDIA GeForce RTX 3060"},
         "GPU: expected compute capability 8.7, found NVIDIA GeForce RTX 3060 with 8.6; use a bundle"),
        ({"tensorrt": "8.5.2.2"}, "TensorRT: expected 10.3 or newer and older than 11, found 8.5.2.2; update"),
        ({"tensorrt": "11.0.0.1"}, "TensorRT: expected 10.3 or newer and older than 11, found 11.0.0.1; update"),
    ],
)  # fmt: skip
def test_a_wrong_box_is_refused_before_anything_is_built(
    bundle: Path, tmp_path: Path, facts: dict[str, str], sentence: str
) -> None:
    """An Ampere card of 8.6 is no Orin, however alike: the comparison is exact."""
    code, result, _ = engine(bundle, "build", device=facts, trtexec={"log": str(tmp_path / "log")})
    assert (code, builds(tmp_path / "log")) == (4, [])
    assert result["error"].startswith(sentence)


def test_a_box_without_a_gpu_is_told_in_a_sentence(bundle: Path) -> None:
    """No driver; a driver that lists nothing; and one that takes the process down with it, which is a child."""
    no = "GPU: expected an NVIDIA GPU with its driver, found none ("
    _, result, _ = engine(bundle, "build", device={}, GPU_DOUBLE="{}")
    assert result["error"].startswith(no + "its library libcuda cannot be loaded)")
    assert engine(bundle, "build", device={"count": 0})[1]["error"].startswith(no + "the driver lists no device")
    assert engine(bundle, "build", device={"init": 100})[1]["error"].startswith(no + "cuInit failed with CUDA_ERROR")
    code, result, _ = engine(bundle, "build", device={"crash": True})
    assert code == 4 and "found that asking for it crashes (SIGABRT)" in result["error"]


def test_an_exact_compute_capability_also_for_engines_that_are_brought(bundle: Path) -> None:
    """One of 8.6 is refused on 8.7, and one of another version of its library."""
    (bundle / "model" / "engine.rtx").write_bytes(b"rtx")
    write_plan(
        bundle,
        engine={
            "file": "engine.rtx",
            "sha256": "0" * 64,
            "bytes": 3,
            "library": "tensorrt-rtx",
            "version": "1.7.1",
            "sm": ["8.6", "8.9"],
        },
    )
    plan = read_plan(bundle / "model" / "plan.json")
    rtx = replace(DEVICE, library="tensorrt-rtx", version="1.7.1")
    assert "expected compute capability 8.6 or 8.9, found Orin with 8.7" in str(unfit(plan, rtx))
    assert unfit(plan, replace(rtx, sm="8.9")) is None
    other = replace(rtx, sm="8.9", version="1.8.0")
    assert "expected 1.7.1, which compiled the engine, found 1.8.0" in str(unfit(plan, other))


def test_the_build_number_comes_from_debians_list(tmp_path: Path) -> None:
    """The Python package says 10.3.0; of an entry that was removed, or of another version, nothing is believed."""
    for name in ("commands.json", "process.json"):
        (tmp_path / name).write_text("{}", encoding="utf-8")
    assert full_version("10.3.0", Box(tmp_path)) == "10.3.0"
    status = tmp_path / "var" / "lib" / "dpkg" / "status"
    status.parent.mkdir(parents=True)
    status.write_text(
        "Package: libnvinfer-bin\nStatus: install ok installed\nVersion: 10.3.0.99-1+cuda12.5\n\n"
        "Package: libnvinfer8\nStatus: deinstall ok config-files\nVersion: 8.5.2.2-1+cuda11.4\n\n"
        "Package: libnvinfer10\nStatus: install ok installed\nArchitecture: arm64\nVersion: 10.3.0.30-1+cuda12.5\n",
        encoding="utf-8",
    )
    assert full_version("10.3.0", Box(tmp_path)) == "10.3.0.30"
    assert full_version("8.5.2", Box(tmp_path)) == "8.5.2"


def test_a_damaged_model_is_not_built(bundle: Path, plan: Plan) -> None:
    (bundle / "model" / "model.onnx").write_bytes(b"echo!")
    with pytest.raises(EngineError, match=r"model\.onnx: expected sha256"):
        require_model(plan)


def test_a_builder_that_is_no_program_is_told(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "trtexec").write_text("", encoding="utf-8")
    result = run_build([str(tmp_path / "trtexec")], plan, tmp_path / "goal", print)
    assert (result.fine, result.memory) == (False, False) and "cannot be started" in result.reason


def test_progress_is_told_while_it_builds(plan: Plan, tmp_path: Path) -> None:
    log: list[str] = []
    words = [sys.executable, "-c", f"import time; time.sleep(0.6); open({str(tmp_path / 'goal')!r}, 'w').write('x')"]
    assert run_build(words, plan, tmp_path / "goal", log.append, every=0.1).fine
    assert any(line.startswith("still building: ") and "of memory free" in line for line in log)
    assert os.path.exists(tmp_path / "goal")  # noqa: PTH110


def test_an_install_builds_the_engine_and_takes_over_an_earlier_one(bundle: Path, tmp_path: Path) -> None:
    """The last step of install.sh: bin/engine of the new install, with the old install's engine of the same key; a
    failure is a refusal with its sentence, before anything is published; another engine's bundle has no such step.
    """
    log = tmp_path / "log"
    write_launchers(bundle, ("engine",))
    (bundle / "venv" / "bin").mkdir(parents=True)
    (bundle / "venv" / "bin" / "python").symlink_to(sys.executable)
    (bundle / "runtime").mkdir()
    (bundle / "runtime" / "runtimes").symlink_to(ROOT / "runtimes")
    for part in ("cuda", "tensorrt"):
        (bundle / "runtime" / part).symlink_to(DOUBLE / part)
    manifest = json.loads((bundle / "manifest.json").read_text("utf-8"))

    def install(old: Path | None, **trtexec: Any) -> None:
        with mock.patch.dict(os.environ, environment(tmp_path, trtexec={"log": str(log), **trtexec}), clear=True):
            provide_engine(manifest, bundle, old)

    with pytest.raises(Refused, match=r"even the smallest engine .* add --skip-engine\.$") as refused:
        install(None, most=10)
    assert refused.value.code == 9 and len(builds(log)) == 2
    install(tmp_path / "nothing")
    assert len(builds(log)) == 3 and verbs(manifest) == ("check", "serve", "bench", "engine")
    (bundle / "cache").rename(tmp_path / "cache")
    (tmp_path / "old").mkdir()
    (tmp_path / "cache").rename(tmp_path / "old" / "cache")
    install(tmp_path / "old")
    assert len(builds(log)) == 3 and len(kept(bundle)) == 1
    other = {"run": {"engine": "llamacpp"}}
    provide_engine(other, tmp_path / "no such place", None)
    assert verbs(other) == ("check", "serve", "bench")
