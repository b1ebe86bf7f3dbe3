"""The same float32 numbers by the faster of torch's kernels."""

from __future__ import annotations

from torch import nn

from sfumato.acceleration._registry import register
from sfumato.core import Denoiser, Guidance, rebuild
from sfumato.networks.products import Linear


@register("onednn")
def onednn() -> Guidance:
    """Plain linear layers in oneDNN's float32 kernel on a CPU: the same picture to rounding, and nothing to fit.

    For transformers of others (a pipeline of diffusers, say) on a processor that the BLAS of torch does not favour; our own
    networks run so already, and ``Trainer`` does it with any network. Large products of tokens only, see
    :func:`sfumato.networks.products.linear`; the copy shares its weights with the original, gradients pass, and other devices
    and types run as always. ``python -m benchmarks.diffusers_pipelines`` measures it.
    """

    def accelerated(denoiser: Denoiser) -> Denoiser:
        made = rebuild(denoiser, lambda path, module: None)
        for module in made.modules():
            if type(module) is nn.Linear:
                module.__class__ = Linear
        return made  # type: ignore[return-value]

    return accelerated


__all__ = ["onednn"]
