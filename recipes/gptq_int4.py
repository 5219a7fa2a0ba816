"""GPTQ int4: integers tuned layer by layer, the very ones that a Q4_0 GGUF of them holds."""

from __future__ import annotations

from packager.gptq import FORM
from packager.int4_recipe import make_recipe

RECIPE = make_recipe(FORM)
