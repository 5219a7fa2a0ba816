"""AWQ's GEMM format: a container for the same tuned integers as GPTQ's, for loaders that know only this one."""

from __future__ import annotations

from packager.awq import FORM
from packager.int4_recipe import make_recipe

RECIPE = make_recipe(FORM)
