"""TensorRT Edge-LLM for Jetson Orin on JetPack 7.2 and Thor: float16 or tuned int4, the engine made there."""

from __future__ import annotations

from packager.edgellm import RECIPE as RECIPE
