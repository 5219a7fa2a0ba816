"""AWQ's GEMM format: a container for the same tuned integers as GPTQ's, for loaders that know only this one."""

from __future__ import annotations

from packager.formats.int4.awq import FORM
from packager.formats.int4.build import make_recipe

RECIPE = make_recipe(FORM)
