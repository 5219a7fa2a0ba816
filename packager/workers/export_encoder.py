"""An encoder's graph as ONNX without its weights: ``export_encoder.py JOB.json``.

JOB.json: {"checkpoint", "classify": bool, "token_types": bool, "opset": int, "output"}. Writes the graph; every
parameter is one of its inputs, by its name in transformers' state dict. Each parameter is one zero, expanded to its
full shape, so that neither the model nor the exporter holds the weights.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import optimizer
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
PREFIX = "model."


class Encoder(torch.nn.Module):
    """Returns token states [batch, length, hidden] of an embedder, or logits [batch, labels] of a classifier."""

    def __init__(self, model: torch.nn.Module, *, classify: bool) -> None:
        super().__init__()
        self.model, self.classify = model, classify

    def forward(self, *values: torch.Tensor) -> torch.Tensor:
        output = self.model(**dict(zip(INPUTS, values, strict=False)))
        result: torch.Tensor = output.logits if self.classify else output.last_hidden_state
        return result


def hollow(checkpoint: str, *, classify: bool) -> torch.nn.Module:
    """The model with real buffers, and one zero expanded to the shape of each parameter."""
    config = AutoConfig.from_pretrained(checkpoint, local_files_only=True)
    register = torch.nn.Module.register_parameter

    def on_meta(module: torch.nn.Module, name: str, value: torch.nn.Parameter | None) -> None:
        register(module, name, value)
        if value is not None:
            module._parameters[name] = torch.nn.Parameter(value.to("meta"), requires_grad=False)

    kind = AutoModelForSequenceClassification if classify else AutoModel
    # BERT's pooler is a layer for classifiers; an embedder's token states do not depend on it
    more = {} if classify or "pooling" not in _arguments(kind, config) else {"add_pooling_layer": False}
    torch.nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        model: torch.nn.Module = kind.from_config(config, attn_implementation="eager", dtype=torch.float32, **more)
    finally:
        torch.nn.Module.register_parameter = register  # type: ignore[method-assign]
    for module in model.modules():
        for name, value in list(module._parameters.items()):
            if value is not None:
                whole = torch.zeros((), dtype=torch.float32).expand(value.shape)
                module._parameters[name] = torch.nn.Parameter(whole, requires_grad=False)
    return model.eval()


def _arguments(kind: Any, config: Any) -> str:
    """ "pooling" when the model's class can be made without its pooler, else ""."""
    import inspect

    model_class = kind._model_mapping[type(config)]
    return "pooling" if "add_pooling_layer" in inspect.signature(model_class.__init__).parameters else ""


def main(job: dict[str, Any]) -> None:
    warnings.filterwarnings("ignore")
    model = Encoder(hollow(job["checkpoint"], classify=job["classify"]), classify=job["classify"]).eval()
    names = INPUTS if job["token_types"] else INPUTS[:2]
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    example = tuple(torch.ones((2, 7), dtype=torch.int64) for _ in names)
    program = torch.onnx.export(
        model,
        example,
        dynamo=True,
        opset_version=job["opset"],
        input_names=names,
        output_names=["logits" if job["classify"] else "last_hidden_state"],
        dynamic_shapes=(tuple({0: batch, 1: length} for _ in names),),
        optimize=False,  # it merges equal constants, and all parameters are equal here
        verbose=False,
    )
    assert program is not None
    graph = program.model.graph
    parameters = {f"{PREFIX}{name}" for name, _ in model.model.named_parameters(remove_duplicate=False)}
    for name in [name for name in graph.initializers if name in parameters]:
        value = graph.initializers.pop(name)
        value.const_value = None
        value.name = name.removeprefix(PREFIX)
        graph.inputs.append(value)
    optimizer.optimize_ir(program.model)  # parameters are inputs now, so they are not folded
    ir.save(program.model, job["output"])


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
