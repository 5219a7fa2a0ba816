"""GPTQ int4: integers tuned layer by layer, the same as those of a tuned Q4_0 GGUF."""

from __future__ import annotations

from packager.formats.int4.build import make_recipe
from packager.formats.int4.gptq import FORM

RECIPE = make_recipe(FORM)
