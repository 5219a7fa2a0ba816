"""A decoder as a strongly typed ONNX graph of standard operators, for TensorRT: products in float16, else float32.

The structure of each family is that of formats/onnx/decoder_graph.py; this module replaces onnxruntime's own operators.
The residual stream, norms, positions and the softmax are float32, so values that grow with depth do not exceed
float16's 65504; the inputs of products with weights, and the KV cache, are float16.

Inputs, for ``rows`` conversations with ``tokens`` new tokens each: input_ids (rows, tokens) int64; start (rows,) int64,
tokens in each row's cache; places (span,) int64: 0, 1, … the places of the caches that attention reads, at least as
many as the longest row's tokens; wanted (kept,) int64, the indices of the tokens that get logits; the caches (rows,
heads, capacity, dimensions) float16. Outputs: logits (rows, kept, vocabulary) float32, and the caches with the new
tokens written at start (TensorScatter of opset 24, which TensorRT reads as KVCacheUpdate, in place). ``span`` is an
input's length so that no shape depends on a tensor's values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from packager.formats.onnx import rope
from packager.formats.onnx.decoder_graph import GEMMAS, PAST, PRESENT, Decoder, Layer
from packager.formats.onnx.decoder_graph import why_not as why_no_graph
from packager.formats.onnx.graph import value_info

if TYPE_CHECKING:
    import onnx

    from packager.checkpoint.checkpoint import Checkpoint

OPSET, IR_VERSION = 24, 11
MASKED = -1.0e9  # added to scores in float32, before a softmax in float32


def why_not(checkpoint: Checkpoint) -> str | None:
    """None, or why this model has no typed graph, as the beginning of a sentence."""
    return why_no_graph(checkpoint)


class TypedDecoder(Decoder):
    """Writes the graph of one checkpoint. context: places of a row's cache, and length of the position tables."""

    def model(self) -> onnx.ModelProto:
        """The finished model; its bytes depend only on the checkpoint and the weights' places."""
        from onnx import TensorProto, helper

        graph, shape = self.graph, self.shape
        inputs = [
            value_info("input_ids", TensorProto.INT64, ["rows", "tokens"]),
            value_info("start", TensorProto.INT64, ["rows"]),
            value_info("places", TensorProto.INT64, ["span"]),
            value_info("wanted", TensorProto.INT64, ["kept"]),
        ]
        outputs = [value_info("logits", TensorProto.FLOAT, ["rows", "kept", shape.vocab])]
        cache: list[str | int] = ["rows", shape.kv_heads, self.context, shape.head_dim]
        for index in range(shape.layers):
            for part in ("key", "value"):
                inputs.append(value_info(PAST.format(index, part), TensorProto.FLOAT16, cache))
                outputs.append(value_info(PRESENT.format(index, part), TensorProto.FLOAT16, cache))
        self._body()
        made = helper.make_graph(graph.nodes, "decoder", inputs, outputs, list(graph.initializers.values()))
        return helper.make_model(
            made, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="packager"
        )

    # -- parts of the structure ------------------------------------------------------------------------------

    def _embedded(self) -> str:
        graph = self.graph
        begin = graph.add("Unsqueeze", ["start", self._integers("axis.1", [1])])
        ones = graph.add("Shape", ["input_ids"], start=1, end=2)
        count = graph.add("Squeeze", [ones, self._integers("axis.0", [0])])
        steps = graph.add("Range", [self._integer("zero", 0), count, self._integer("one", 1)])
        self.positions = graph.add("Add", [begin, steps])  # (rows, tokens)
        self.masks: dict[int, str] = {}
        self.turns: dict[str, tuple[str, str]] = {}
        return self._wide(self.weights.embedding(graph, "input_ids"))

    def _logits(self, x: str) -> str:
        kept = self.graph.add("Gather", [x, "wanted"], axis=1)
        return self._wide(self.weights.head(self.graph, self._narrow(kept)))

    def _product(self, x: str, modules: Sequence[str]) -> str:
        return self._wide(self.weights.linear(self.graph, self._narrow(x), modules))

    def _active(self, gate: str) -> str:
        graph = self.graph
        if self.family in GEMMAS:
            return graph.add("Gelu", [gate], approximate="tanh")
        return graph.add("Mul", [gate, graph.add("Sigmoid", [gate])])

    def _norm(self, x: str, name: str) -> str:
        graph = self.graph
        squares = graph.add("ReduceMean", [graph.add("Mul", [x, x]), self._integers("axis.-1", [-1])], keepdims=1)
        root = graph.add("Sqrt", [graph.add("Add", [squares, self._scalar("norm.epsilon", self._epsilon)])])
        return graph.add("Mul", [graph.add("Div", [x, root]), self._norm_weight(name)])

    def _add_norm(self, x: str, branch: str, name: str) -> tuple[str, str]:
        total = self.graph.add("Add", [x, branch])
        return self._norm(total, name), total

    def _mixed(self, name: str, index: int, layer: Layer, query: str, key: str, value: str) -> str:
        graph, shape = self.graph, self.shape
        if not key:
            query, key, value = self._apart(name, query)
        query, key, value = (self._heads(part) for part in (query, key, value))
        if layer.rotated:
            query, key = self._turned(query, layer.kind), self._turned(key, layer.kind)
        query = self._narrow(graph.add("Mul", [query, self._scalar("scale", self._scale)]))
        keys, values = (
            self._remembered(index, part, self._narrow(new)) for part, new in (("key", key), ("value", value))
        )
        # queries that share a key head are adjacent: (rows, key heads, group x tokens, dimensions)
        group, size = shape.heads // shape.kv_heads, shape.head_dim
        query = graph.add("Reshape", [query, self._integers("heads.grouped", [0, shape.kv_heads, -1, size])])
        scores = self._wide(graph.add("MatMul", [query, graph.add("Transpose", [keys], perm=[0, 1, 3, 2])]))
        cap = self.config.get("attn_logit_softcapping") if self.family == "gemma2" else None
        if cap:
            limit = self._scalar("scores.cap", float(cap))
            scores = graph.add("Mul", [graph.add("Tanh", [graph.add("Div", [scores, limit])]), limit])
        ends = [graph.add("Shape", [keys], start=part, end=part + 1) for part in (0, 2)]
        fixed = self._integers("group", [shape.kv_heads, group, -1])
        scores = graph.add("Reshape", [scores, graph.add("Concat", [ends[0], fixed, ends[1]], axis=0)])
        shares = graph.add("Softmax", [graph.add("Add", [scores, self._mask(layer.window)])], axis=-1)
        joined = self._integers("group.joined", [shape.kv_heads, -1])
        shares = graph.add("Reshape", [shares, graph.add("Concat", [ends[0], joined, ends[1]], axis=0)])
        mixed = graph.add("MatMul", [self._narrow(shares), values])
        mixed = graph.add("Reshape", [mixed, self._integers("mixed.apart", [0, shape.heads, -1, size])])
        mixed = graph.add("Transpose", [mixed], perm=[0, 2, 1, 3])
        return graph.add("Reshape", [mixed, self._integers("mixed.joined", [0, 0, shape.heads * size])])

    # -- attention -------------------------------------------------------------------------------------------

    def _heads(self, x: str) -> str:
        """(rows, tokens, heads x dimensions) as (rows, heads, tokens, dimensions)."""
        apart = self.graph.add("Reshape", [x, self._integers("tokens.apart", [0, 0, -1, self.shape.head_dim])])
        return self.graph.add("Transpose", [apart], perm=[0, 2, 1, 3])

    def _remembered(self, index: int, part: str, new: str) -> str:
        """Write the new tokens into the cache; returns the part of it that attention reads."""
        graph = self.graph
        present = PRESENT.format(index, part)
        graph.add("TensorScatter", [PAST.format(index, part), new, "start"], outputs=[present], axis=2, mode="linear")
        zero, two = self._integers("axis.0", [0]), self._integers("axis.2", [2])
        return graph.add("Slice", [present, zero, self._span(), two])

    def _span(self) -> str:
        if not hasattr(self, "_span_name"):
            self._span_name = self.graph.add("Shape", ["places"])
        return self._span_name

    def _mask(self, window: int) -> str:
        """(rows, 1, 1, tokens, span): 0 for the places that a token attends to, else MASKED. window: 0 for none."""
        if window not in self.masks:
            graph = self.graph
            positions = graph.add("Unsqueeze", [self.positions, self._integers("axes.124", [1, 2, 4])])
            hidden = graph.add("Greater", ["places", positions])
            if window:
                oldest = graph.add("Sub", [positions, self._integer("window", window - 1)])
                hidden = graph.add("Or", [hidden, graph.add("Less", ["places", oldest])])
            away, seen = self._scalar("masked", MASKED), self._scalar("seen", 0.0)
            self.masks[window] = graph.add("Where", [hidden, away, seen])
        return self.masks[window]

    def _turned(self, x: str, kind: str) -> str:
        """x (rows, heads, tokens, dimensions) with RoPE on its first dimensions, in the split-half layout."""
        graph = self.graph
        width, size = rope.dims(self.config, self.shape.head_dim), self.shape.head_dim
        cos, sin = self._turns(kind)
        parts = [f"{x}.low", f"{x}.high"] + ([f"{x}.still"] if width < size else [])
        sizes = [width // 2, width // 2] + ([size - width] if width < size else [])
        graph.add("Split", [x, self._integers("rotated", sizes)], outputs=parts, axis=-1)
        low, high = parts[:2]
        left = graph.add("Sub", [graph.add("Mul", [low, cos]), graph.add("Mul", [high, sin])])
        right = graph.add("Add", [graph.add("Mul", [high, cos]), graph.add("Mul", [low, sin])])
        return graph.add("Concat", [left, right, *parts[2:]], axis=-1)

    def _turns(self, kind: str) -> tuple[str, str]:
        """Cosines and sines of the tokens' positions, (rows, 1, tokens, rotated dimensions / 2)."""
        if kind not in self.turns:
            axis = self._integers("axis.1", [1])
            cos, sin = (
                self.graph.add("Unsqueeze", [self.graph.add("Gather", [table, self.positions]), axis])
                for table in self._rotation(kind)
            )
            self.turns[kind] = (cos, sin)
        return self.turns[kind]

    # -- types -----------------------------------------------------------------------------------------------

    def _narrow(self, x: str) -> str:
        from onnx import TensorProto

        return self.graph.add("Cast", [x], to=TensorProto.FLOAT16)

    def _wide(self, x: str) -> str:
        from onnx import TensorProto

        return self.graph.add("Cast", [x], to=TensorProto.FLOAT)

    def _integer(self, name: str, value: int) -> str:
        import numpy as np

        return self.graph.constant(name, np.array(value, np.int64))
