"""The command line: click verbs, thin, no logic."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from packager import __version__
from packager.cli.console import Console, prepare_streams
from packager.cli.flags import common, limited, requested, sourced
from packager.core.errors import MachineError, PackagerError, UsageError

if TYPE_CHECKING:
    from packager.build import Request

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


def main() -> None:
    """Run the command line; a PackagerError is shown as three lines and ends with its own exit code."""
    wants_json = "--json" in sys.argv[1:]
    prepare_streams()
    try:
        code = cli.main(standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        sys.stderr.write(error.format_message() + "\n")
        code = UsageError.exit_code
    except click.exceptions.Abort:
        code = _interrupted()
    except click.ClickException as error:
        Console(json_mode=wants_json).error(_usage(error))
        code = UsageError.exit_code
    except PackagerError as error:
        Console(json_mode=wants_json and not error.shown).error(error)
        code = error.exit_code
    except KeyboardInterrupt:
        code = _interrupted()
    except MemoryError:
        Console(json_mode=wants_json).error(
            MachineError(
                "the machine has too little memory for this step.", fix="`packager plan` shows how much a build needs."
            )
        )
        code = MachineError.exit_code
    sys.exit(code if isinstance(code, int) else 0)


def _interrupted() -> int:
    sys.stderr.write("\ninterrupted; finished steps are kept, nothing half-written is left.\n")
    return 130


def _usage(error: click.ClickException) -> UsageError:
    context = getattr(error, "ctx", None)
    return UsageError(
        error.format_message(), fix=f"See `{context.command_path} --help`." if context else "See `packager --help`."
    )


@click.group(
    context_settings=CONTEXT, epilog="Start: packager targets; packager plan ./my-model --target desktop_linux_x86_64"
)
@click.version_option(__version__, prog_name="packager")
def cli() -> None:
    """A fine-tuned checkpoint becomes a folder that a box without a network can run."""


@cli.command(epilog="Example: packager inspect ./my-model --adapter ./my-lora", short_help="What a checkpoint is.")
@sourced
@common
def inspect(checkpoint: str, adapter: Path | None, revision: str | None, name: str | None, console: Console) -> None:
    """Show what a checkpoint is, whether its parts agree, and on which targets it fits.

    CHECKPOINT is a Hugging Face folder, a hub id (org/name), modelscope:ID, or a .bin/.pth state dict."""
    from packager.cli import show

    show.inspect(console, checkpoint, adapter, revision, name)


@cli.group(invoke_without_command=True, epilog="Example: packager targets show jetson_orin_nano_8gb")
@common
@click.pass_context
def targets(context: click.Context, console: Console) -> None:
    """List the devices a bundle can be made for; `show NAME` for one."""
    from packager.cli import show

    if context.invoked_subcommand is None:
        show.targets(console)


@targets.command("show", epilog="Example: packager targets show t4 --json")
@click.argument("name")
@common
def targets_show(name: str, console: Console) -> None:
    """Everything known of one target (a name, or a .toml file of your own)."""
    from packager.cli import show

    show.target(console, name)


@cli.group(invoke_without_command=True, epilog="Example: packager recipes show gguf")
@common
@click.pass_context
def recipes(context: click.Context, console: Console) -> None:
    """List the ways to build; `show NAME` for one with its options."""
    from packager.cli import show

    if context.invoked_subcommand is None:
        show.recipes(console)


@recipes.command("show", epilog="Example: packager recipes show gguf --json")
@click.argument("name")
@common
def recipes_show(name: str, console: Console) -> None:
    """One recipe and the keys that --set takes."""
    from packager.cli import show

    show.recipe(console, name)


@cli.group(invoke_without_command=True, epilog="Example: packager templates show qwen > my-model/chat_template.jinja")
@common
@click.pass_context
def templates(context: click.Context, console: Console) -> None:
    """List the training templates that `build --template` knows; `show NAME` prints one as Jinja."""
    from packager.cli import show

    if context.invoked_subcommand is None:
        show.templates(console)


@templates.command("show", epilog="Example: packager templates show deepseekr1")
@click.argument("name")
@common
def templates_show(name: str, console: Console) -> None:
    """One training template as the chat template that a checkpoint trained with it should carry."""
    from packager.cli import show

    show.template(console, name)


@cli.command(
    epilog="Example: packager plan ./my-model --target jetson_orin_nano_8gb --set quant=Q4_K_M",
    short_help="What a build would make, need and yield.",
)
@requested
@common
def plan(request: Request, console: Console) -> None:
    """Show size, memory and speed of what a build would make, and why it would not fit. Builds nothing.

    Exits with 4 when the plan refuses."""
    from packager.cli import show

    show.plan(console, request)


@cli.command(
    epilog="Example: packager build ./my-model --adapter ./my-lora --target desktop_linux_x86_64 "
    "--set quant=Q4_K_M --calibration pairs.json -o out",
    short_help="Build a bundle.",
)
@requested
@click.option(
    "--template",
    help="What the model was fine-tuned with: a LLaMA-Factory template name, the run's .yaml, or a Jinja file.",
)
@click.option(
    "--trust-calibration", is_flag=True, help="Use the calibration file even if the model does not know its text."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Random seed of the build (int4 tuning).")
@limited
@click.option("--no-verify", is_flag=True, help="Do not run the artifact against its source. The manifest says so.")
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), required=True, help="Folder for OUT/<model>-<target>-<recipe>/."
)
@common
def build(
    request: Request,
    template: str | None,
    trust_calibration: bool,
    seed: int,
    limits: dict[str, float],
    no_verify: bool,
    out: Path,
    console: Console,
) -> None:
    """Build a bundle and print its path. Finished steps are kept: the same command again takes seconds.

    Exits with 4 when the plan refuses, with 6 when the artifact is too far from its checkpoint; `packager recipes show`
    prints the recipe's thresholds."""
    from packager.cli import show

    full = dataclasses.replace(
        request,
        seed=seed,
        verify=not no_verify,
        limits=limits,
        template=template,
        trust_calibration=trust_calibration,
    )
    show.build(console, full, out)


