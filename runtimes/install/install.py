"""Installs a bundle on this box: preflight, then the whole install in a temporary sibling of the prefix, then a rename.

install.sh chooses a Python and calls this. Standard library only, no network: the wheels are in the bundle, pip among
them (a Debian python3 has no ensurepip). Nothing is written before the preflight has passed; a killed install leaves
only a hidden temporary sibling, which the next run removes. Exit codes: 0 installed, 4 the box or the prefix does not
fit, 5 the bundle is damaged, 9 the machine failed, 130 interrupted.
"""

from __future__ import annotations

import argparse
import compileall
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from runtimes.files import clone, copy, exchange, file_sha256, flush, lock_folder, say
from runtimes.install.launchers import make_engine, verbs, write_launchers, write_units
from runtimes.preflight import check

BIN = "Scripts" if os.name == "nt" else "bin"


class Refused(Exception):
    """The install cannot continue: one sentence, and the exit code."""

    def __init__(self, sentence: str, code: int = check.REFUSED) -> None:
        super().__init__(sentence)
        self.code = code


def install(bundle: Path, prefix: Path, *, interpreter: str = sys.executable, skip_engine: bool = False) -> bool:
    """Install; False when the same bundle is already installed and intact. Raises Refused; the prefix is then
    unchanged. skip_engine: build a Jetson's engine at the first start instead.
    """
    bundle = bundle.resolve()
    prefix = Path(os.path.realpath(prefix.expanduser()))
    try:
        manifest = check.read_manifest(bundle, needs=True)
    except ValueError as error:
        raise Refused(str(error), check.DAMAGED) from error
    facts = check.read_facts(prefix, gpu=bool(manifest["needs"].get("gpu")))
    findings = check.compare(manifest["needs"], facts, installing=True)
    ours = check_prefix(bundle, prefix)
    say(f"checking this box and the files of {manifest['bundle']} …")
    files = check.check_files(bundle)
    digest = file_sha256(bundle / check.MANIFEST)
    done = ours and is_intact(prefix, digest, verbs(manifest))
    if done:  # nothing is written then, so the disk may be full
        findings = [item for item in findings if item.name != "disk"]
    code = check.exit_code(findings, files)
    if code != check.FITS:
        raise Refused(check.refusal(findings, files), code)
    for sentence in check.warnings(findings):
        say(f"warning: {sentence}")
    if done:
        if not skip_engine:
            provide_engine(manifest, prefix, None)  # an update of JetPack may need another engine
        return False
    try:
        prefix.parent.mkdir(parents=True, exist_ok=True)
        sweep(prefix)
        build_and_publish(bundle, prefix, manifest, digest, interpreter, skip_engine=skip_engine)
    except OSError as error:
        place = f" ({error.filename})" if error.filename else ""
        raise Refused(
            f"The install failed: {error.strerror or error}{place}; nothing was changed at {prefix}, "
            "repair the cause and run it again.",
            check.MACHINE,
        ) from error
    return True


def check_prefix(bundle: Path, prefix: Path) -> bool:
    """Whether the prefix has an install of ours. Raises Refused for other files there, or a folder without write
    access.
    """
    if prefix == bundle or prefix in bundle.parents or bundle in prefix.parents:
        raise Refused(
            f"Refused: the prefix {prefix} must lie apart from the bundle {bundle}; choose another place with --prefix."
        )
    parent = prefix.parent
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise Refused(
            f"Refused: expected a folder that {user()} may write, found {parent} which is not; "
            "choose another place with --prefix, or run it as its owner.",
            check.MACHINE,
        )
    if not prefix.exists():
        return False
    if prefix.is_dir() and os.path.ismount(prefix):
        raise Refused(
            f"Refused: {prefix} is a mount point and cannot be replaced in one step; "
            f"choose a folder below it, for example --prefix {prefix / 'packager'}."
        )
    if is_ours(prefix):
        return True
    if not prefix.is_dir() or any(prefix.iterdir()):
        raise Refused(
            f"Refused: expected an empty or new folder or an earlier install, found other files at {prefix}; "
            "choose another place with --prefix, or move them away."
        )
    return False


