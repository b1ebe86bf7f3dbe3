"""diffusers models as networks ``net(x, label, **conditions) -> prediction``.

The model stays itself, as the submodule ``model``: taps name its parts ("model.mid_block"), LoRA put into it by
diffusers or peft acts, and it runs in its own dtype while the state keeps the dtype of the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sfumato.core import InputError


class Network(nn.Module):
    """Base of the adapters. ``accepts`` names the conditions it reads, ``channels`` counts those of the state.

    An output of twice the channels (a learned variance) is cut to its first half.
    """

    factor: ClassVar[int] = 1  # the sides of a state must be multiples of it
    casts: ClassVar[bool] = True  # to its own dtype: states need not be as coarse as a half-precision model
    image_prompts: tuple[str, ...] = ()  # the conditions of IP-Adapters

    def __init__(self, model: nn.Module, channels: int, accepts: Sequence[str]) -> None:
        super().__init__()
        self.model: Any = model
        self.channels, self.accepts = channels, frozenset(accepts)

    def forward(self, x: Tensor, label: Tensor, /, **cond: Any) -> Tensor:
        """The prediction (B, channels, H, W)."""
        dtype = next(p.dtype for p in self.model.parameters() if p.is_floating_point())  # model.dtype walks all of it
        given = {k: _moved(v, x.device, dtype) for k, v in cond.items()}
        out = self.predict(x.to(dtype), label, given)
        return (out[:, : self.channels] if out.shape[1] == 2 * self.channels else out).to(x.dtype)

    def predict(self, x: Tensor, label: Tensor, cond: dict[str, Any]) -> Tensor:
        """The model's own call."""
        raise NotImplementedError(f"{type(self).__name__} must call its model")


class UNet(Network):
    """UNet2DModel: ``label`` (B,) where it has classes, ``channels`` (B, C, H, W) where it reads more than the state."""

    def __init__(self, model: Any) -> None:
        channels, extra, learned = _widths(model.config)
        classes = model.config.class_embed_type is not None or model.config.num_class_embeds is not None
        super().__init__(model, channels, (*(["label"] if classes else []), *(["channels"] if extra else [])))
        self.extra, self.learned = extra, learned

    def predict(self, x: Tensor, label: Tensor, cond: dict[str, Any]) -> Tensor:
        return self.model(_joined(self, x, cond), label, class_labels=cond.get("label"), return_dict=False)[0]  # type: ignore[no-any-return]