@cli.command(epilog="Example: packager verify out/my-model-desktop_linux_x86_64-gguf", short_help="Check a bundle.")
@click.argument("bundle", type=click.Path(path_type=Path))
@common
def verify(bundle: Path, console: Console) -> None:
    """Check digests, manifest and the model's own header; report every extra, missing or changed file.

    Exits with 5 when something is wrong."""
    from packager.cli import show

    show.verify(console, bundle)


@cli.command(
    epilog="Example: packager doctor out/my-model-t4-gguf --facts box.json",
    short_help="Does this box fit?",
)
@click.argument("bundle", type=click.Path(path_type=Path), required=False)
@click.option("--target", help="Is this box one of that target? A name or a .toml file.")
@click.option("--facts", type=click.Path(path_type=Path), help="Another box's facts: its `bin/check --facts-only`.")
@click.option("--no-files", is_flag=True, help="Do not compare the digests of the bundle's files.")
@common
def doctor(bundle: Path | None, target: str | None, facts: Path | None, no_files: bool, console: Console) -> None:
    """Show this box's facts, which targets it is, and whether BUNDLE fits it.

    Exits as the box's own check: 4 when it does not fit, 5 when files are damaged."""
    from packager.cli import show

    show.doctor(console, bundle, target, facts, files=not no_files)


@cli.command(
    epilog="Example: packager bench out/my-model-desktop_linux_x86_64-gguf --baseline ./my-model",
    short_help="Measure latency and memory.",
)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--quick", is_flag=True, help="Shorter prompts and answers; still five repeats.")
@click.option(
    "--baseline",
    type=click.Path(path_type=Path),
    help="The source checkpoint: adds the FP32 row (transformers). Default: the one this bundle was "
    "built from, if kept.",
)
@click.option("--no-baseline", is_flag=True, help="Leave the FP32 row out.")
@click.option("--output", type=click.Path(path_type=Path), help="Write report.json here; default: beside the bundle.")
@common
def bench(
    bundle: Path, quick: bool, baseline: Path | None, no_baseline: bool, output: Path | None, console: Console
) -> None:
    """Benchmark a bundle on this machine: the table "mode, memory, P99" with the FP32 baseline, and the roofline."""
    from packager.cli import show

    show.bench(console, bundle, quick=quick, baseline=baseline, with_baseline=not no_baseline, output=output)


@cli.command(
    epilog="Example: packager serve out/my-model-desktop_linux_x86_64-gguf --port 8080",
    short_help="Serve a bundle here.",
)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=int, default=8080, show_default=True, help="Port; 0 takes a free one.")
@common
def serve(bundle: Path, host: str, port: int, console: Console) -> None:
    """Serve a bundle on this machine with the runtime it ships, without installing it. Ctrl-C ends it."""
    from packager.cli import show

    show.serve(console, bundle, host, port)


if __name__ == "__main__":
    main()
