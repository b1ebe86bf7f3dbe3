"""Adapters: the identity at zero, merging as injecting, low-rank differences recovered, and other tools' key names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sfumato import networks
from sfumato.core import InputError
from sfumato.denoisers import lora


class Net(nn.Module):
    """Linear layers and convolutions, one of them strided and one in groups."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.block = nn.ModuleDict({"to_q": nn.Linear(8, 6, bias=False), "out": nn.Linear(6, 5)})

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.grouped(self.first(x)).mean((2, 3))
        return self.block["out"](torch.tanh(self.block["to_q"](hidden)))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().double()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def trained(net: nn.Module, rank: int = 2, seed: int = 3, **options: Any) -> Any:
    """An injected network whose adapters are no longer zero."""
    adapted = lora.inject(net, rank, seed=seed, **options)
    generator = torch.Generator().manual_seed(seed)
    for name, p in adapted.named_parameters():
        if name.endswith("up"):
            p.data.normal_(generator=generator, std=0.3)
    return adapted


def test_a_new_adapter_changes_nothing_and_only_it_is_trained(net: Net, x: Tensor) -> None:
    adapted = lora.inject(net, 2)
    assert torch.equal(adapted(x), net(x))
    trainable = {n for n, p in adapted.named_parameters() if p.requires_grad}
    assert trainable == {f"{layer}.{part}" for layer in ("first", "block.to_q", "block.out") for part in ("down", "up")}
    assert all(p.requires_grad for p in net.parameters())
    assert adapted.first.base.weight.data_ptr() == net.first.weight.data_ptr()
    adapted(x).square().sum().backward()
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("kind", ["dit", "unet"])
def test_networks_that_read_text_take_adapters_in_all_their_layers(kind: str) -> None:
    """Blocks ask their linear layers for widths, which an adapted layer says as the layer in it does."""
    sizes = {
        "dit": {"size": 4, "patch": 1, "width": 32, "depth": 2, "heads": 2},
        "unet": {"width": 8, "multipliers": (1, 2), "attention": True},
    }
    torch.manual_seed(0)
    made = networks.build(kind, {"channels": 3, "context_channels": 6, "vector_channels": 5, **sizes[kind]}).eval()
    told = {"text": torch.randn(2, 4, 6), "text_mask": torch.ones(2, 4, dtype=torch.bool), "vector": torch.randn(2, 5)}
    given = torch.randn(2, 3, 4, 4), torch.tensor([0.2, 0.7])
    adapted = lora.inject(made, 2)
    torch.testing.assert_close(adapted(*given, **told), made(*given, **told))
    assert sum(isinstance(m, lora.Adapted) for m in adapted.modules()) > 8


def test_merging_is_injecting_and_leaves_the_base_alone(net: Net, x: Tensor) -> None:
    before = {k: v.clone() for k, v in net.state_dict().items()}
    adapted = trained(net, alpha=5.0)
    merged = lora.merge(adapted)
    torch.testing.assert_close(merged(x), adapted(x))
    assert not torch.allclose(merged(x), net(x))
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in before.items())
    assert set(merged.state_dict()) == set(net.state_dict())
    unmerged = lora.merge(merged, lora.extract(adapted), -1.0)
    assert (unmerged(x) - net(x)).abs().max() < 1e-12


def test_a_low_rank_difference_is_recovered(net: Net, x: Tensor) -> None:
    tuned = lora.merge(trained(net, rank=2))
    found = lora.difference(net, tuned, rank=2)
    torch.testing.assert_close(lora.merge(net, found)(x), tuned(x))
    nearer = [
        float((lora.merge(net, lora.difference(net, tuned, rank=r)).first.weight - tuned.first.weight).detach().norm())
        for r in (1, 2)
    ]
    assert nearer[1] < 1e-10 < nearer[0]


def test_combining_adds_the_differences(net: Net) -> None:
    a, b = (lora.extract(trained(net, rank=r, seed=s)) for r, s in ((2, 3), (3, 4)))
    both = lora.combine(net, {a: 0.7, b: -0.4})
    for path in ("first", "block.to_q"):
        wanted = net.get_submodule(path).weight + 0.7 * a.layers[path].difference() - 0.4 * b.layers[path].difference()
        torch.testing.assert_close(both.get_submodule(path).weight, wanted)
    twice = lora.combine(lora.combine(net, {a: 0.5}), {a: 0.5})
    torch.testing.assert_close(twice.first.weight, lora.combine(net, {a: 1.0}).first.weight)


@pytest.mark.parametrize("style", lora.STYLES)
def test_files_have_the_key_names_of_other_tools(net: Net, x: Tensor, style: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    adapter = lora.extract(trained(net.float(), alpha=5.0))
    path = adapter.save(tmp_path / "adapter.safetensors", style)
    keys = set(load_file(path))
    wanted = {
        "diffusers": {"unet.block.to_q.lora_A.weight", "unet.block.to_q.lora_B.weight"},
        "kohya": {
            "lora_unet_block_to_q.lora_down.weight",
            "lora_unet_block_to_q.lora_up.weight",
            "lora_unet_block_to_q.alpha",
        },
    }[style]
    assert wanted <= keys
    again = lora.load(path, net)
    torch.testing.assert_close(lora.merge(net, again)(x.float()), lora.merge(net, adapter)(x.float()))


def test_adapters_of_another_network_are_refused_by_name(net: Net, tmp_path: Path) -> None:
    adapter = lora.extract(trained(net))
    other = Net().double()
    other.block["to_q"] = nn.Linear(8, 7, bias=False)
    with pytest.raises(InputError, match=r"block\.to_q"):
        lora.merge(other, adapter)
    path = adapter.save(tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="no layer"):
        lora.load(path, nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(InputError, match="no linear layer"):
        lora.inject(net, 2, targets="nowhere")
    with pytest.raises(InputError, match="no adapter"):
        lora.extract(net)


def test_the_file_is_one_that_peft_reads(net: Net, x: Tensor, tmp_path: Path) -> None:
    """Keys and factors as PEFT: its own layers with our tensors compute the same."""
    peft = pytest.importorskip("peft")
    from safetensors.torch import load_file

    adapter = lora.extract(trained(net.float(), rank=2, targets="block"))
    tensors = load_file(adapter.save(tmp_path / "a.safetensors"))
    torch.manual_seed(0)
    base = Net().double().float()
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "out"])
    model = peft.inject_adapter_in_model(config, base)
    peft.set_peft_model_state_dict(model, {k.removeprefix("unet."): v for k, v in tensors.items()})
    torch.testing.assert_close(model(x.float()), lora.merge(net, adapter)(x.float()))