def is_ours(prefix: Path) -> bool:
    """Whether the prefix has an install of ours, intact or not: its marker file has our fields."""
    try:
        marker = json.loads((prefix / check.MARKER).read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(marker, dict) and {"bundle", "manifest_sha256", "python"} <= marker.keys()


def user() -> str:
    """The user's name, for a message."""
    return os.environ.get("USER") or os.environ.get("USERNAME") or "this user"


def is_intact(prefix: Path, manifest_sha256: str, names: tuple[str, ...]) -> bool:
    """Whether the install at the prefix has this manifest and this Python, is undamaged and can start."""
    try:
        marker = json.loads((prefix / check.MARKER).read_text("utf-8"))
        same = marker["manifest_sha256"] == manifest_sha256 and marker["python"] == sys.version.split()[0]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    if not same or any(item.ok is False for item in check.check_files(prefix)):
        return False
    if not all((prefix / "bin" / verb).is_file() for verb in names):
        return False
    return starts(prefix)


def starts(home: Path) -> bool:
    """Whether all installed packages can be imported, in a child (which an illegal instruction may kill)."""
    code = (
        "import importlib, importlib.metadata as m, sys\n"
        "names = [f.parts[0] for d in m.distributions() for f in (d.files or ()) "
        "if len(f.parts) == 2 and f.parts[1] == '__init__.py']\n"
        "[importlib.import_module(n) for n in sorted(set(names)) if not n.startswith('_')]\n"
    )
    return (
        subprocess.run(
            [home / "venv" / BIN / "python", "-I", "-B", "-c", code],
            check=False,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ).returncode
        == 0
    )


def siblings(prefix: Path) -> tuple[str, Path]:
    """The name prefix of temporary siblings, and the path of an old install while two renames replace it."""
    return f".{prefix.name}.installing-", prefix.parent / f".{prefix.name}.previous"


def sweep(prefix: Path) -> None:
    """Remove the remains of killed installs; rename an old install back that a kill left under its temporary name."""
    start, previous = siblings(prefix)
    if previous.exists() and not prefix.exists():
        previous.rename(prefix)
    for left in [previous, *prefix.parent.glob(f"{start}*")]:
        if left.is_dir() and (held := lock_folder(left)) is not None:
            say(f"removing what an earlier install left: {left}")
            remove(left)
            os.close(held)


def remove(folder: Path) -> None:
    """Delete a tree; report one that cannot be deleted, because it takes disk."""
    shutil.rmtree(folder, ignore_errors=True)
    if folder.exists():
        say(f"could not remove {folder}; delete it by hand")


def provide_engine(manifest: dict[str, Any], home: Path, old: Path | None) -> None:
    """Build the engine of a bundle whose engine the box builds. old: see make_engine. Raises Refused."""
    if "engine" not in verbs(manifest):
        return
    say("looking for this box's engine …")
    code, sentence = make_engine(home, old)
    if code:
        raise Refused(
            f"{sentence} To install without it, add --skip-engine.",
            check.REFUSED if code == check.REFUSED else check.MACHINE,
        )


def build_and_publish(
    bundle: Path, prefix: Path, manifest: dict[str, Any], digest: str, interpreter: str, *, skip_engine: bool = False
) -> None:
    """Make the whole install beside the prefix, then rename it to the prefix. Raises Refused or OSError."""
    work = Path(tempfile.mkdtemp(prefix=siblings(prefix)[0], dir=prefix.parent))
    held = lock_folder(work)
    try:
        work.chmod(0o755)
        say("copying the model and the server …")
        copy_files(bundle, work)
        say("installing the Python packages from wheels/ …")
        make_venv(bundle, work, interpreter)
        write_launchers(work, verbs(manifest))
        write_units(bundle, work, prefix)
        if not starts(work):
            raise Refused(
                "The installed packages do not start on this processor and Python, found by importing them; "
                f"nothing was changed at {prefix}, use a bundle for another target or another --python."
            )
        if not skip_engine:
            provide_engine(manifest, work, prefix)
        marker = {
            "schema_version": 1,
            "bundle": manifest["bundle"],
            "manifest_sha256": digest,
            "python": sys.version.split()[0],
        }
        (work / check.MARKER).write_text(json.dumps(marker, indent=2) + "\n", "utf-8")
        sync(work)
        publish(work, prefix)
    finally:
        if work.exists():  # the old install after the swap, or a failed install
            remove(work)
        if held is not None:
            os.close(held)


def copy_files(bundle: Path, work: Path) -> None:
    """Copy the files that the box runs. Each is hashed again during the copy, because a USB stick can fail between two
    reads. Raises Refused.
    """
    for path, expected in check.sums(bundle):
        if not check.is_installed(path):
            continue
        goal = work / path
        goal.parent.mkdir(parents=True, exist_ok=True)
        if not clone(bundle / path, goal) and copy(bundle / path, goal) != expected:
            raise Refused(
                f"{path} changed while it was copied, found by its sha256; copy the bundle again.", check.DAMAGED
            )
        goal.chmod(0o755 if path.endswith(".sh") else 0o644)
    (work / check.SUMS).write_bytes((bundle / check.SUMS).read_bytes())
    compileall.compile_dir(work / "runtime", quiet=2, stripdir=str(work), prependdir=None)


def make_venv(bundle: Path, work: Path, interpreter: str) -> None:
    """Make a virtual environment from the bundled wheels with the bundled pip: every hash checked, no package index."""
    wheels = bundle / "wheels"
    pip = sorted(wheels.glob("pip-*.whl"))
    if not pip:
        raise Refused("The bundle has no wheel of pip in wheels/; copy the bundle again.", check.DAMAGED)
    scratch = work / ".tmp"
    scratch.mkdir()
    # The box's own pip settings (an index, a constraint, a proxy) must not apply; TMPDIR: /tmp may be small.
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PIP_", "PYTHON", "VIRTUAL_ENV"))}
    clean |= {"PIP_CONFIG_FILE": os.devnull, "TMPDIR": str(scratch), "TEMP": str(scratch)}
    step([interpreter, "-I", "-m", "venv", "--without-pip", str(work / "venv")], clean, "making a virtual environment")
    python = work / "venv" / BIN / "python"
    step(
        [
            str(python),
            "-I",
            str(pip[-1] / "pip"),
            "--isolated",
            "install",
            "--quiet",
            "--no-index",
            "--no-deps",
            "--require-hashes",
            "--no-cache-dir",
            "--disable-pip-version-check",
            "--no-input",
            "--no-warn-script-location",
            "--root-user-action=ignore",
            "--find-links",
            str(wheels),
            "--requirement",
            str(wheels / "requirements.txt"),
        ],
        clean,
        "installing the packages",
    )
    shutil.rmtree(scratch, ignore_errors=True)
    # these scripts contain the temporary path; the launchers in bin/ replace them
    for script in (work / "venv" / BIN).iterdir():
        if not script.name.lower().startswith("python"):
            script.unlink()


def step(command: list[str], env: dict[str, str], what: str) -> None:
    """Run one child. Raises Refused with the last error line of its output when it fails."""
    done = subprocess.run(
        command, env=env, check=False, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if done.returncode != 0:
        lines = [line.strip() for line in done.stdout.decode("utf-8", "replace").splitlines() if line.strip()]
        cause = next((line for line in reversed(lines) if "rror" in line), lines[-1] if lines else "no message")
        raise Refused(
            f"{what} failed with status {done.returncode} ({cause[:300]}); nothing was changed at the "
            "prefix, repair the cause and run it again.",
            check.MACHINE,
        )


def sync(work: Path) -> None:
    """Flush the install to disk before the rename; one sync instead of an fsync for each of several thousand files."""
    if hasattr(os, "sync"):
        os.sync()
    flush(work)


def publish(work: Path, prefix: Path) -> None:
    """Rename the new install to the prefix. An old install is swapped to the temporary name atomically; the caller
    deletes it. Raises OSError.
    """
    if not prefix.exists():
        work.rename(prefix)
    elif not any(prefix.iterdir()):
        prefix.rmdir()
        work.rename(prefix)
    elif not exchange(work, prefix):  # without renameat2: two renames; sweep() repairs a kill between them
        previous = siblings(prefix)[1]
        prefix.rename(previous)
        try:
            work.rename(prefix)
        except OSError:
            previous.rename(prefix)
            raise
        remove(previous)
    flush(prefix.parent)


def main(argv: list[str] | None = None) -> int:
    """Install a bundle; the exit code."""
    options = argparse.ArgumentParser(prog="install.sh", description="Install this bundle; no network is needed.")
    options.add_argument("--bundle", type=Path, required=True, help=argparse.SUPPRESS)
    options.add_argument("--prefix", type=Path, required=True, help="the folder to install to")
    options.add_argument("--skip-engine", action="store_true", help="leave a Jetson's engine to the first start")
    given = options.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))  # exit normally, so that the temporary sibling is removed
    try:
        fresh = install(given.bundle, given.prefix, skip_engine=given.skip_engine)
    except Refused as error:
        say(str(error))
        return error.code
    except KeyboardInterrupt:
        say("interrupted; nothing was changed")
        return 130
    prefix = Path(os.path.realpath(given.prefix.expanduser()))
    say(f"installed at {prefix}" if fresh else f"already installed at {prefix}: nothing to do")
    names = verbs(check.read_manifest(prefix))
    sys.stdout.write("".join(f"{prefix / 'bin' / verb}\n" for verb in names))
    return 0


if __name__ == "__main__":
    sys.exit(main())
