"""ComfyUI nodes. ComfyUI itself is imported when a node runs, so that the pack can be read and tested without it."""

from __future__ import annotations

from typing import Any

from sfumato import grids, solvers
from sfumato.guidance import cfg
from sfumato.interop.kdiffusion import k_guidance, k_sampler, k_sigmas


def _is_flow(model: Any) -> bool:
    """Whether ComfyUI's model samples a flow: its model_sampling is then a CONST."""
    sampling = model.get_model_object("model_sampling")
    return any(c.__name__ == "CONST" for c in type(sampling).__mro__)


class SfumatoSampler:
    """A solver as a SAMPLER for SamplerCustom; ``options`` are its numbers, such as ``order=3``."""

    CATEGORY, FUNCTION, RETURN_TYPES = "model/sampling/samplers", "make", ("SAMPLER",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 (ComfyUI's name)
        return {
            "required": {"model": ("MODEL",), "solver": (solvers.names(), {"default": "dpm-solver++"})},
            "optional": {"options": ("STRING", {"default": ""})},
        }

    def make(self, model: Any, solver: str, options: str = "") -> tuple[Any]:
        """The sampler."""
        from comfy.samplers import KSAMPLER

        spec = f"{solver}({options})" if options.strip() else solver
        return (KSAMPLER(k_sampler(spec, flow=_is_flow(model))),)


class SfumatoSigmas:
    """A grid as SIGMAS; ``options`` are its numbers, ``denoise`` below 1 begins later, for image to image."""

    CATEGORY, FUNCTION, RETURN_TYPES = "model/sampling/schedulers", "make", ("SIGMAS",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        return {
            "required": {
                "model": ("MODEL",),
                "grid": (grids.names(), {"default": "arctan"}),
                "steps": ("INT", {"default": 20, "min": 1, "max": 1000}),
                "denoise": ("FLOAT", {"default": 1.0, "min": 0.01, "max": 1.0, "step": 0.01}),
            },
            "optional": {"options": ("STRING", {"default": ""})},
        }

    def make(self, model: Any, grid: str, steps: int, denoise: float = 1.0, options: str = "") -> tuple[Any]:
        """The sigmas: the last ``steps`` of steps / denoise."""
        sampling = model.get_model_object("model_sampling")
        spec = f"{grid}({options})" if options.strip() else grid
        whole = max(steps, int(steps / denoise))
        lowest, highest = float(sampling.sigma_min), float(sampling.sigma_max)
        return (k_sigmas(spec, whole, lowest, highest, flow=_is_flow(model))[-(steps + 1) :],)


class SfumatoGuidance:
    """Classifier-free guidance of ours on a MODEL: within an interval of t, rescaled. The sampler's own scale does not count."""

    CATEGORY, FUNCTION, RETURN_TYPES = "advanced/guidance", "make", ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        unit = {"min": 0.0, "max": 1.0, "step": 0.01}
        return {
            "required": {
                "model": ("MODEL",),
                "scale": ("FLOAT", {"default": 5.0, "min": 0.0, "max": 100.0, "step": 0.1}),
                "low": ("FLOAT", {"default": 0.0, **unit}),
                "high": ("FLOAT", {"default": 1.0, **unit}),
                "rescale": ("FLOAT", {"default": 0.0, **unit}),
            }
        }

    def make(self, model: Any, scale: float, low: float = 0.0, high: float = 1.0, rescale: float = 0.0) -> tuple[Any]:
        """The patched model."""
        patched = model.clone()
        guidance = cfg(
            scale, interval=None if (low, high) == (0.0, 1.0) else (low, high), rescale=rescale, batched=False
        )
        # at its own scale of 1 ComfyUI would not ask for the negative prompt
        patched.set_model_sampler_cfg_function(
            k_guidance(guidance, flow=_is_flow(model)), disable_cfg1_optimization=True
        )
        return (patched,)


NODE_CLASS_MAPPINGS = {
    "SfumatoSampler": SfumatoSampler, "SfumatoSigmas": SfumatoSigmas, "SfumatoGuidance": SfumatoGuidance,
}  # fmt: skip
NODE_DISPLAY_NAME_MAPPINGS = {
    "SfumatoSampler": "Sampler (sfumato)", "SfumatoSigmas": "Sigmas (sfumato)", "SfumatoGuidance": "Guidance (sfumato)",
}  # fmt: skip
