"""Our own models as a diffusers pipeline: saved, loaded and called as diffusers does it, equal to the last bit."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfumato import codecs, conditioners, networks, processes
from sfumato.core import Context, InputError, Streams, mix
from sfumato.denoisers import parametrized
from sfumato.files import write_atomically
from sfumato.guidance import cfg
from sfumato.interop._needs import need
from sfumato.interop.scheduler import SolverScheduler, as_diffusers_scheduler, streams_of
from sfumato.pipeline import Pipeline

diffusers = need("diffusers")
# A pipeline's folder names this module, and diffusers looks for the base classes in it.
DiffusionPipeline: Any = diffusers.DiffusionPipeline
ModelMixin: Any = diffusers.ModelMixin
ConfigMixin: Any = diffusers.ConfigMixin
register_to_config: Any = need("diffusers.configuration_utils").register_to_config

CODE = '''"""For DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True); it needs sfumato."""

from sfumato.interop.pipelines import SfumatoPipeline

__all__ = ["SfumatoPipeline"]
'''


class SfumatoModel(ModelMixin, ConfigMixin):
    """A network of this library: ``model(x, label, **conditions)``; ``description`` is that of the pipeline it is part of."""

    @register_to_config
    def __init__(self, name: str, config: Mapping[str, Any], description: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.net = networks.build(name, dict(config))

    def forward(self, x: Tensor, label: Tensor, **cond: Any) -> Tensor:
        """The network's own output."""
        return self.net(x, label, **cond)  # type: ignore[no-any-return]


