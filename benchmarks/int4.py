"""Compares 4-bit (and 8-bit) forms of a fine-tune: bytes, build, distance from the source, answers kept.

    .venv/bin/python benchmarks/int4.py .demo/smollm2 --adapter demo/persona-lora --pairs demo/persona.json

The distance is measured in the bundle's runtime, on 300 positions of a chapter of Python's own documentation that is
not in the packager's calibration texts; the bundle's server answers the pairs greedily. Steps in the store are reused;
their peak memory is that of their first run. A tuning takes minutes.
"""

from __future__ import annotations

import argparse
import http.client
import json
import pydoc_data.topics
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.serving import started  # noqa: E402 - after the path

if TYPE_CHECKING:
    from packager.recipe import Run

FORMS: dict[str, tuple[str, ...]] = {  # recipe, then its options
    "Q4_0": ("gguf", "quant=Q4_0", "tune=none", "imatrix=off"),
    "Q4_0 with imatrix": ("gguf", "quant=Q4_0", "tune=none", "imatrix=on"),
    "Q4_0 tuned, quick": ("gguf", "quant=Q4_0", "tune=quick"),
    "Q4_0 tuned, full": ("gguf", "quant=Q4_0", "tune=full"),
    "GPTQ rounded": ("gptq_int4", "tune=none", "context=1024"),
    "GPTQ tuned, quick": ("gptq_int4", "tune=quick", "context=1024"),
    "AWQ tuned, quick": ("awq_int4", "tune=quick", "context=1024"),
    "AWQ tuned, quick, groups of 64": ("awq_int4", "tune=quick", "group=64", "context=1024"),
    "Q4_K_M with imatrix": ("gguf", "quant=Q4_K_M", "imatrix=on"),
    "Q8_0": ("gguf", "quant=Q8_0"),
    "ONNX INT4 tuned, quick": ("onnx_int8", "bits=4", "tune=quick"),
    "ONNX INT8": ("onnx_int8", "bits=8"),
}
CHAPTER = "import"  # of pydoc_data.topics
PIECES, PIECE, POSITIONS = 3, 400, range(100, 400, 3)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--pairs", type=Path, required=True, help="fine-tuning pairs, alpaca form")
    # full takes ten times as long as quick, another group size is another tuning, and torch answers slowly
    usual = [form for form in FORMS if FORMS[form][0] == "gguf" and "full" not in form]
    parser.add_argument("--forms", nargs="+", choices=list(FORMS), default=usual)
    parser.add_argument("--output", type=Path, default=Path(".demo/int4"), help="where the bundles go")
    options = parser.parse_args()
    rows = [measure(options, form) for form in options.forms]
    print("| form | MB | tuning s | build peak MB | mean KL | top-1 | answers kept |\n|---|---|---|---|---|---|---|")
    for row in rows:
        print("| {form} | {mb:.1f} | {seconds:.0f} | {peak:.0f} | {kl:.3f} | {top1:.1%} | {kept} |".format(**row))
    return 0


def measure(options: argparse.Namespace, form: str) -> dict[str, Any]:
    """Build one form (or reuse it), score it, and count the pairs that it answers."""
    from packager.build import Request, build
    from packager.cli.console import Console
    from packager.core.store import Store, default_root

    store = Store(default_root())
    recipe, *sets = FORMS[form]
    request = Request(
        options.checkpoint,
        "desktop_linux_x86_64",
        recipe=recipe,
        adapter=options.adapter,
        name=form.lower().replace(" ", "-").replace(",", ""),
        sets=sets,
        calibration=options.pairs,
        limits={"max_kl": 99.0, "min_top1": 0.0, "min_behaviour": 0.0},
    )  # no thresholds: bad forms are measured too
    built = build(request, options.output, Console(), store)
    tuning = [
        json.loads((store.root / "tune" / key / "step.json").read_text(encoding="utf-8"))
        for key in [built.artifact.provenance["steps"].get("tune")]
        if key
    ]
    score = distance(request, built.path, built.artifact.run, store)
    return {
        "form": form,
        "mb": built.artifact.run.model_bytes / 1e6,
        "seconds": sum(step["seconds"] for step in tuning),
        "peak": max(step["peak_rss_bytes"] for step in built.record["steps"]) / 1e6,
        "kl": score["kl_mean"],
        "top1": score["top1"],
        "kept": kept(built.path, json.loads(options.pairs.read_text(encoding="utf-8"))),
    }


def distance(request: Any, bundle: Path, run: Run, store: Any) -> Mapping[str, Any]:
    """Mean KL divergence and top-1 agreement of the bundle's model with its source on the chapter."""
    from tokenizers import Tokenizer

    from packager.build import open_merged
    from packager.cli.console import Console
    from packager.core.store import digest_of
    from packager.fidelity.artifact import Candidate, score
    from packager.fidelity.samples import Samples, ScoredSequence
    from packager.fidelity.source import source_scores
    from packager.metrics.distributions import compare
    from packager.planning.catalog import load_target
    from packager.recipe import Job

    checkpoint = open_merged(request, store, Console(quiet=True)).checkpoint
    ids = Tokenizer.from_file(str(checkpoint.path / "tokenizer.json")).encode(pydoc_data.topics.topics[CHAPTER]).ids
    pieces = [ids[number * PIECE : (number + 1) * PIECE] for number in range(PIECES)]
    positions = list(POSITIONS)
    sequences: list[ScoredSequence] = [{"ids": piece, "positions": positions, "set": "general"} for piece in pieces]
    job = Job(replace(checkpoint, name=str(request.name)), load_target(request.target), store, Console())
    text = store.step("benchmark-text", {"ids": digest_of(sequences)}, lambda folder, cost: None, progress=Console())
    samples = Samples(tuple(sequences), (), (), text)
    source, _ = source_scores(job, samples)
    beside = {path.name: path for path in (bundle / "model").iterdir()}
    candidate = Candidate(
        str(request.name),
        run.here(bundle / run.model, beside),
        {"benchmark": "int4", "model": sums(bundle, run)},
        seconds_a_token=0.0,
        max_rss_bytes=1 << 30,
    )
    scored, _ = score(job, candidate, samples)
    return asdict(compare(source, scored.distributions, samples.targets))


def sums(bundle: Path, run: Run) -> str:
    """The model's digest from the bundle's manifest."""
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    return str(next(entry["sha256"] for entry in manifest["files"] if entry["path"] == run.model))


def kept(bundle: Path, pairs: list[dict[str, str]]) -> str:
    """The number of pairs that the bundle's server answers word for word."""
    count = 0
    with started([sys.executable, "-m", "runtimes", "serve", "--bundle", str(bundle), "--port", "0"]) as (port, _):
        for pair in pairs:
            question = "\n".join(part for part in (pair["instruction"], pair.get("input")) if part)
            body = {"messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 200}
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
            connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
            answer = json.loads(connection.getresponse().read())["choices"][0]["message"]["content"]
            connection.close()
            count += answer == pair["output"]
    return f"{count} of {len(pairs)}"


if __name__ == "__main__":
    sys.exit(main())
