"""diffusers pipelines as sfumato pipelines."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sfumato.codecs import Identity
from sfumato.conditioners import Unconditional
from sfumato.core import Grid, Guidance, InputError, Posterior, Solver
from sfumato.denoisers import parametrized
from sfumato.files import write_atomically
from sfumato.interop._needs import need
from sfumato.interop.autoencoders import Autoencoder
from sfumato.interop.conditions import Prompts, follows_instructions
from sfumato.interop.law import KINDS, Clipped, Law, Schedule
from sfumato.interop.networks import Flux, Network, network
from sfumato.pipeline import Pipeline

TOLD = ("solver", "grid", "steps", "guidance", "size", "card")  # of a student: what its diffusers pipeline does not say


@dataclass
class Imported(Pipeline):
    """A pipeline that came from diffusers; ``law`` is what its scheduler said, ``source`` the diffusers pipeline.

    Its grid is the scheduler's own schedule and its solver ours of the same name, so that ``generate`` takes the very
    steps of the diffusers pipeline; any other solver, grid and guidance applies as to every pipeline.
    """

    law: Law | None = None
    source: Any = None

    def guided(self, guidance: float | str | Guidance | None = None) -> Any:
        """The denoiser under this guidance, with the scheduler's clipping around it where it clips."""
        denoiser = super().guided(guidance)
        clip: Callable[[Posterior], Posterior] | None = None if self.law is None else self.law.clip
        return denoiser if clip is None else Clipped(denoiser, clip)

    def generate(
        self,
        prompts: int | str | Sequence[str],
        *,
        grid: str | Grid | None = None,
        cond: Mapping[str, Any] | None = None,
        size: tuple[int, int] | None = None,
        **options: Any,
    ) -> Tensor:
        """As :meth:`sfumato.Pipeline.generate`; models that read the picture's size, or move their schedule with it,
        are told of ``size``."""
        if size is not None:
            cond = {"size": tuple(size), **(cond or {})} if "size" in (self.denoiser.reads or ()) else cond
            grid = self.schedule(size) if grid is None and isinstance(self.grid, Schedule) else grid
        return super().generate(prompts, grid=grid, cond=cond, size=size, **options)

    def schedule(self, size: tuple[int, int] | None = None) -> Schedule:
        """The scheduler's own times for pictures of this size: a Grid."""
        return Law.of(
            self.source.scheduler, _options(self.source, self.denoiser.net, self.codec, size or self.size)
        ).schedule

    def taught(self, denoiser: Any, **fields: Any) -> Imported:
        """The same pipeline with a student of its model in it; so is ``source``, whose scheduler is the student's sampler."""
        made = dataclasses.replace(self, denoiser=denoiser, law=None, **fields)
        if callable(self.source):
            from sfumato.interop.scheduler import as_diffusers_scheduler

            kinds = {ours: theirs for theirs, ours in KINDS.items()}
            config = {k: v for k, v in self.source.scheduler.config.items() if not k.startswith("_")}
            like = {**config, "_class_name": type(self.source.scheduler).__name__}
            like |= {name: False for name in ("clip_sample", "thresholding") if name in config}
            like |= {"prediction_type": kinds[denoiser.predicts]} if "prediction_type" in config else {}
            name = "unet" if "unet" in self.source.components else "transformer"
            parts = {
                name: denoiser.net.model,
                "scheduler": as_diffusers_scheduler(made.solver, made.grid, like=like),
            }
            made.source = type(self.source)(**{**self.source.components, **parts})
        return made

    def save(self, path: str | Path, **options: Any) -> Path:
        """A student (:meth:`taught`) as a diffusers pipeline, with ``sfumato.json`` for what that does not say.

        Anything else is refused: what came from diffusers is kept by diffusers, ``source.save_pretrained(path)``.
        """
        if not callable(self.source) or type(getattr(self.source, "scheduler", None)).__name__ != "SolverScheduler":
            raise InputError("a pipeline from diffusers is saved by diffusers: pipeline.source.save_pretrained(path)")
        self.source.save_pretrained(str(path), safe_serialization=True)
        told = {name: getattr(self, name) for name in TOLD}
        write_atomically(Path(path) / "sfumato.json", json.dumps(told, indent=1).encode())
        return Path(path)