class SfumatoCodec(ModelMixin, ConfigMixin):
    """A codec of this library: ``encode`` and ``decode``."""

    @register_to_config
    def __init__(self, name: str, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.codec = codecs.build(name, dict(config))
        self.register_buffer("format", torch.ones(1))  # diffusers loads no model without a tensor, and pixels have none

    def encode(self, images: Tensor) -> Tensor:
        """Pictures to states."""
        return self.codec.encode(images)

    def decode(self, x: Tensor) -> Tensor:
        """States to floats in [-1, 1]."""
        return self.codec.decode(x)


class SfumatoPipeline(DiffusionPipeline):
    """A saved model of this library as a diffusers pipeline.

    ``pipe(prompt, num_inference_steps=..., guidance_scale=..., generator=... | seed=..., latents=...)``. With ``seed``
    its pictures are those of ``Pipeline.generate(..., seed=)``, bit for bit; with a generator the noise is diffusers'
    own.
    """

    model_cpu_offload_seq = "denoiser->codec"

    def __init__(self, denoiser: SfumatoModel, codec: SfumatoCodec, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(denoiser=denoiser, codec=codec, scheduler=scheduler)

    def pipeline(self) -> Pipeline:
        """The same model as a Pipeline of this library; the weights are shared."""
        d = self.denoiser.config.description
        numbers = {k: tuple(v) if isinstance(v, list) else v for k, v in d["process"]["numbers"].items()}
        process = getattr(processes, d["process"]["name"])(**numbers)
        denoiser = parametrized(
            self.denoiser.net.eval(), process, d["predicts"], null=d["null"], data_std=d["data_std"]
        )
        conditioner = conditioners.registry.get(d["conditioner"]["name"], **d["conditioner"]["config"])
        fields = {k: d[k] for k in ("solver", "grid", "steps", "guidance", "card")}
        return Pipeline(denoiser, self.codec.codec.eval(), conditioner, tuple(d["size"]), **fields)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        batch_size: int = 1,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        generator: Any = None,
        seed: int | Sequence[int] | None = None,
        latents: Tensor | None = None,
        cond: Mapping[str, Any] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Pictures: 'pil', 'pt' (floats in [0, 1]), 'uint8' or the 'latent' states."""
        own = self.pipeline()
        texts = None if prompt is None else [prompt] if isinstance(prompt, str) else list(prompt)
        n = batch_size if texts is None else len(texts)
        conditions = own.conditions(n, texts, **(cond or {}))
        scale: Any = own.guidance if guidance_scale is None else guidance_scale
        denoiser = own.denoiser if scale == 1 else cfg(float(scale))(own.denoiser)
        x = self._start(own, n, generator, seed, latents)
        self.scheduler.set_timesteps(num_inference_steps or own.steps)
        ctx = Context(cond=conditions, rng=self._drawing(own, n, generator, seed), batch=n)
        for t in self.progress_bar(self.scheduler.timesteps):
            out = denoiser(self.scheduler.scale_model_input(x, t), float(t), ctx).native
            x = self.scheduler.step(out, t, x).prev_sample
        images = self._shown(own, x, output_type)
        return diffusers.ImagePipelineOutput(images=images) if return_dict else (images,)

    def _drawing(self, own: Pipeline, n: int, generator: Any, seed: Any) -> Streams | None:
        """Streams for a network that draws a latent at each call."""
        if not own.denoiser.draws:
            return None
        return (
            streams_of(generator, n)
            if seed is None
            else Streams.of([mix(int(s[0]), s[1], 1) for s in Streams.of(seed, n).seeds], n)
        )

    def _start(self, own: Pipeline, n: int, generator: Any, seed: Any, latents: Tensor | None) -> Tensor:
        from diffusers.utils.torch_utils import randn_tensor

        if latents is not None:
            return latents
        if seed is not None:
            rng = Streams.of(seed, n)
            return own.process.prior((n, *own.codec.shape(*own.size)), Context(rng=rng, batch=n))  # type: ignore[no-any-return]
        noise = randn_tensor((n, *own.codec.shape(*own.size)), generator=generator)
        return noise * own.process.coef(1.0).sigma  # type: ignore[no-any-return]

    def _shown(self, own: Pipeline, x: Tensor, kind: str) -> Any:
        if kind == "latent":
            return x
        images = own.codec.images(x)
        if kind == "uint8":
            return images
        if kind == "pt":
            return images.float() / 255
        if kind != "pil":
            raise InputError(f"output_type = {kind!r}: one of pil, pt, uint8, latent")
        from PIL import Image

        arrays = images.permute(0, 2, 3, 1).cpu().numpy()
        return [Image.fromarray(a[..., 0] if a.shape[-1] == 1 else a) for a in arrays]


def to_diffusers(pipeline: Pipeline, path: str | Path | None = None) -> SfumatoPipeline:
    """A model of this library as a diffusers pipeline, in its default solver and grid; written to ``path`` if given.

    The network is ours and not one of diffusers' architectures, so the folder names ``sfumato.interop.pipelines``:
    load it by ``SfumatoPipeline.from_pretrained(path)``, ``sf.from_diffusers(path)``, or
    ``DiffusionPipeline.from_pretrained(path, custom_pipeline=path, trust_remote_code=True)``, where sfumato is
    installed.
    """
    if not hasattr(pipeline.denoiser.net, "network_name"):
        raise InputError("this pipeline came from diffusers: keep it there, with its save_pretrained")
    d = pipeline.description()
    like = {
        "process": d["process"]["name"],
        "numbers": d["process"]["numbers"],
        "predicts": d["predicts"],
        "data_std": d["data_std"],
    }
    net = _held(SfumatoModel(**d["network"], description=json.loads(json.dumps(d))), "net", pipeline.denoiser.net)
    codec = _held(SfumatoCodec(**d["codec"]), "codec", pipeline.codec)
    scheduler = as_diffusers_scheduler(pipeline.solver, pipeline.grid, like=like)
    made = SfumatoPipeline(net, codec, scheduler)
    if path is not None:
        made.save_pretrained(str(path), safe_serialization=True)
        write_atomically(Path(path) / "pipeline.py", CODE.encode())
    return made


def _held(wrapper: Any, name: str, module: nn.Module) -> Any:
    """The wrapper around the very module, in evaluation mode."""
    setattr(wrapper, name, module)
    return wrapper.eval()


def load_folder(folder: Path) -> Any:
    """The pipeline of a folder, whatever its class: nothing is downloaded, unpickled or run from the folder."""
    name = json.loads((folder / "model_index.json").read_text("utf-8")).get("_class_name")
    if name == "SfumatoPipeline":
        return SfumatoPipeline.from_pretrained(str(folder), local_files_only=True, use_safetensors=True)
    return DiffusionPipeline.from_pretrained(str(folder), local_files_only=True, use_safetensors=True)


__all__ = ["SfumatoCodec", "SfumatoModel", "SfumatoPipeline", "SolverScheduler", "load_folder", "to_diffusers"]
