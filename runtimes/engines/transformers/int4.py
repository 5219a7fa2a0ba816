"""Four-bit weights that stay four bits in memory: GPTQ's and AWQ's tensors, dequantized a block of rows at a time.

A weight is scale · (q - zero), q in 0…15, one scale and one zero for ``group`` neighbouring inputs. A block
fits a CPU's cache, so only one block of memory is needed beside the packed weights; a token costs half a nanosecond per
weight on one core.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn import functional

WORD = 8  # integers in one int32
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # the place, in AWQ's word, of each of its eight neighbours
BLOCK = 1 << 20  # weights dequantized at once: 4 MB of float32
PARTS = ("qweight", "qzeros", "scales")
MIDDLE = 8


class UnknownForm(Exception):
    """The tensors are not in one of the two formats; the text says which tensor and why."""


def unpack(words: torch.Tensor, order: tuple[int, ...] = tuple(range(WORD))) -> torch.Tensor:
    """int32 words (rows, n) as integers 0…15 (rows, 8n), uint8: neighbour k lies in bits 4·order[k] of its word."""
    shifts = torch.tensor([4 * place for place in order], dtype=torch.int32)
    return (words.unsqueeze(-1) >> shifts & 15).to(torch.uint8).flatten(1)


def integers(form: str, tensors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A module's integers (outputs, inputs), zeros and scales (both (outputs, groups)) from a file's tensors.

    form: "gptq" (packed along the inputs, zeros stored less one) or "awq" (packed along the outputs, in AWQ's order).
    Raises UnknownForm.
    """
    words, zeros, scales = (tensors[part] for part in PARTS)
    if words.dtype != torch.int32 or zeros.dtype != torch.int32:
        raise UnknownForm(f"integers are kept as {words.dtype} and {zeros.dtype}, not in words of 32 bits")
    if form == "awq":
        q, zero = unpack(words, AWQ_ORDER).T, unpack(zeros, AWQ_ORDER)
    elif form == "gptq":
        q, zero = unpack(words.T.contiguous()), unpack(zeros) + 1
    else:
        raise UnknownForm(f"the quantization is {form!r}, known are gptq and awq")
    groups, outputs = scales.shape
    if q.shape[0] != outputs or zero.shape != scales.shape or q.shape[1] % groups:
        raise UnknownForm(f"{tuple(q.shape)} integers do not fit {tuple(scales.shape)} scales")
    if "g_idx" in tensors:
        expected = torch.arange(q.shape[1]) // (q.shape[1] // groups)
        if not torch.equal(tensors["g_idx"].long(), expected):
            raise UnknownForm("the inputs are reordered (desc_act), which is not supported")
    return q.contiguous(), zero.T.contiguous(), scales.T.contiguous()


class Int4Linear(nn.Module):
    """A linear layer. Integers 0…15 and zeros are (outputs, inputs) and (outputs, groups) uint8, scales float16.

    Two integers share a byte: input j in the low half, input j + inputs / 2 in the high one. So both halves are written
    to contiguous memory, which is twice as fast as to every second element.
    """

    packed: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    bias: torch.Tensor | None

    def __init__(
        self, q: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None = None
    ) -> None:
        super().__init__()
        self.outputs, self.inputs = q.shape
        if self.inputs % 2:
            raise UnknownForm(f"{self.inputs} inputs are an odd number")
        half = self.inputs // 2
        self.register_buffer("packed", q[:, :half] | (q[:, half:] << 4))
        self.register_buffer("scales", scales.to(torch.float16))
        self.register_buffer("zeros", None if bool((zeros == MIDDLE).all()) else zeros)  # symmetric: all are 8
        self.register_buffer("bias", bias)
        self.rows = max(1, BLOCK // self.inputs)

    def weight(self, begin: int, end: int, dtype: torch.dtype) -> torch.Tensor:
        """Rows begin…end of the weight, (end - begin, inputs): exact in float32."""
        packed, half = self.packed[begin:end], self.inputs // 2
        block = torch.empty((len(packed), self.inputs), dtype=dtype, device=packed.device)
        block[:, :half].copy_(packed & 15)
        block[:, half:].copy_(packed >> 4)
        groups = block.view(len(packed), self.scales.shape[1], -1)
        groups.sub_(MIDDLE if self.zeros is None else self.zeros[begin:end, :, None].to(dtype))
        groups.mul_(self.scales[begin:end, :, None].to(dtype))
        return block

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = []
        for begin in range(0, self.outputs, self.rows):
            end = min(begin + self.rows, self.outputs)
            bias = None if self.bias is None else self.bias[begin:end].to(x.dtype)
            parts.append(functional.linear(x, self.weight(begin, end, x.dtype), bias))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


class HalfEmbedding(nn.Module):
    """The embedding in the file's type; looked-up rows are converted to ``dtype``."""

    weight: torch.Tensor

    def __init__(self, weight: torch.Tensor, dtype: torch.dtype, scale: float) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.dtype, self.scale = dtype, scale

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        rows = functional.embedding(ids, self.weight).to(self.dtype)
        return rows if self.scale == 1.0 else rows * self.scale


class HalfHead(nn.Module):
    """The output layer in the file's type, converted to its input's type one block of rows at a time."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.rows = max(1, BLOCK // weight.shape[1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        starts = range(0, len(self.weight), self.rows)
        parts = [functional.linear(x, self.weight[start : start + self.rows].to(x.dtype)) for start in starts]
        output = torch.cat(parts, dim=-1)
        return output if self.bias is None else output + self.bias.to(x.dtype)
