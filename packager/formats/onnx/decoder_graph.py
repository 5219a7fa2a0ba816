"""A decoder as an ONNX graph for onnxruntime, written from a checkpoint's config and headers.

onnxruntime-genai's builder loads the whole model in float32 and leaves the embedding in it. This module writes a graph
without weights in memory; its Weights refer to the checkpoint's own files (to prove the graph) or to packed integers
(to ship). Operators are onnxruntime's contrib ones (docs/ContribOperators.md there).

Inputs: input_ids (batch, tokens); seqlens_k (batch,), each row's total tokens less one; total_length (), the longest
row's total tokens; kept (1,), the number of last tokens that get logits; the caches (batch, heads, capacity,
dimensions), which GroupQueryAttention writes in place when past and present are one buffer. Outputs: logits (batch,
kept, vocabulary).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from packager.formats.onnx import rope
from packager.formats.onnx.graph import Graph, Weights, value_info

if TYPE_CHECKING:
    import onnx

    from packager.checkpoint.checkpoint import Checkpoint

MICROSOFT = "com.microsoft"
OPSET, IR_VERSION = 21, 10
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "phi3", "gemma", "gemma2", "gemma3_text")
GEMMAS = ("gemma", "gemma2", "gemma3_text")
PAST, PRESENT = "past_key_values.{}.{}", "present.{}.{}"


@dataclass(frozen=True)
class Layer:
    """The properties that differ between layers. window: sliding window in tokens, 0 for none. rotated: with RoPE."""

    kind: str
    window: int
    rotated: bool


def why_not(checkpoint: Checkpoint) -> str | None:
    """None, or why this model has no graph, as the beginning of a sentence."""
    if checkpoint.family.model_type not in FAMILIES:
        return f"no ONNX graph is known for {checkpoint.architecture}"
    if checkpoint.shape.head_dim % 16:
        return f"onnxruntime's attention needs heads of 16, 32, … dimensions, not {checkpoint.shape.head_dim}"
    turned = rope.dims(checkpoint.config, checkpoint.shape.head_dim)
    if turned % 16:
        return f"onnxruntime's attention rotates 16, 32, … dimensions of a head, not {turned}"
    return rope.why_not(checkpoint.config)


def layers(checkpoint: Checkpoint, context: int) -> list[Layer]:
    """Each layer's kind of attention. A window as long as the context is left out."""
    config, count = checkpoint.config, checkpoint.shape.layers
    family = checkpoint.family.model_type
    window = int(config.get("sliding_window") or 0)
    kinds = config.get("layer_types")
    if not kinds:
        kinds = [_kind(config, family, index, bool(window)) for index in range(count)]
    rotated = config.get("no_rope_layers") or [1] * count  # SmolLM3: 1 where positions are rotated
    return [
        Layer(kind, window if kind == "sliding_attention" and window < context else 0, bool(turned))
        for kind, turned in zip(kinds, rotated, strict=True)
    ]


def _kind(config: Mapping[str, Any], family: str, index: int, windowed: bool) -> str:
    """A layer's kind for a config without layer_types: the family's default in transformers."""
    every = {"gemma2": 2, "gemma3_text": int(config.get("sliding_window_pattern") or 6)}.get(family)
    if every:
        sliding = (index + 1) % every != 0
    elif family in ("qwen2", "qwen3", "smollm3"):
        sliding = bool(config.get("use_sliding_window")) and index >= int(config.get("max_window_layers") or 0)
    else:
        sliding = family in ("mistral", "phi3")
    return "sliding_attention" if sliding and windowed else "full_attention"