class TextUNet(Network):
    """UNet2DConditionModel, with a ControlNet beside it if given.

    text (B, L, D); pooled (B, D) and size (B, 6) of SDXL; channels (B, C, h, w) of inpainting and edit models;
    image_prompt (B, N, D) of an IP-Adapter, image_prompt_2, ... of further ones; control (B, 3, H, W) in [0, 1] of a ControlNet, weighed by ``strength``;
    label (B,) of class-conditional ones.
    """

    def __init__(self, model: Any, control: Any = None, strength: float = 1.0) -> None:
        config = model.config
        channels, extra, learned = _widths(config)
        if config.get("time_cond_proj_dim") is not None:
            raise InputError(
                "this U-Net was distilled to read a guidance scale (time_cond_proj_dim): it cannot be carried"
            )
        kind, known = config.get("addition_embed_type"), (None, "text_time")
        if kind not in known:
            raise InputError(f"this U-Net reads {kind!r} embeddings, which cannot be carried; {known[1]!r} (SDXL) can")
        adapter = getattr(config, "encoder_hid_dim_type", None)  # an IP-Adapter sets the attribute, not the entry
        if adapter not in (None, "text_proj", "ip_image_proj"):
            raise InputError(f"this U-Net projects its text by {adapter!r}, which cannot be carried")
        several = len(getattr(getattr(model, "encoder_hid_proj", None), "image_projection_layers", ()))
        prompts = image_prompts(max(1, several) if adapter == "ip_image_proj" else 0)
        if control is not None and type(control).__name__ != "ControlNetModel":
            raise InputError(f"a {type(control).__name__} cannot be carried; one ControlNetModel can")
        reads = {
            "text": config.cross_attention_dim is not None, "pooled": kind == "text_time", "size": kind == "text_time",
            "channels": extra, **dict.fromkeys(prompts, True), "control": control is not None,
            "label": config.get("class_embed_type") is not None or config.get("num_class_embeds") is not None,
        }  # fmt: skip
        super().__init__(model, channels, [name for name, read in reads.items() if read])
        self.control, self.strength, self.extra, self.learned = control, strength, extra, learned
        self.image_prompts = prompts

    def predict(self, x: Tensor, label: Tensor, cond: dict[str, Any]) -> Tensor:
        added = {k: cond[v] for k, v in (("text_embeds", "pooled"), ("time_ids", "size")) if v in cond}
        more: dict[str, Any] = {"class_labels": cond.get("label")}
        if "control" in self.accepts:
            down, mid = self._controlled(x, label, cond, added)
            more |= {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        if self.image_prompts:
            added["image_embeds"] = [_there(cond, name, "an IP-Adapter is loaded") for name in self.image_prompts]
        out = self.model(
            _joined(self, x, cond), label, encoder_hidden_states=cond.get("text"), added_cond_kwargs=added or None,
            return_dict=False, **more,
        )  # fmt: skip
        return out[0]  # type: ignore[no-any-return]

    def _controlled(self, x: Tensor, label: Tensor, cond: dict[str, Any], added: dict[str, Any]) -> Any:
        return self.control(
            x, label, encoder_hidden_states=cond.get("text"), conditioning_scale=self.strength, return_dict=False,
            controlnet_cond=_there(cond, "control", "a ControlNet is loaded"), added_cond_kwargs=added or None,
        )  # fmt: skip


def image_prompts(count: int) -> tuple[str, ...]:
    """The names of the conditions that so many IP-Adapters read."""
    return tuple(f"image_prompt_{i + 1}" if i else "image_prompt" for i in range(count))


class SD3(Network):
    """SD3Transformer2DModel: text (B, L, D), pooled (B, D); labels are 1000 sigma."""

    def __init__(self, model: Any) -> None:
        super().__init__(model, model.config.out_channels, ("text", "pooled"))
        self.factor = model.config.patch_size  # type: ignore[misc]

    def predict(self, x: Tensor, label: Tensor, cond: dict[str, Any]) -> Tensor:
        return self.model(  # type: ignore[no-any-return]
            hidden_states=x, timestep=label, encoder_hidden_states=cond["text"], pooled_projections=cond["pooled"],
            return_dict=False,
        )[0]  # fmt: skip


class Flux(Network):
    """FluxTransformer2DModel: text (B, L, D), pooled (B, D), guidance (B,) where it was distilled to read a scale.

    The state is the latent (B, C, h, w) itself; patches of 2 x 2 are packed into tokens around the call.
    """

    def __init__(self, model: Any) -> None:
        reads = ("text", "pooled", *(["guidance"] if model.config.guidance_embeds else []))
        super().__init__(model, model.config.in_channels // 4, reads)
        self.factor = 2  # type: ignore[misc]

    def predict(self, x: Tensor, label: Tensor, cond: dict[str, Any]) -> Tensor:
        b, c, h, w = x.shape
        tokens = x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, c * 4)
        rows, columns = torch.arange(h // 2, device=x.device), torch.arange(w // 2, device=x.device)
        places = torch.zeros(h // 2, w // 2, 3, device=x.device, dtype=x.dtype)
        places[..., 1], places[..., 2] = rows[:, None], columns[None]
        out = self.model(
            hidden_states=tokens, timestep=label.to(x.dtype) / 1000, guidance=cond.get("guidance"),
            pooled_projections=cond["pooled"], encoder_hidden_states=cond["text"],
            txt_ids=torch.zeros(cond["text"].shape[1], 3, device=x.device, dtype=x.dtype), img_ids=places.view(-1, 3),
            return_dict=False,
        )[0]  # fmt: skip
        return out.view(b, h // 2, w // 2, c, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, c, h, w)  # type: ignore[no-any-return]


class PixArt(Network):
    """PixArtTransformer2DModel: text (B, L, D), text_mask (B, L), and size (B, 2), aspect (B, 1) of the 1024-pixel one."""

    def __init__(self, model: Any) -> None:
        sized = ("size", "aspect") if model.config.sample_size == 128 else ()
        super().__init__(model, model.config.in_channels, ("text", "text_mask", *sized))
        self.factor = model.config.patch_size  # type: ignore[misc]

    def predict(self, x: Tensor, label: Tensor, cond: dict[str, Any]) -> Tensor:
        return self.model(  # type: ignore[no-any-return]
            x, encoder_hidden_states=cond["text"], encoder_attention_mask=cond["text_mask"], timestep=label,
            added_cond_kwargs={"resolution": cond.get("size"), "aspect_ratio": cond.get("aspect")}, return_dict=False,
        )[0]  # fmt: skip


class DiT(Network):
    """DiTTransformer2DModel: label (B,), the number of classes itself being no class."""

    def __init__(self, model: Any) -> None:
        super().__init__(model, model.config.in_channels, ("label",))
        self.factor = model.config.patch_size  # type: ignore[misc]

    def predict(self, x: Tensor, label: Tensor, cond: dict[str, Any]) -> Tensor:
        return self.model(x, timestep=label, class_labels=cond["label"], return_dict=False)[0]  # type: ignore[no-any-return]


NETWORKS: dict[str, type[Network]] = {
    "UNet2DModel": UNet, "UNet2DConditionModel": TextUNet, "SD3Transformer2DModel": SD3,
    "FluxTransformer2DModel": Flux, "PixArtTransformer2DModel": PixArt, "DiTTransformer2DModel": DiT,
}  # fmt: skip


def network(model: Any, control: Any = None, strength: float = 1.0) -> Network:
    """The adapter of a diffusers model. Raises InputError for a class, or an option of it, that cannot be carried."""
    name = next((c.__name__ for c in type(model).__mro__ if c.__name__ in NETWORKS), None)
    if name is None:
        raise InputError(f"a {type(model).__name__} cannot be carried; {', '.join(NETWORKS)} can")
    if name == "UNet2DConditionModel":
        return TextUNet(model, control, strength)
    if control is not None:
        raise InputError(f"a ControlNet beside a {name} cannot be carried; beside a UNet2DConditionModel it can")
    return NETWORKS[name](model)  # type: ignore[call-arg]


def _widths(config: Any) -> tuple[int, int, bool]:
    """(channels of the state, channels read beside it, whether a variance is predicted too)."""
    into, out = config.in_channels, config.out_channels
    return (into, 0, True) if out == 2 * into else (out, into - out, False)


def _joined(net: Any, x: Tensor, cond: dict[str, Any]) -> Tensor:
    if not net.extra:
        return x
    extra = _there(cond, "channels", f"this U-Net reads {net.extra} channels beside the state")
    if extra.shape[1] != net.extra:
        raise InputError(f"channels of shape {tuple(extra.shape)}: this U-Net reads {net.extra} beside the state")
    return torch.cat([x, extra], 1)


def _moved(value: Any, device: Any, dtype: torch.dtype) -> Any:
    """A condition where the state is: classes and masks keep their type."""
    if not isinstance(value, Tensor):
        return value
    return value.to(device, dtype if value.is_floating_point() else None)


def _there(cond: dict[str, Any], name: str, why: str) -> Tensor:
    if name not in cond:
        raise InputError(f"{why}: give the condition {name!r}")
    return cond[name]  # type: ignore[no-any-return]
