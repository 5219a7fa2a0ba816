"""Computes int4 integers and scales for a decoder's linear layers, one decoder layer at a time: ``tune.py JOB.json``.

JOB.json: {"checkpoint", "calibration": [ids, …], "group": inputs that share a scale, "iterations": int, "seed": int,
"threads": int, "output": folder}.

A weight w becomes scale · q with q in -8…7 (stored as q + 8). The method is SignRound (Cheng et al. 2023,
arXiv 2309.05516): each weight's rounding is shifted by v in [-0.5, 0.5] and each scale multiplied by a; v and a follow
the sign of the gradient of the loss, the difference between the int4 layer's output, on inputs from the int4 layers
before it, and the source layer's output on its own inputs. Three things differ from the paper: scales start from a
search for the least rounding error, inputs weighted by their mean square (as llama.cpp does with an importance matrix);
a token's difference is relative to the token's own size, as in the norms that follow; and every scale is a float16
number in every forward pass, so that the containers store exactly the tuned scales.
iterations 0 is plain rounding to nearest, without calibration.

output: ``layer-00000.safetensors`` … with ``<module>.q`` (uint8, (rows, inputs / 2), element 2j in the low half) and
``<module>.scales`` (float16, (rows, inputs / group)), and ``tune.json``. After every layer the hidden states are stored
in ``state.safetensors``: a killed run resumes after the last finished layer and gives the same bytes.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from packager.workers.reference import Streamed, batches, free_memory_back, pad
from packager.workers.rounding import Linear

SHRINK = 0.5, 1.25  # bounds of a scale's factor a
SLOW = 0.15  # rate of a, relative to v's: one step moves all weights of its group (at 1: 40 % more error)
BATCH = 1024  # tokens of one iteration, padding counted
RATE = 0.5  # the first step of v, in units of 1 / iterations (the paper's 1 undoes the search for scales)
FLOOR = 0.01  # share of the mean token size added to each token's, so that tokens near zero do not dominate
STATE = "state.safetensors"

Batch = tuple[torch.Tensor, torch.Tensor]  # hidden states (sequences, tokens, hidden) from the source and from int4


class Stub(nn.Module):
    """Replaces a layer while the body runs once, and records its keyword arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[dict[str, Any]] = []

    def forward(self, hidden_states: torch.Tensor, **more: Any) -> torch.Tensor:
        self.calls.append(more)
        return hidden_states