class Decoder:
    """Writes the graph of one checkpoint. context: length of the position tables, tokens."""

    def __init__(self, checkpoint: Checkpoint, weights: Weights, context: int) -> None:
        self.checkpoint, self.weights, self.context = checkpoint, weights, context
        self.config, self.shape = checkpoint.config, checkpoint.shape
        self.family = checkpoint.family.model_type
        self.graph = Graph()

    def model(self) -> onnx.ModelProto:
        """The finished model; its bytes depend only on the checkpoint and the weights' places."""
        from onnx import TensorProto, helper

        graph, shape = self.graph, self.shape
        inputs = [
            value_info("input_ids", TensorProto.INT64, ["batch", "tokens"]),
            value_info("seqlens_k", TensorProto.INT32, ["batch"]),
            value_info("total_length", TensorProto.INT32, []),
            value_info("kept", TensorProto.INT64, [1]),
        ]
        outputs = [value_info("logits", TensorProto.FLOAT, ["batch", "logits_kept", shape.vocab])]
        cache = [shape.kv_heads, shape.head_dim]
        for index in range(shape.layers):
            for part in ("key", "value"):
                past, present = PAST.format(index, part), PRESENT.format(index, part)
                inputs.append(value_info(past, TensorProto.FLOAT, ["batch", cache[0], "capacity", cache[1]]))
                outputs.append(value_info(present, TensorProto.FLOAT, ["batch", cache[0], "capacity", cache[1]]))
        self._body()
        made = helper.make_graph(graph.nodes, "decoder", inputs, outputs, list(graph.initializers.values()))
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)]
        return helper.make_model(made, opset_imports=opsets, ir_version=IR_VERSION, producer_name="packager")

    def _body(self) -> None:
        graph = self.graph
        x = self._embedded()
        if self.family in GEMMAS:
            x = graph.add("Mul", [x, self._scalar("embedding.scale", math.sqrt(self.shape.hidden))])
        four = len(self.checkpoint.family.norms) == 4
        normed = self._norm(x, "model.layers.0.input_layernorm")
        for index, layer in enumerate(layers(self.checkpoint, self.context)):
            name = f"model.layers.{index}"
            branch = self._attention(f"{name}.self_attn", index, layer, normed)
            if four:
                branch = self._norm(branch, f"{name}.post_attention_layernorm")
            before = "pre_feedforward_layernorm" if four else "post_attention_layernorm"
            normed, x = self._add_norm(x, branch, f"{name}.{before}")
            branch = self._mlp(f"{name}.mlp", normed)
            if four:
                branch = self._norm(branch, f"{name}.post_feedforward_layernorm")
            last = index + 1 == self.shape.layers
            following = "model.norm" if last else f"model.layers.{index + 1}.input_layernorm"
            normed, x = self._add_norm(x, branch, following)
        logits = self._logits(normed)
        cap = self.config.get("final_logit_softcapping") if self.family in GEMMAS else None
        if cap:
            size = self._scalar("logits.cap", float(cap))
            logits = graph.add("Mul", [graph.add("Tanh", [graph.add("Div", [logits, size])]), size])
        graph.add("Identity", [logits], outputs=["logits"])

    def _embedded(self) -> str:
        """The rows of the embedding."""
        return self.weights.embedding(self.graph, "input_ids")

    def _logits(self, x: str) -> str:
        """The logits of the last ``kept`` tokens."""
        graph = self.graph
        begin = graph.add("Neg", ["kept"])
        last = graph.add("Slice", [x, begin, self._integers("end", [2**62]), self._integers("tokens.axis", [1])])
        return self.weights.head(graph, last)

    def _attention(self, name: str, index: int, layer: Layer, x: str) -> str:
        parts = ["qkv_proj"] if self.checkpoint.family.fused else ["q_proj", "k_proj", "v_proj"]
        qkv = self._linear(x, [f"{name}.{part}" for part in parts])
        query, key, value = qkv, "", ""
        if self.checkpoint.family.qk_norm:
            query, key, value = self._apart(name, qkv)
        return self._linear(self._mixed(name, index, layer, query, key, value), [f"{name}.o_proj"])

    def _apart(self, name: str, qkv: str) -> tuple[str, str, str]:
        """Queries, keys and values, each (batch, tokens, heads x dimensions), normed where the family does."""
        shape = self.shape
        sizes = [shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim, shape.kv_heads * shape.head_dim]
        names = [f"{name}.{part}" for part in ("query", "key", "value")]
        self.graph.add("Split", [qkv, self._integers("qkv.sizes", sizes)], outputs=names, axis=-1)
        query, key, value = names
        if self.checkpoint.family.qk_norm:
            query = self._head_norm(query, f"{name}.q_norm")
            key = self._head_norm(key, f"{name}.k_norm")
        return query, key, value

    @property
    def _scale(self) -> float:
        """The scale of the attention scores."""
        scored = self.config.get("query_pre_attn_scalar") if self.family in ("gemma2", "gemma3_text") else None
        return 1.0 / math.sqrt(float(scored or self.shape.head_dim))

    def _mixed(self, name: str, index: int, layer: Layer, query: str, key: str, value: str) -> str:
        """The output of attention, (batch, tokens, heads x dimensions). key "": query holds all three."""
        graph, shape = self.graph, self.shape
        rotation = ["", ""]
        if layer.rotated:
            rotation = self._rotation(layer.kind)
        past = [PAST.format(index, part) for part in ("key", "value")]
        present = [PRESENT.format(index, part) for part in ("key", "value")]
        attributes: dict[str, Any] = {
            "num_heads": shape.heads,
            "kv_num_heads": shape.kv_heads,
            "scale": self._scale,
            "do_rotary": int(layer.rotated),
            "rotary_interleaved": 0,
        }
        if layer.window:
            attributes["local_window_size"] = layer.window
        cap = self.config.get("attn_logit_softcapping") if self.family == "gemma2" else None
        if cap:
            attributes["softcap"] = float(cap)
        return graph.add(
            "GroupQueryAttention",
            [query, key, value, *past, "seqlens_k", "total_length", *rotation],
            outputs=[f"{name}.mixed", *present],
            domain=MICROSOFT,
            **attributes,
        )

    def _rotation(self, kind: str) -> list[str]:
        names = [f"rope.{kind}.{part}" for part in ("cos", "sin")]
        if names[0] not in self.graph.initializers:
            for name, table in zip(
                names, rope.tables(self.config, kind, self.shape.head_dim, self.context), strict=True
            ):
                self.graph.constant(name, table)
        return names

    def _head_norm(self, x: str, name: str) -> str:
        """An RMS norm over each head, (batch, tokens, heads x dimensions)."""
        size = self.shape.head_dim
        apart = self.graph.add("Reshape", [x, self._integers("heads.apart", [0, 0, -1, size])])
        normed = self._norm(apart, name)
        return self.graph.add("Reshape", [normed, self._integers("heads.joined", [0, 0, -1])])

    def _mlp(self, name: str, x: str) -> str:
        graph = self.graph
        if self.checkpoint.family.fused:
            both = self._linear(x, [f"{name}.gate_up_proj"])
            gate, up = f"{name}.gate", f"{name}.up"
            halves = self._integers("mlp.sizes", [self.shape.intermediate] * 2)
            graph.add("Split", [both, halves], outputs=[gate, up], axis=-1)
        else:
            gate, up = (self._linear(x, [f"{name}.{part}"]) for part in ("gate_proj", "up_proj"))
        return self._linear(graph.add("Mul", [self._active(gate), up]), [f"{name}.down_proj"])

    def _active(self, gate: str) -> str:
        if self.family in GEMMAS:
            return self.graph.add("FastGelu", [gate], domain=MICROSOFT)  # the tanh form
        return self.graph.add("QuickGelu", [gate], domain=MICROSOFT, alpha=1.0)  # x · sigmoid(x): SiLU

    def _linear(self, x: str, modules: Sequence[str]) -> str:
        """The product with the weights, plus the biases that the checkpoint has."""
        import numpy as np

        product = self._product(x, modules)
        names = [f"{module}.bias" for module in modules]
        present = [name for name in names if name in self.checkpoint.tensors]
        if not present:
            return product
        rows = {name: self.checkpoint.tensors[name.removesuffix("bias") + "weight"].shape[0] for name in names}
        parts = [self.weights.vector(name) if name in present else np.zeros(rows[name], np.float32) for name in names]
        return self.graph.add("Add", [product, self.graph.constant(present[0], np.concatenate(parts))])

    def _product(self, x: str, modules: Sequence[str]) -> str:
        return self.weights.linear(self.graph, x, modules)

    def _norm_weight(self, name: str) -> str:
        value = self.weights.vector(f"{name}.weight")
        return self.graph.constant(f"{name}.weight", value + 1 if self.family in GEMMAS else value)  # Gemma: 1 + w

    @property
    def _epsilon(self) -> float:
        return float(self.config.get("rms_norm_eps", 1e-6))

    def _norm(self, x: str, name: str) -> str:
        return self.graph.add(
            "SimplifiedLayerNormalization", [x, self._norm_weight(name)], axis=-1, epsilon=self._epsilon, stash_type=1
        )

    def _add_norm(self, x: str, branch: str, name: str) -> tuple[str, str]:
        """(the next norm of x + branch, the sum itself)."""
        normed, total = f"{name}.normed", f"{name}.sum"
        self.graph.add(
            "SkipSimplifiedLayerNormalization",
            [x, branch, self._norm_weight(name)],
            outputs=[normed, "", "", total],
            domain=MICROSOFT,
            epsilon=self._epsilon,
        )
        return normed, total

    def _integers(self, name: str, values: Sequence[int]) -> str:
        import numpy as np

        return self.graph.constant(name, np.array(values, np.int64))

    def _scalar(self, name: str, value: float) -> str:
        import numpy as np

        return self.graph.constant(name, np.array(value, np.float32))
