"""A network that reads one more scalar, starting as it was; and the same network once that scalar is settled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from sfumato.core.errors import InputError
from sfumato.networks.base import build


def with_scalars(net: Any, scalars: Mapping[str, float]) -> Any:
    """A copy that also reads these scalar conditions, name -> scale; without effect until it is trained.

    Raises InputError for a network without a ``scalars`` argument (`UNet` and `DiT` have one), and for a name it reads.
    """
    config = getattr(net, "config", {})
    if "scalars" not in config:
        raise InputError(
            f"{type(net).__name__} takes no scalar conditions: use a network of the library, 'unet' or 'dit'"
        )
    taken = set(scalars) & set(net.accepts)
    if taken:
        raise InputError(f"the network reads {sorted(taken)} already")
    wider = build(net.network_name, {**config, "scalars": {**(config["scalars"] or {}), **scalars}})
    wider.load_state_dict({**wider.state_dict(), **net.state_dict()})
    return wider.train(net.training)


@torch.no_grad()
def settled(net: Any, name: str, value: float) -> Any:
    """The network without the scalar condition ``name``, as it is where that is ``value``: an ordinary one again.

    A scalar's embedding is added to the label's, so its constant goes into the label's last bias. Raises InputError
    where the network reads no such scalar.
    """
    scalars = dict(getattr(net, "config", {}).get("scalars") or {})
    if name not in scalars:
        raise InputError(f"the network reads no scalar {name!r}; it reads {sorted(scalars) or 'none'}")
    scalars.pop(name)
    plain = build(net.network_name, {**net.config, "scalars": scalars or None})
    own = plain.state_dict()
    plain.load_state_dict({k: v for k, v in net.state_dict().items() if k in own})
    embedding: nn.Module = net.get_submodule(f"conditioning.scalars.{name}")
    weight = next(embedding.parameters())
    constant = embedding(torch.full((1,), value, dtype=weight.dtype, device=weight.device))[0]
    label: Any = plain.to(weight.device).get_submodule("conditioning.label.second")
    label.bias.add_(constant)
    return plain.train(net.training)
