"""Compares forms of an encoder in 8 bits: python benchmarks/encoder.py CHECKPOINT [--repeats N].

Bytes, cosine to transformers' float32 on the package's texts, the largest difference that other texts of the batch
make to a text's vector, and latency of one text of 16 and 128 tokens and of eight of 128, on this machine.
quantize_dynamic is onnxruntime's own, for comparison: the packager does not ship it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from packager.checkpoint.checkpoint import open_checkpoint  # noqa: E402
from packager.checkpoint.encoder import EncoderFacts, read_encoder  # noqa: E402
from packager.cli.console import Console  # noqa: E402
from packager.core.processes import WORKERS  # noqa: E402
from packager.core.store import cache_root  # noqa: E402
from packager.formats.onnx.encoder import OPSET  # noqa: E402
from packager.formats.onnx.encoder_graph import fill  # noqa: E402
from packager.formats.onnx.external_data import DATA, MODEL  # noqa: E402
from packager.metrics.encoders import compare_vectors  # noqa: E402
from runtimes.engines.encoder import Text  # noqa: E402
from runtimes.engines.onnxruntime.encoder import OrtEncoder  # noqa: E402
from runtimes.manifest import parse_run  # noqa: E402

TEXTS = json.loads((ROOT / "packager/prompts/data/sentences.json").read_text(encoding="utf-8"))


def child(name: str, job: dict[str, Any], work: Path) -> None:
    """Run one of the packager's workers."""
    file = work / "job.json"
    file.write_text(json.dumps(job), encoding="utf-8")
    subprocess.run(
        [sys.executable, str(WORKERS / name), str(file)],
        check=True,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(WORKERS.parent.parent)},
    )


def dynamic(whole: Path, folder: Path, *, per_channel: bool) -> None:
    """onnxruntime's quantize_dynamic of the float32 file, with its own preprocessing."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    folder.mkdir()
    one, ready = folder / "one.onnx", folder / "ready.onnx"
    onnx.save(onnx.load(str(whole / MODEL)), str(one))  # its preprocessing does not read external weights
    quant_pre_process(str(one), str(ready), skip_symbolic_shape=True)
    one.unlink()
    quantize_dynamic(str(ready), str(folder / MODEL), weight_type=QuantType.QInt8, per_channel=per_channel)
    ready.unlink()


def latency(engine: OrtEncoder, texts: int, tokens: int, repeats: int) -> float:
    """Median milliseconds of one batch."""
    batch = [Text((1012,) * tokens, (0,) * tokens)] * texts
    seconds = []
    for number in range(repeats + 3):
        begun = time.perf_counter()
        engine.compute(batch)
        if number >= 3:
            seconds.append(time.perf_counter() - begun)
    return float(np.median(seconds)) * 1000


def row(
    name: str, folder: Path, tokenizer: Path, facts: EncoderFacts, source: Sequence[Sequence[float]], repeats: int
) -> str:
    run = parse_run(
        {
            "engine": "ort_encoder",
            "task": "embed",
            "model": str(folder / MODEL),
            "tokenizer": str(tokenizer),
            "context": facts.max_length,
            "settings": facts.settings(),
        }
    )
    engine = OrtEncoder(run, verbose=False)
    read = [engine.reader.read(text, truncate=True) for text in TEXTS]
    single = [engine.compute([text])[0] for text in read]
    together = [vector for start in range(0, len(read), 4) for vector in engine.compute(read[start : start + 4])]
    score = compare_vectors(source, [vector.tolist() for vector in single])
    neighbour = max(float(np.abs(one - other).max()) for one, other in zip(single, together, strict=True))
    size = sum((folder / file).stat().st_size for file in (MODEL, DATA) if (folder / file).is_file())
    times = [latency(engine, *shape, repeats) for shape in ((1, 16), (1, 128), (8, 128))]
    engine.close()
    cells = [
        name,
        f"{size / 1e6:.1f}",
        f"{score.cosine_mean:.4f}",
        f"{score.cosine_min:.4f}",
        f"{score.rank:.4f}",
        f"{neighbour:.1e}",
        *(f"{one:.1f}" for one in times),
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("--repeats", type=int, default=30)
    given = parser.parse_args()
    checkpoint = open_checkpoint(given.checkpoint, progress=Console(quiet=True), cache=cache_root())
    facts = read_encoder(checkpoint, longest=4096)
    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        common = {"checkpoint": str(checkpoint.path), "classify": False}
        child(
            "export_encoder.py",
            {**common, "token_types": facts.token_types, "opset": OPSET, "output": str(work / "graph.onnx")},
            work,
        )
        child(
            "encode.py",
            {
                **common,
                "texts": TEXTS,
                "max_length": facts.max_length,
                "pooling": facts.pooling,
                "normalize": facts.normalize,
                "lower_case": facts.lower_case,
                "prompt": facts.prompt,
                "threads": 2,
                "output": str(work / "source.json"),
            },
            work,
        )
        source = json.loads((work / "source.json").read_text(encoding="utf-8"))["outputs"]
        print("| form | MB | cosine mean | min | rank | neighbour | 1 × 16 ms | 1 × 128 ms | 8 × 128 ms |")
        print("|---|---|---|---|---|---|---|---|---|")
        for form in ("float32", "speed", "fidelity"):
            (work / form).mkdir()
            fill(work / "graph.onnx", checkpoint, work / form, form)
        dynamic(work / "float32", work / "dynamic", per_channel=True)
        dynamic(work / "float32", work / "dynamic_tensor", per_channel=False)
        names = {
            "float32": "float32",
            "speed": "favour=speed",
            "fidelity": "favour=fidelity",
            "dynamic": "quantize_dynamic, per channel",
            "dynamic_tensor": "quantize_dynamic, per tensor",
        }
        for folder, name in names.items():
            tokenizer = checkpoint.path / "tokenizer.json"
            print(row(name, work / folder, tokenizer, facts, source, given.repeats), flush=True)


if __name__ == "__main__":
    main()