def from_diffusers(
    source: Any,
    *,
    scheduler: Any = None,
    control_strength: float = 1.0,
    size: tuple[int, int] | None = None,
    solver: str | Solver | None = None,
    grid: str | Grid | None = None,
) -> Pipeline:
    """A diffusers pipeline, a folder of one, or a single denoising model, as a Pipeline.

    scheduler         another scheduler than the pipeline's own to read the model's law from; a single model needs one
    control_strength  the weight of a ControlNet
    size              (height, width) of the pictures; default: the model's own
    solver, grid      default: the steps that its scheduler would take

    Carried: UNet2DModel, UNet2DConditionModel (SD 1, 2, SDXL; inpainting, InstructPix2Pix, ControlNet, IP-Adapters), SD3, Flux, PixArt
    and DiT transformers; KL, tiny, deep-compression and VQ autoencoders; tables of betas (eps, v, x0; zero-terminal
    SNR), flow matching, EDM; LoRA as loaded into the model. What is not carried raises InputError with the reason.
    Nothing is downloaded and nothing unpickled: a folder holds safetensors. The model is shared with ``source``, not
    copied.
    """
    given, pipe = source, _loaded(source)
    if type(pipe).__name__ == "SfumatoPipeline":
        return pipe.pipeline()  # type: ignore[no-any-return]
    model = pipe if isinstance(pipe, nn.Module) else _denoising(pipe)
    source = _Alone(pipe, scheduler) if isinstance(pipe, nn.Module) else pipe
    read = scheduler or getattr(source, "scheduler", None)
    if read is None:
        raise InputError("a model alone does not say what its noise is: give scheduler=")
    _refuse(source)
    net = network(model.eval(), getattr(source, "controlnet", None), control_strength)
    codec = _codec(source, net)
    _fits(net, codec)
    asked, size = size, size or _size(source, net, codec)
    law = Law.of(read, _options(source, net, codec, size))
    _variance(net, read)
    conditioner = Prompts(source, net, codec, size) if net.accepts else Unconditional()
    null = conditioner.null() if isinstance(conditioner, Prompts) else {}
    denoiser = parametrized(net.eval(), law.process, law.predicts, law.label, null, law.data_std)
    defaults = _defaults(source)
    made = Imported(
        denoiser, codec, conditioner, size, solver or law.solver, grid or law.schedule, defaults.get("num_inference_steps", 20),
        _guidance(source, net, defaults) if null else 1.0,
        _card(source, read), law, source,
    )  # fmt: skip
    return dataclasses.replace(made, **_told(given, solver, grid, asked))


def _told(given: Any, solver: Any, grid: Any, size: Any) -> dict[str, Any]:
    """What the folder of a student says beside diffusers, but for what the caller says otherwise."""
    file = Path(given) / "sfumato.json" if isinstance(given, (str, Path)) else None
    if file is None or not file.is_file():
        return {}
    told = json.loads(file.read_text("utf-8"))
    told["size"] = tuple(told["size"])
    said = {"solver": solver, "grid": grid, "size": size}
    return {name: told[name] for name in TOLD if said.get(name) is None}


class _Alone:
    """A model without a pipeline."""

    def __init__(self, model: Any, scheduler: Any) -> None:
        self.unet, self.scheduler = model, scheduler
        self.config: dict[str, Any] = {}


def _loaded(source: Any) -> Any:
    if not isinstance(source, (str, Path)):
        return source
    diffusers, folder = need("diffusers"), Path(source)
    if (folder / "model_index.json").exists():
        from sfumato.interop.pipelines import load_folder

        return load_folder(folder)
    if (folder / "config.json").exists():
        return diffusers.AutoModel.from_pretrained(str(folder), local_files_only=True, use_safetensors=True)
    raise FileNotFoundError(
        f"{folder} is no folder of a diffusers pipeline (model_index.json) or model (config.json); to download one, load it "
        "with diffusers' DiffusionPipeline.from_pretrained and give the pipeline"
    )


def _denoising(pipe: Any) -> Any:
    model = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
    if model is None:
        raise InputError(f"a {type(pipe).__name__} has no unet and no transformer: it cannot be carried")
    return model


