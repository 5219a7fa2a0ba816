"""The typed ONNX on onnxruntime, chosen with ``--device``: "onnxruntime" for a build with the TensorRT or CUDA provider
that the user installed, "cpu" for no GPU. Neither is in the bundle's wheels.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtimes.engine import EngineError
from runtimes.engines.onnxruntime.session import CPU, open_session, quiet_onnxruntime
from runtimes.engines.tensorrt.plan import Plan, Profile, shape_flags

if TYPE_CHECKING:
    from numpy.typing import NDArray


class OrtSession:
    """A session with one of the providers; onnxruntime's silent fallback to the CPU is an error.

    engines: the TensorRT provider's cache folder. Raises EngineError with one sentence.
    """

    def __init__(
        self, plan: Plan, profile: Profile, device: str, *, engines: Path | None, threads: int, verbose: bool
    ) -> None:
        try:
            onnxruntime = quiet_onnxruntime()
        except ImportError:
            missing = "onnxruntime" if device == "cpu" else "a build of onnxruntime for this GPU"
            raise EngineError(
                f"onnxruntime: expected it for --device {device}, found none; install {missing} into the "
                "install's venv, or leave --device out."
            ) from None
        providers = providers_for(device, onnxruntime.get_available_providers(), plan, profile, engines)
        self.version = f"onnxruntime {onnxruntime.__version__}"
        self.device = "cpu" if device == "cpu" else str(providers[0][0])
        self._session: Any = open_session(plan.onnx, threads=threads, verbose=verbose, providers=providers)
        first = self._session.get_providers()[0]
        if first != providers[0][0]:
            raise EngineError(
                f"onnxruntime: expected {providers[0][0]}, found that it fell back to {first}; its log "
                "(--verbose) says which library is missing."
            )
        self._names = [one.name for one in plan.outputs]
        self._kinds = {one.name: one.dtype for one in plan.inputs}

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The outputs of one batch. Raises EngineError."""
        given = {name: inputs[name].astype(kind, copy=False) for name, kind in self._kinds.items()}
        try:
            return dict(zip(self._names, self._session.run(self._names, given), strict=True))
        except Exception as error:
            raise EngineError(f"onnxruntime failed: {error}") from None

    def memory(self) -> int:
        """0: onnxruntime does not report device memory."""
        return 0

    def save_kernels(self) -> None:
        """Nothing: onnxruntime's providers save their engines themselves."""

    def close(self) -> None:
        """Free the session."""
        self._session = None


def providers_for(
    device: str, offered: list[str], plan: Plan, profile: Profile, engines: Path | None
) -> list[tuple[str, dict[str, str]]]:
    """The providers for a device, best first. Raises EngineError when this build of onnxruntime has none of them."""
    if device == "cpu":
        return [CPU]
    providers: list[tuple[str, dict[str, str]]] = []
    if "TensorrtExecutionProvider" in offered:
        low, likely, high = (flag.partition("=")[2] for flag in shape_flags(profile))
        options = {
            "trt_profile_min_shapes": low,
            "trt_profile_opt_shapes": likely,
            "trt_profile_max_shapes": high,
            "trt_max_workspace_size": str(plan.workspace),
        }
        options["trt_fp16_enable"] = "1"  # the flag permits float16; the graph's types decide where
        if plan.precision == "int8":
            options["trt_int8_enable"] = "1"
        if engines is not None:
            options |= {
                "trt_engine_cache_enable": "1",
                "trt_engine_cache_path": str(engines),
                "trt_timing_cache_enable": "1",
                "trt_timing_cache_path": str(engines),
            }
        providers.append(("TensorrtExecutionProvider", options))
    if "CUDAExecutionProvider" in offered:
        providers.append(("CUDAExecutionProvider", {}))
    if not providers:
        raise EngineError(
            "onnxruntime: expected a build with its TensorRT or CUDA provider, found "
            f"{', '.join(offered)}; install such a build, or leave --device out."
        )
    return [*providers, CPU]
