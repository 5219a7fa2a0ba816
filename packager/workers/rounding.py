"""int4 rounding that can be tuned: the search for a scale, SignRound's shifts and factors, and the packed result.

Cheng et al. 2023, arXiv 2309.05516. Used by tune.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

LOW, HIGH = -8, 7
SMALLEST = 2.0**-24  # float16's smallest number above zero
STEPS = 0.7, 1.1, 9  # factors of the group's extreme / 8 in the search for a scale: first, last, count


def as_half(scale: torch.Tensor) -> torch.Tensor:
    """The nearest float16 number as float32; zero becomes SMALLEST."""
    half = scale.to(torch.float16).to(torch.float32)
    return torch.where(half == 0, torch.full_like(half, SMALLEST), half)


def quantize(weight: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor | float = 0.0) -> torch.Tensor:
    """Integers -8…7 (as floats) of weights (rows, groups, group) for scales (rows, groups, 1)."""
    return torch.clamp(torch.round(weight / scale + shift), LOW, HIGH)


def plain_scale(weight: torch.Tensor) -> torch.Tensor:
    """The scale that maps each group's extreme, with its sign, to -8, so that all sixteen values are used."""
    place = weight.abs().argmax(dim=-1, keepdim=True)
    return as_half(weight.gather(-1, place) / LOW)


def best_scale(weight: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
    """The scale with the least squared rounding error, weighted by input. importance: (groups, group)."""
    start = plain_scale(weight)
    best, least = start, torch.full_like(start, torch.inf)
    first, last, count = STEPS
    for sign in (1.0, -1.0):
        for factor in torch.linspace(first, last, count).tolist():
            scale = as_half(start * (sign * factor))
            error = ((quantize(weight, scale) * scale - weight).square_().mul_(importance)).sum(-1, keepdim=True)
            better = error < least
            best, least = torch.where(better, scale, best), torch.where(better, error, least)
    return best


class Rounding(torch.autograd.Function):
    """scale · a · round(w / (scale · a) + v), with 1 as the gradient of rounding (straight-through estimator).

    Only its inputs are kept for the backward pass, so memory is that of the weights.
    """

    @staticmethod
    def forward(
        ctx: Any, weight: torch.Tensor, start: torch.Tensor, shift: torch.Tensor, factor: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(weight, start, shift, factor)
        scale = as_half(start * factor)
        return quantize(weight, scale, shift) * scale

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        weight, start, shift, factor = ctx.saved_tensors
        (gradient,) = gradients
        scale = as_half(start * factor)
        exact = weight / scale
        moved = exact + shift
        inside = (moved > LOW - 0.5) & (moved < HIGH + 0.5)
        by_scale = torch.clamp(torch.round(moved), LOW, HIGH) - exact * inside
        by_factor = (gradient * by_scale).sum(-1, keepdim=True) * start
        return None, None, gradient * inside * scale, by_factor


class Linear:
    """One linear layer during tuning; shapes: weight and shift (rows, groups, group), scale (rows, groups, 1)."""

    def __init__(self, name: str, module: nn.Linear, group: int) -> None:
        rows, inputs = module.weight.shape
        if inputs % group:
            raise SystemExit(f"{name} has {inputs} inputs, which groups of {group} do not divide")
        self.name, self.module = name, module
        self.weight = module.weight.detach().reshape(rows, inputs // group, group)
        self.squares = torch.zeros(inputs)
        self.scale = plain_scale(self.weight)
        self.shift: torch.Tensor | None = None
        self.factor: torch.Tensor | None = None
        self.used: torch.Tensor | None = None  # the weight of the next forward pass, (rows, inputs)

    def watch(self, keep: torch.Tensor) -> Any:
        """Sum the squared inputs of real tokens in forward passes. keep: their mask (sequences, tokens)."""
        row = 0

        def saw(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            nonlocal row
            (x,) = args
            self.squares += x[keep[row : row + len(x)]].square().sum(0)  # the MLP runs one sequence at a time
            row += len(x)

        return self.module.register_forward_pre_hook(saw)

    def begin(self) -> None:
        """Search the scale, and create the tunable shifts and factors."""
        groups, group = self.weight.shape[1:]
        self.scale = best_scale(self.weight, self.squares.reshape(groups, group))
        self.shift = torch.zeros_like(self.weight, requires_grad=True)
        self.factor = torch.ones_like(self.scale, requires_grad=True)
        module: Any = self.module

        def forward(x: torch.Tensor) -> torch.Tensor:
            weight = module.weight if self.used is None else self.used
            return functional.linear(x, weight, module.bias)

        module.forward = forward

    def round(self, *, tuned: bool) -> None:
        """Set the weight of the next forward pass: tuned so far, or rounded with the searched scale."""
        assert self.shift is not None and self.factor is not None
        if tuned:
            weight: torch.Tensor = Rounding.apply(self.weight, self.scale, self.shift, self.factor)  # type: ignore[no-untyped-call]
        else:
            weight = quantize(self.weight, self.scale) * self.scale
        self.used = weight.reshape(len(weight), -1)

    def result(self, *, tuned: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Packed integers (rows, inputs / 2) and float16 scales (rows, groups)."""
        scale, shift = self.scale, torch.zeros(())
        if tuned:
            assert self.shift is not None and self.factor is not None
            scale, shift = as_half(self.scale * self.factor.detach()), self.shift.detach()
        if not torch.isfinite(scale).all():
            raise SystemExit(f"{self.name}: float16 cannot hold a scale of its weights")
        values = (quantize(self.weight, scale, shift) - LOW).to(torch.uint8).reshape(len(scale), -1)
        return values[:, 0::2] | (values[:, 1::2] << 4), scale.squeeze(-1).to(torch.float16)