def _refuse(pipe: Any) -> None:
    for part, reason in (
        ("adapter", "T2I-Adapter features are not conditions here"),
        ("transformer_2", "two networks share the times between them"),
        ("image_normalizer", "its image embeddings are noised by their own schedule"),
        ("prior", "a cascade of two diffusions is two pipelines"),
    ):
        if getattr(pipe, part, None) is not None:
            raise InputError(f"a {type(pipe).__name__} with {part!r} cannot be carried: {reason}")
    if pipe.config.get("requires_aesthetics_score"):
        raise InputError(f"a {type(pipe).__name__} that reads aesthetics scores (a refiner) cannot be carried")


def _codec(pipe: Any, net: Network) -> Any:
    model = getattr(pipe, "vae", None) or getattr(pipe, "vqvae", None)
    if model is None:
        return Identity(net.channels)
    checker = getattr(pipe, "safety_checker", None)
    watermark = getattr(pipe, "watermark", None)
    if watermark is not None:
        raise InputError("a watermarker cannot be carried: set pipe.watermark = None if you may, or keep to diffusers")
    return Autoencoder(model.eval(), None if checker is None else _checked(pipe))


def _checked(pipe: Any) -> Callable[[Tensor], Tensor]:
    """Pictures in [0, 1] that the pipeline's safety checker has seen (flagged ones are blackened)."""

    def check(images: Tensor) -> Tensor:
        seen, flagged = pipe.run_safety_checker(images * 2 - 1, images.device, images.dtype)
        keep = [1.0 - float(bool(f)) for f in flagged] if flagged is not None else [1.0] * len(images)
        return (seen / 2 + 0.5).clamp(0, 1) * images.new_tensor(keep).view(-1, 1, 1, 1)

    return check


def _fits(net: Network, codec: Any) -> None:
    latent = codec.shape(64 * getattr(codec, "factor", 1), 64 * getattr(codec, "factor", 1))[0]
    if latent != net.channels:
        raise InputError(f"the network denoises {net.channels} channels and the codec makes {latent}: they are no pair")


def _variance(net: Network, scheduler: Any) -> None:
    if getattr(net, "learned", False) and scheduler.config.get("variance_type") in ("learned", "learned_range"):
        raise InputError(
            "this U-Net predicts the variance of each step, which cannot be carried: to sample without it, give "
            "scheduler= with variance_type='fixed_small'"
        )


def _size(pipe: Any, net: Network, codec: Any) -> tuple[int, int]:
    side = net.model.config.get("sample_size") or getattr(pipe, "default_sample_size", None) or 64
    high, wide = side if isinstance(side, (list, tuple)) else (side, side)
    factor = getattr(codec, "factor", 1)
    return int(high) * factor, int(wide) * factor


def _options(pipe: Any, net: Any, codec: Any, size: tuple[int, int]) -> Callable[[int], Mapping[str, Any]] | None:
    """What the pipeline passes to ``set_timesteps`` beside n: Flux its sigmas, and the shift that follows the size."""
    config = pipe.scheduler.config if getattr(pipe, "scheduler", None) is not None else {}
    flux = isinstance(net, Flux)
    shifted = config.get("use_dynamic_shifting", False)
    if not (flux or shifted):
        return None
    tokens = (size[0] // codec.factor // net.factor) * (size[1] // codec.factor // net.factor)
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    slope = (config.get("max_shift", 1.15) - config.get("base_shift", 0.5)) / (high - low)
    mu = {"mu": tokens * slope + config.get("base_shift", 0.5) - slope * low} if shifted else {}

    def options(n: int) -> Mapping[str, Any]:
        even = flux and not config.get("use_flow_sigmas", False)
        return {"sigmas": [float(v) for v in need("numpy").linspace(1.0, 1 / n, n)], **mu} if even else mu

    return options


def _defaults(pipe: Any) -> dict[str, Any]:
    """The default arguments of the pipeline's own call."""
    if not callable(pipe):
        return {}
    parameters = inspect.signature(type(pipe).__call__).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty and p.default is not None}


def _guidance(pipe: Any, net: Network, defaults: Mapping[str, Any]) -> float | str:
    """The guidance of the pipeline's own call: a scale, or two for InstructPix2Pix."""
    scale = float(defaults.get("guidance_scale", 1.0))
    if follows_instructions(pipe):
        return f"dual(scale={scale}, image_scale={float(defaults.get('image_guidance_scale', 1.5))})"
    return 1.0 if isinstance(net, Flux) else scale


def _card(pipe: Any, scheduler: Any) -> dict[str, Any]:
    return {"made by": "diffusers", "pipeline": type(pipe).__name__, "scheduler": type(scheduler).__name__}
