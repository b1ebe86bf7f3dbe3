"""A network of the same kind with fewer channels."""

from __future__ import annotations

import math
from typing import Any

import torch

from sfumato.core import InputError
from sfumato.networks import build

SAME = (
    "caption_projection_dim",
    "cross_attention_dim",
)  # of diffusers' transformers: the inner width where they equal it


def slimmed(net: Any, share: float, seed: int = 0) -> Any:
    """A fresh network like ``net`` with about ``share`` of its channels; depth, heads and all it reads stay.

    Networks of the library: ``width`` is multiplied, to a multiple of 8 and of 4 times the heads. Models of diffusers: U-Nets have
    that share of each of ``block_out_channels``, transformers of their heads. Raises InputError for any other network, and
    where nothing smaller fits.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if "width" in getattr(net, "config", {}):
            return build(net.network_name, _narrow(dict(net.config), share)).train(net.training)
        if hasattr(net, "model") and hasattr(net.model, "from_config"):
            if getattr(net, "control", None) is not None:
                raise InputError("a model with a ControlNet beside it has no smaller network: leave the ControlNet out")
            model = type(net.model).from_config(_narrow_diffusers(dict(net.model.config), share))
            return type(net)(model).train(net.training)
    raise InputError(f"no smaller {type(net).__name__} is known: use 'unet', 'dit', 'mlp' or a model of diffusers")


def _narrow(config: dict[str, Any], share: float) -> dict[str, Any]:
    """The configuration of a network of the library, its widths multiplied."""
    unit = math.lcm(8, 4 * (config.get("heads") or 1))
    for name in ("width", "embedding_width", "context_width"):
        if config.get(name):
            config[name] = _rounded(config[name], share, unit)
    return config


def _narrow_diffusers(config: dict[str, Any], share: float) -> dict[str, Any]:
    """The configuration of a model of diffusers: fewer channels a block, or fewer heads."""
    if "block_out_channels" in config:
        heads = config.get("num_attention_heads") or config.get("attention_head_dim") or 1
        heads = heads if isinstance(heads, int) else math.lcm(*heads)
        unit = math.lcm(config.get("norm_num_groups") or 1, heads)
        return {**config, "block_out_channels": [_rounded(w, share, unit) for w in config["block_out_channels"]]}
    if "num_attention_heads" not in config:
        raise InputError("this model says neither block_out_channels nor num_attention_heads: its width is not known")
    heads, head = config["num_attention_heads"], config["attention_head_dim"]
    fewer = _rounded(heads, share, 1)
    same = {name: fewer * head for name in SAME if config.get(name) == heads * head}
    return {**config, "num_attention_heads": fewer, **same}


def _rounded(width: int, share: float, unit: int) -> int:
    """The multiple of ``unit`` nearest to that share, at least one unit. InputError where it is not smaller."""
    made = max(1, round(width * share / unit)) * unit
    if made > width:
        raise InputError(f"a width of {width} has no smaller multiple of {unit}")
    return made


__all__ = ["slimmed"]
