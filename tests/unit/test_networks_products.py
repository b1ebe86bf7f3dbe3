"""Linear layers by oneDNN are linear layers: values, all derivatives, transforms, counted operations, and nothing left behind."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sfumato.networks import products
from sfumato.networks.products import Linear, fast_products, linear
from sfumato.objectives import Denoising
from sfumato.processes import Flow
from sfumato.training import Trainer

CLOSE = {"atol": 2e-5, "rtol": 2e-5}


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small products run in the kernel too."""
    monkeypatch.setattr(products, "LEAST", 0)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, always: None) -> list[torch.Size]:
    """The shapes that went to the kernel."""
    if products._KERNEL is None:
        pytest.skip("this torch has no such kernel")
    seen, kernel = [], products._times

    def watched(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        seen.append(x.shape)
        return kernel(x, weight, bias)

    monkeypatch.setattr(products, "_times", watched)
    return seen


def given(*shape: int, out: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return tuple(torch.randn(s, generator=g, requires_grad=True) for s in (shape, (out, shape[-1]), (out,)))  # type: ignore[return-value]


@pytest.mark.parametrize("shape", [(4, 9, 12), (1, 1, 1), (2, 3, 5, 8)])
@pytest.mark.parametrize("biased", [True, False])
def test_values_and_first_and_second_derivatives(shape: tuple[int, ...], biased: bool, calls: list[torch.Size]) -> None:
    x, weight, bias = given(*shape)
    inputs = (x, weight, bias) if biased else (x, weight)
    torch.testing.assert_close(linear(*inputs), F.linear(*inputs), **CLOSE)
    assert calls and linear(*inputs).is_contiguous()

    def derivatives(function: Callable[..., Tensor]) -> list[Tensor]:
        first = torch.autograd.grad(function(*inputs).tanh().square().sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(d.square().sum() for d in first), inputs)
        return [*first, *second]

    for ours, theirs in zip(derivatives(linear), derivatives(F.linear), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)


def test_transposed_and_sliced_tokens(calls: list[torch.Size]) -> None:
    whole, weight, bias = given(4, 12, 18)
    for x in (whole.transpose(1, 2)[..., :12], whole[:, ::2, 3:15], whole[:1, :, :12].expand(3, -1, -1)):
        square = weight[:, : x.shape[-1]]
        torch.testing.assert_close(linear(x, square, bias), F.linear(x, square, bias), **CLOSE)
    assert len(calls) == 3


@pytest.mark.parametrize("moving", [(0,), (1,), (2,), (0, 1, 2)])
def test_forward_mode(moving: tuple[int, ...], calls: list[torch.Size]) -> None:
    inputs = given(3, 5, 6)
    found = []
    for function in (linear, F.linear):
        with forward_ad.dual_level():
            duals = [
                forward_ad.make_dual(v, torch.ones_like(v) * (k + 1)) if k in moving else v
                for k, v in enumerate(inputs)
            ]
            found.append(forward_ad.unpack_dual(function(*duals)).tangent)
    torch.testing.assert_close(*found, **CLOSE)
    assert calls


def test_transforms_types_and_vectors_run_as_always(calls: list[torch.Size]) -> None:
    x, weight, bias = given(3, 5, 6)
    jacobian = torch.func.jacrev(lambda v: linear(v, weight, bias).sum(1))(x.detach())
    torch.testing.assert_close(jacobian, torch.func.jacfwd(lambda v: linear(v, weight, bias).sum(1))(x.detach()))
    torch.testing.assert_close(torch.vmap(lambda v: linear(v, weight, bias))(x[None])[0], F.linear(x, weight, bias))
    assert torch.equal(linear(x[0], weight, bias), F.linear(x[0], weight, bias))
    double = [v.double() for v in (x, weight, bias)]
    assert torch.equal(linear(*double), F.linear(*double))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight, bias).dtype == torch.bfloat16
    assert linear(x.to("meta"), weight.to("meta")).shape == (3, 5, 7)
    assert not calls


def test_small_products_are_left_alone() -> None:
    x, weight, bias = given(3, 5, 6)
    assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))


def test_operations_are_counted(always: None) -> None:
    x, weight, bias = given(3, 5, 6)
    counts = []
    for function in (linear, F.linear):
        with FlopCounterMode(display=False) as counter:
            function(x, weight, bias).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == 3 * 2 * 15 * 6 * 7


def test_layers_of_any_network_and_back(calls: list[torch.Size]) -> None:
    class Own(nn.Linear):
        pass

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), Own(8, 8), nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True))
    x, before = torch.randn(2, 5, 6), copy.deepcopy(net.state_dict())
    want = net(x)
    seen: list[int] = []
    net[0].register_forward_hook(lambda *_: seen.append(1))
    with pytest.raises(KeyError), fast_products(net):
        assert type(net[0]) is Linear and type(net[1]) is Own
        torch.testing.assert_close(net(x), want, **CLOSE)
        raise KeyError
    assert type(net[0]) is nn.Linear and len(calls) == 3 and seen == [1]  # attention's own layers are not called
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_a_training_runs_them_and_gives_plain_networks_back(calls: list[torch.Size]) -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: Tensor, label: Tensor) -> Tensor:
            return self.inner(x)

    from sfumato.denoisers import parametrized

    objective = Denoising(parametrized(Tokens(), Flow(), "flow"))
    fitted = Trainer(objective, lambda it: {"x": torch.ones(2, 3, 4)}, steps=2, cpu=True).fit()
    assert calls
    for module in (objective, *fitted.values()):
        assert all(type(m) is not Linear for m in module.modules())
