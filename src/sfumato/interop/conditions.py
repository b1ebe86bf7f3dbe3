"""What a diffusers pipeline makes of prompts, sizes, pictures and classes, as conditions by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from sfumato.codecs import to_float
from sfumato.conditioners import Conditioner
from sfumato.core import InputError
from sfumato.interop.networks import Network

Encode = Callable[[list[str]], dict[str, Tensor]]


class Prompts(Conditioner):
    """The conditions of an imported pipeline.

    prompts       encoded by the pipeline's own text encoders; none is the null condition
    label         a class, or one an item; none is the null class
    size          (height, width) of the picture, for models that read it; also original_size, crop, target_size of SDXL
    control       (1 or n, 3, H, W), uint8 or in [0, 1], for a ControlNet
    image, mask   (1 or n, ...): the picture and where to paint it anew (1), for inpainting U-Nets; or ``channels`` as
                  the U-Net reads them
    image         of an InstructPix2Pix U-Net: the picture to change, (1 or n, 3, H, W)
    image_prompt  for an IP-Adapter: embeddings (1 or n, N, D), or what its image encoder takes; a list of one each for several
    guidance      the scale that a distilled model reads

    ``null(negative)`` gives what "no condition" is for ``cfg(scale, null=...)``: the encoding of a negative prompt.
    """

    name = "diffusers"

    def __init__(self, pipe: Any, net: Network, codec: Any, size: tuple[int, int]) -> None:
        self.config: dict[str, Any] = {}
        self.pipe, self.net, self.codec, self.size = pipe, net, codec, size
        self.encode = _encoder(pipe, net)
        self.raw = _raw(net)

    def __call__(self, n: int, prompts: Sequence[str] | None = None, **raw: Any) -> dict[str, Any]:
        unknown = set(raw) - self.raw
        if unknown:
            raise InputError(f"this model reads no {sorted(unknown)}; it reads {sorted(self.raw) or 'nothing raw'}")
        out: dict[str, Any] = {}
        if "text" in self.net.accepts:
            out |= self._text(n, prompts)
        elif prompts is not None:
            raise InputError("this model reads no prompt")
        size = tuple(raw.get("size") or self.size)
        if "pooled" in self.net.accepts and "size" in self.net.accepts:
            numbers = (
                *(raw.get("original_size") or size),
                *(raw.get("crop") or (0, 0)),
                *(raw.get("target_size") or size),
            )
            out["size"] = torch.tensor([numbers], dtype=torch.float32).expand(n, -1)
        elif "size" in self.net.accepts:
            out["size"] = torch.tensor([size], dtype=torch.float32).expand(n, -1)
            out["aspect"] = torch.tensor([[size[0] / size[1]]]).expand(n, -1)
        if "label" in self.net.accepts:
            out["label"] = self._labels(n, raw.get("label"))
        if "guidance" in self.net.accepts:
            out["guidance"] = torch.full((n,), float(raw.get("guidance", 3.5)))
        return out | self._pictures(n, raw, size)

    @torch.no_grad()
    def null(self, negative: str = "") -> dict[str, Any]:
        """What "no condition" is, one row by name: with a negative prompt its encoding."""
        out: dict[str, Any] = {}
        if "text" in self.net.accepts and self.encode is not None:
            out |= {k: v.clone() for k, v in self.encode([negative]).items()}
            if not negative and self.pipe.config.get("force_zeros_for_empty_prompt"):
                out = {k: torch.zeros_like(v) for k, v in out.items()}
        if "label" in self.net.accepts:
            out["label"] = self._classes()
        out |= dict.fromkeys(self.net.image_prompts, 0.0)
        return out

    @torch.no_grad()
    def _text(self, n: int, prompts: Sequence[str] | None) -> dict[str, Tensor]:
        if self.encode is None:
            raise InputError("this pipeline has no text encoder: give its conditions as tensors, cond={'text': ...}")
        if prompts is None:
            return {
                k: v.expand(n, *v.shape[1:]) for k, v in self.null().items() if k in ("text", "pooled", "text_mask")
            }
        if len(prompts) != n or not all(isinstance(p, str) for p in prompts):
            raise InputError(f"{len(prompts)} prompts for {n} images: give one string an image")
        distinct = list(dict.fromkeys(prompts))
        rows = torch.tensor([distinct.index(p) for p in prompts])
        return {k: v[rows.to(v.device)] for k, v in self.encode(distinct).items()}

    def _classes(self) -> int:
        config = self.net.model.config
        count = config.get("num_class_embeds") or config.get("num_embeds_ada_norm")
        if count is None:
            raise InputError("the classes of this model are not counted in its configuration: give labels and null=")
        return int(count) - (0 if type(self.net.model).__name__.startswith("DiT") else 1)

    def _labels(self, n: int, given: Any) -> Tensor:
        values = list(given) if isinstance(given, (list, tuple, Tensor)) else [given] * n
        if len(values) != n:
            raise InputError(f"{len(values)} labels for {n} images: give one, or one an image")
        return torch.tensor([self._classes() if v is None else int(v) for v in values])

    @torch.no_grad()
    def _pictures(self, n: int, raw: Mapping[str, Any], size: tuple[int, ...]) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        if raw.get("control") is not None:
            control = raw["control"]
            out["control"] = _rows("control", control / 255 if control.dtype == torch.uint8 else control, n)
        if raw.get("channels") is not None:
            out["channels"] = _rows("channels", raw["channels"], n)
        elif raw.get("image") is not None:
            out["channels"] = _rows("image", self._masked(raw["image"], raw.get("mask"), size), n)
        if raw.get("image_prompt") is not None:
            given = self._image_prompts(raw["image_prompt"])
            out |= {name: _rows(name, v, n) for name, v in zip(self.net.image_prompts, given, strict=True)}
        return out

    def _masked(self, image: Tensor, mask: Tensor | None, size: tuple[int, ...]) -> Tensor:
        """Mask and code of the masked picture, as inpainting U-Nets read them; the plain code, unscaled, for InstructPix2Pix."""
        if follows_instructions(self.pipe) and mask is None:
            code = self.codec.encode(to_float(image))
            return code if getattr(self.pipe, "is_cosxl_edit", False) else code / self.codec.scale  # type: ignore[no-any-return]
        if mask is None or getattr(self.net, "extra", 0) != 1 + self.net.channels:
            raise InputError("image= goes with mask=, for an inpainting U-Net; others take channels= as they read them")
        mask = (mask.float() > 0.5).float()
        code = self.codec.encode(to_float(image) * (mask < 0.5))
        return torch.cat([interpolate(mask, code.shape[-2:]).expand(len(code), -1, -1, -1), code], 1)

    def _image_prompts(self, given: Any) -> list[Tensor]:
        """One each for the IP-Adapters that are loaded."""
        each = list(given) if isinstance(given, (list, tuple)) else [given]
        if len(each) != len(self.net.image_prompts):
            raise InputError(
                f"{len(each)} image prompts for {len(self.net.image_prompts)} IP-Adapters: give a list of one each"
            )
        if all(isinstance(v, Tensor) for v in each):
            return each
        if getattr(self.pipe, "image_encoder", None) is None:
            raise InputError("this pipeline has no image encoder: give image_prompt as embeddings (n, N, D)")
        found = self.pipe.prepare_ip_adapter_image_embeds(each, None, self.net.model.device, 1, False)
        return found  # type: ignore[no-any-return]


def follows_instructions(pipe: Any) -> bool:
    """Whether it is an InstructPix2Pix pipeline: its U-Net reads the code of a picture beside the state."""
    return type(pipe).__name__.endswith("InstructPix2PixPipeline")


def _rows(name: str, value: Tensor, n: int) -> Tensor:
    if len(value) not in (1, n):
        raise InputError(f"{len(value)} rows of {name} for {n} images: give one, or one an image")
    return value.expand(n, *value.shape[1:])


def _raw(net: Network) -> set[str]:
    reads = net.accepts
    out = set(reads) & {"label", "control", "channels", "image_prompt", "guidance", "size"}
    out |= {"image", "mask"} if "channels" in reads else set()
    return out | ({"original_size", "crop", "target_size"} if {"pooled", "size"} <= reads else set())


def _encoder(pipe: Any, net: Network) -> Encode | None:
    """Prompts to tensors by the pipeline's own ``encode_prompt``; None where there is no text encoder."""
    if "text" not in net.accepts or getattr(pipe, "text_encoder", None) is None:
        return None
    kind, device = type(net).__name__, net.model.device
    if not hasattr(pipe, "encode_prompt"):  # the first InstructPix2Pix pipeline
        old = getattr(pipe, "_encode_prompt", None)
        return None if old is None else lambda texts: {"text": old(texts, device, 1, False)}
    if kind == "SD3":
        return lambda texts: _named(
            pipe.encode_prompt(texts, None, None, device=device, do_classifier_free_guidance=False), 0, 2
        )
    if kind == "Flux":
        return lambda texts: _named(pipe.encode_prompt(texts, None, device=device), 0, 1)
    if kind == "PixArt":
        return lambda texts: _named(
            pipe.encode_prompt(texts, False, device=device, clean_caption=_can_clean()), 0, None, 1
        )
    if "pooled" in net.accepts:
        return lambda texts: _named(pipe.encode_prompt(texts, device=device, do_classifier_free_guidance=False), 0, 2)
    return lambda texts: _named(pipe.encode_prompt(texts, device, 1, False), 0)


def _named(found: Any, text: int, pooled: int | None = None, mask: int | None = None) -> dict[str, Tensor]:
    places = {"text": text, "pooled": pooled, "text_mask": mask}
    return {name: found[i] for name, i in places.items() if i is not None}


def _can_clean() -> bool:
    """PixArt cleans captions where these two packages are there."""
    from importlib.util import find_spec

    return find_spec("bs4") is not None and find_spec("ftfy") is not None
