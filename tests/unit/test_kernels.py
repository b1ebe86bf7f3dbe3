"""accelerated("onednn"): the same network to rounding, by other kernels, and the original as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sfumato as sf
from sfumato.core import Context
from sfumato.networks import products
from sfumato.networks.products import Linear


@pytest.mark.filterwarnings("ignore")
def test_a_transformer_of_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("diffusers")
    from sfumato.interop import tiny

    monkeypatch.setattr(products, "LEAST", 0)
    model = sf.from_diffusers(tiny.pipeline("dit", attention_head_dim=16))
    fast = model.accelerated("onednn")
    assert not any(isinstance(m, Linear) for m in model.denoiser.modules())
    assert sum(isinstance(m, Linear) for m in fast.denoiser.modules()) > 5
    ours, theirs = (dict(m.denoiser.named_parameters()) for m in (fast, model))
    assert all(ours[name] is theirs[name] for name in theirs)

    cond = model.conditions(2, label=[3, 7])
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    found = [m.denoiser(x, 0.5, Context(cond=cond, batch=2)).view("x0") for m in (model, fast)]
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)
    slopes = [torch.autograd.grad(f.square().sum(), x)[0] for f in found]
    torch.testing.assert_close(*slopes, atol=1e-3, rtol=1e-3)


def test_what_has_a_linear_layer_of_its_own_keeps_it() -> None:
    class Halved(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) / 2

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own, self.plain = Halved(3, 3), nn.Linear(3, 3)

        def forward(self, x: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
            return self.plain(self.own(x))

    denoiser = sf.parametrized(Net(), sf.processes.Flow(), "flow")
    fast = sf.acceleration.onednn()(denoiser)
    assert [type(m) for m in fast.net.children()] == [Halved, Linear]
    assert [type(m) for m in denoiser.net.children()] == [Halved, nn.Linear]