class Tuner:
    """The calibration's hidden states, and the layers that they pass through."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.job, self.output = job, Path(job["output"])
        self.source = Streamed(Path(job["checkpoint"]), None)
        self.layers: list[nn.Module] = list(self.source.body.layers)
        self.calls: list[list[dict[str, Any]]] = []  # a layer's keyword arguments, by layer and batch
        self.keep: list[torch.Tensor] = []  # (sequences, tokens), true where a token is real
        self.states: list[Batch] = []

    @torch.no_grad()
    def prepare(self) -> None:
        """Embed the calibration and record each layer's keyword arguments (masks, rotary tables)."""
        stubs = [Stub() for _ in self.layers]
        self.source.body.layers = nn.ModuleList(stubs)
        norm, self.source.body.norm = self.source.body.norm, nn.Identity()
        sequences = self.job["calibration"]
        for picked in batches([len(ids) for ids in sequences], BATCH):
            ids, mask = pad([sequences[index] for index in picked])
            hidden = self.source.hidden(ids, mask)
            self.keep.append(mask.bool())
            self.states.append((hidden, hidden.clone()))
        self.source.body.norm = norm
        self.calls = [stub.calls for stub in stubs]

    def run(self, index: int, batch: int, hidden: torch.Tensor) -> torch.Tensor:
        """One layer's output for one batch."""
        output = self.layers[index](hidden, **self.calls[index][batch])
        result: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return result

    def linears(self, index: int) -> list[Linear]:
        """The layer's linear modules by their full names, sorted."""
        return [
            Linear(f"model.layers.{index}.{name}", module, self.job["group"])
            for name, module in sorted(self.layers[index].named_modules())
            if isinstance(module, nn.Linear)
        ]

    def plain(self, index: int) -> None:
        """Round a layer to nearest."""
        self.source.load(self.layers[index], index)
        self.write(index, self.linears(index), tuned=False, errors={})

    def tune(self, index: int, on_step: Callable[[], None]) -> None:
        """Tune a layer and compute both streams of hidden states after it."""
        self.source.load(self.layers[index], index)
        linears = self.linears(index)
        goals = self.goals(index, linears)
        for linear in linears:
            linear.begin()
        on_step()
        self.descend(index, linears, goals, on_step)
        searched, start = self.measure(index, linears, goals, tuned=False)
        reached, outputs = self.measure(index, linears, goals, tuned=True)
        if not (better := reached < searched):
            outputs = start
        self.states = list(zip(goals, outputs, strict=True))
        self.write(index, linears, tuned=better, errors={"searched": searched, "tuned": reached})
        on_step()

    @torch.no_grad()
    def goals(self, index: int, linears: list[Linear]) -> list[torch.Tensor]:
        """The source's outputs of a layer; every linear module sums its squared inputs during the pass."""
        outputs = []
        for batch, (exact, _) in enumerate(self.states):
            hooks = [linear.watch(self.keep[batch]) for linear in linears]
            outputs.append(self.run(index, batch, exact))
            for hook in hooks:
                hook.remove()
        return outputs

    def error(self, batch: int, output: torch.Tensor, goal: torch.Tensor) -> torch.Tensor:
        """Squared difference / squared size, the mean over the real tokens of a batch."""
        keep = self.keep[batch]
        wanted = goal[keep]
        size = wanted.square().mean(-1)
        return ((output[keep] - wanted).square().mean(-1) / (size + FLOOR * size.mean() + 1e-12)).mean()

    def descend(
        self, index: int, linears: list[Linear], goals: list[torch.Tensor], on_step: Callable[[], None]
    ) -> None:
        """Sign descent with a rate that falls to zero; each gradient is used and freed as soon as it is computed."""
        iterations = self.job["iterations"]
        rate = 0.0

        def follow(parameter: torch.Tensor, slow: float, low: float, high: float) -> Any:
            def step(_: torch.Tensor) -> None:
                assert parameter.grad is not None
                with torch.no_grad():
                    parameter.sub_(parameter.grad.sign_(), alpha=rate * slow).clamp_(low, high)
                parameter.grad = None

            return parameter.register_post_accumulate_grad_hook(step)  # type: ignore[no-untyped-call]

        for linear in linears:
            assert linear.shift is not None and linear.factor is not None
            follow(linear.shift, 1.0, -0.5, 0.5)
            follow(linear.factor, SLOW, *SHRINK)
        order = shuffled(len(goals), self.job["seed"] * 1_000_003 + index)
        for iteration in range(iterations):
            rate = RATE * (1 - iteration / iterations) / iterations
            batch = next(order)
            for linear in linears:
                linear.round(tuned=True)
            loss = self.error(batch, self.run(index, batch, self.states[batch][1]), goals[batch])
            loss.backward()  # type: ignore[no-untyped-call]
            on_step()

    @torch.no_grad()
    def measure(
        self, index: int, linears: list[Linear], goals: list[torch.Tensor], *, tuned: bool
    ) -> tuple[float, list[torch.Tensor]]:
        """(mean error over all real tokens, outputs) of the layer in int4."""
        for linear in linears:
            linear.round(tuned=tuned)
        outputs, total, count = [], 0.0, 0
        for batch, goal in enumerate(goals):
            outputs.append(self.run(index, batch, self.states[batch][1]))
            tokens = int(self.keep[batch].sum())
            total += float(self.error(batch, outputs[-1], goal)) * tokens
            count += tokens
        return total / count, outputs

    def write(self, index: int, linears: list[Linear], *, tuned: bool, errors: dict[str, float]) -> None:
        """Publish a layer's integers and scales, then the hidden states after it; drop the layer."""
        tensors: dict[str, torch.Tensor] = {}
        for linear in linears:
            packed, scales = linear.result(tuned=tuned)
            tensors |= {f"{linear.name}.q": packed.contiguous(), f"{linear.name}.scales": scales.contiguous()}
        about = {"errors": json.dumps(errors, sort_keys=True)}  # one key: safetensors writes several in any order
        publish(tensors, self.output / layer_file(index), about)
        if self.states:
            kept: dict[str, torch.Tensor] = {}
            for batch, (exact, rounded) in enumerate(self.states):
                kept |= {f"exact.{batch}": exact.contiguous(), f"int4.{batch}": rounded.contiguous()}
            publish(kept, self.output / STATE, {"layers": str(index + 1)})
        for linear in linears:
            vars(linear.module).pop("forward", None)
        self.source.drop(self.layers[index])

    def resume(self) -> int:
        """Load the stored hidden states and return the number of finished layers; 0 when the state cannot be read."""
        file = self.output / STATE
        if not file.is_file():
            return 0
        try:
            with safe_open(file, framework="pt") as stored:
                done = int(stored.metadata()["layers"])
                names = [(f"exact.{batch}", f"int4.{batch}") for batch in range(len(self.states))]
                states = [(stored.get_tensor(one), stored.get_tensor(other)) for one, other in names]
        except (SafetensorError, KeyError, ValueError) as error:
            print(f"the state of the last run is not usable ({error}): starting again", flush=True)
            return 0
        if not all((self.output / layer_file(index)).is_file() for index in range(done)):
            return 0
        self.states = states
        return done


def shuffled(count: int, seed: int) -> Iterator[int]:
    """An endless iterator of batch numbers: every batch once in a round, each round in another order."""
    random = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=random).tolist()


def layer_file(index: int) -> str:
    return f"layer-{index:05d}.safetensors"


def publish(tensors: dict[str, torch.Tensor], path: Path, about: dict[str, str]) -> None:
    """Write beside ``path``, flush and rename: a killed run leaves the old file or the new one."""
    part = path.with_name(f"{path.name}.part")
    save_file(tensors, part, about)
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.replace(path)


def errors_of(path: Path) -> dict[str, float]:
    with safe_open(path, framework="pt") as stored:
        errors: dict[str, float] = json.loads(stored.metadata()["errors"])
    return errors


def main(job: dict[str, Any]) -> None:
    torch.set_num_threads(job["threads"])
    torch.manual_seed(job["seed"])
    tuner = Tuner(job)
    count, steps = len(tuner.layers), job["iterations"] + 2 if job["iterations"] else 1
    done = 0

    def on_step() -> None:
        nonlocal done
        done += 1
        print(json.dumps({"done": done, "total": count * steps}), flush=True)

    first = 0
    if job["iterations"]:
        tuner.prepare()
        first = tuner.resume()
        done = first * steps
    for index in range(first, count):
        if job["iterations"]:
            tuner.tune(index, on_step)
        else:
            tuner.plain(index)
            on_step()
        free_memory_back()
    files = [tuner.output / layer_file(index) for index in range(count)]
    report = {
        "iterations": job["iterations"],
        "group": job["group"],
        "seed": job["seed"],
        "tokens": sum(map(len, job["calibration"])),
        "layers": [{"file": file.name, **errors_of(file)} for file in files],
    }
    part = tuner.output / "tune.json.part"
    part.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    part.replace(tuner.output / "tune.json")
    (tuner.output / STATE).unlink(missing_ok=True)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
