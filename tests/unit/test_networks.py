"""Laws that every network obeys, and the budgets of the sizes that are meant to be bundled."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sfumato import networks
from sfumato.core.errors import InputError, UnknownName
from sfumato.networks.layers import Attention

TEXT = {"context_channels": 24, "vector_channels": 20}
CONDITIONS = {**TEXT, "embeddings": {"y": 5, "vendor": 3}, "scalars": {"target": 1000.0}}


def conditions(batch: int, image: tuple[int, ...] | None = None) -> dict[str, Tensor]:
    """A value for each condition of `CONDITIONS`."""
    mask = torch.arange(6) < torch.randint(0, 7, (batch, 1))
    values = {"text": torch.randn(batch, 6, 24), "text_mask": mask, "vector": torch.randn(batch, 20)}
    values |= {"y": torch.randint(0, 6, (batch,)), "vendor": torch.randint(0, 4, (batch,)), "target": torch.rand(batch)}
    return values if image is None else {**values, "image": torch.randn(batch, *image)}


def image_case(name: str, config: dict[str, Any], channels: int, size: int) -> tuple[str, dict, Callable]:
    config = {"channels": channels, "extra_channels": 2, **CONDITIONS, **config}

    def call(batch: int) -> tuple[tuple, dict]:
        return (torch.randn(batch, channels, size, size), torch.rand(batch)), conditions(batch, (2, size, size))

    return name, config, call


def no_conditions(*shape: int, label: bool = False) -> Callable:
    return lambda batch: ((torch.randn(batch, *shape), *([torch.rand(batch)] if label else [])), {})


def text_call(batch: int) -> tuple[tuple, dict]:
    values = conditions(batch)
    return (values["vector"], values["text"], values["text_mask"]), {}


def mlp_call(batch: int) -> tuple[tuple, dict]:
    cond = {k: v for k, v in conditions(batch).items() if k not in ("text", "text_mask")}
    return (torch.randn(batch, 2), torch.rand(batch)), cond


def latent_call(batch: int, *shape: int) -> tuple[tuple, dict]:
    return (torch.randn(batch, *(shape or (2,))), torch.rand(batch)), {"latent": torch.randn(batch, 5)}


def pairs_call(batch: int) -> tuple[tuple, dict]:
    return (*torch.randn(2, batch, 2), torch.rand(batch)), {}


MLP = {"channels": 2, "width": 16, "depth": 2, **{k: v for k, v in CONDITIONS.items() if k != "context_channels"}}
INNER = {"channels": 2, "width": 16, "depth": 2}
LATENT = {"net": {"name": "mlp", "config": {**INNER, "vector_channels": 8}}, "size": 5, "width": 8, "depth": 2}
INNER_UNET = {"channels": 3, "width": 16, "multipliers": (1,), "attention": False, "vector_channels": 8}
LATENT_UNET = {**LATENT, "net": {"name": "unet", "config": INNER_UNET}}
PAIRS = {"net": {"name": "mlp", "config": {**INNER, "channels": 4, "out_channels": 1}}}
ONE = {"width": 16, "multipliers": (1,), "attention": True}
CONV = {"width": 8, "embedding": 6, "labelled": True}
DIT = {"width": 32, "depth": 2, "heads": 2, "size": 8}
FLEX = {"width": 32, "heads": 2, "size": 8, "modules": ((1, 1, 1, 1),)}
VIT = {"width": 24, "depth": 2, "heads": 2, "labelled": True}
TOWER = {"vector_channels": 20, "context_channels": 24, "width": 24, "heads": 2, "depth": 1}
CASES: dict[str, tuple[str, dict, Callable]] = {
    "unet": image_case("unet", {"width": 16, "multipliers": (1, 2, 2), "blocks": (2, 1, 1), "patch": 2}, 3, 16),
    "unet-1": image_case("unet", {**ONE, "out_channels": 5}, 1, 5),
    "unet-head": image_case("unet", {**ONE, "head": "conditioned"}, 3, 4),
    "dit": image_case("dit", {**DIT, "patch": 2}, 4, 8),
    "dit-shared": image_case("dit", {**DIT, "patch": 1, "modulation": "shared"}, 4, 8),
    "flexdit": image_case("flexdit", {**FLEX, "patch": 1}, 4, 8),
    "mlp": ("mlp", MLP, mlp_call),
    "autoencoder": ("autoencoder-kl", {"factor": 4, "width": 16}, no_conditions(3, 8, 8)),
    "autoencoder-8": ("autoencoder-kl", {"channels": 1, "latent": 2, "width": 16}, no_conditions(1, 16, 16)),
    "discriminator": ("patch-discriminator", {"width": 8, "depth": 2}, no_conditions(3, 16, 16)),
    "conv-encoder": ("conv-encoder", CONV, no_conditions(3, 16, 16, label=True)),
    "vit-encoder": ("vit-encoder", VIT, no_conditions(3, 16, 16, label=True)),
    "text-tower": ("text-tower", TOWER, text_call),
    "mlp-octaves": ("mlp", {**MLP, "octaves": 3}, mlp_call),
    "latent": ("latent", LATENT, latent_call),
    "latent-unet": ("latent", LATENT_UNET, lambda batch: latent_call(batch, 3, 8, 8)),
    "pair-critic": ("pair-critic", PAIRS, pairs_call),
}  # fmt: skip
LOCAL = {"dual-encoder", "feature-critic", "subspace-score"}  # tested below, and in test_subspace.py
VECTORS = ("mlp", "mlp-octaves", "latent", "pair-critic", "text-tower")
ZERO_AT_START = [
    "unet",
    "unet-1",
    "unet-head",
    "dit",
    "dit-shared",
    "mlp",
    "mlp-octaves",
    "latent",
    "discriminator",
    "pair-critic",
]


def perturbed(net: nn.Module) -> nn.Module:
    """The network after one step in a random direction: what starts at 0 no longer is."""
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return net


def made(case: str, seed: int = 0, batch: int = 3) -> tuple[nn.Module, tuple, dict]:
    torch.manual_seed(seed)
    name, config, call = CASES[case]
    net = perturbed(networks.build(name, config)).eval()
    return net, *call(batch)


def cast(value: Any, to: Any) -> Any:
    return value.to(to) if isinstance(to, str) or value.is_floating_point() else value


def test_every_registered_network_has_a_case() -> None:
    assert {name for name, _, _ in CASES.values()} | LOCAL == set(networks.names())


@pytest.mark.parametrize("case", ZERO_AT_START)
def test_output_is_zero_at_the_start(case: str) -> None:
    name, config, call = CASES[case]
    args, cond = call(2)
    assert networks.build(name, config)(*args, **cond).abs().max() == 0


@pytest.mark.parametrize("case", CASES)
def test_item_does_not_depend_on_the_batch(case: str) -> None:
    net, args, cond = made(case)
    whole = net(*args, **cond)
    for i in range(3):
        alone = net(*(a[i : i + 1] for a in args), **{k: v[i : i + 1] for k, v in cond.items()})
        torch.testing.assert_close(alone[0], whole[i], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_config_and_weights_rebuild_the_function(case: str) -> None:
    net, args, cond = made(case)
    description = json.loads(json.dumps({"name": net.network_name, "config": net.config}))
    other = networks.as_network(description).eval()
    other.load_state_dict(load(save(net.state_dict())))
    assert torch.equal(other(*args, **cond), net(*args, **cond))
    assert other.config == net.config


@pytest.mark.parametrize("case", CASES)
def test_no_parameter_is_dead(case: str) -> None:
    net, args, cond = made(case)
    out = net(*args, **cond)
    (out * torch.randn_like(out)).sum().backward()
    dead = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert not dead


@pytest.mark.parametrize("case", CASES)
def test_precisions_agree_and_shapes_need_no_data(case: str) -> None:
    net, args, cond = made(case)
    single = net(*args, **cond)
    scale = single.abs().max().item()
    for dtype, bound in ((torch.float64, 1e-5), (torch.bfloat16, 0.1)):
        other, inputs = net.to(dtype), [cast(a, dtype) for a in args]
        if len(args) == 2 and dtype == torch.bfloat16:
            inputs[1] = args[1]  # a label in [0, 1] has too few digits in bfloat16; networks take it in float32
        out = other(*inputs, **{k: v if k == "target" else cast(v, dtype) for k, v in cond.items()})
        assert out.dtype == dtype
        assert (out.float() - single).abs().max().item() <= bound * scale
    with torch.device("meta"):
        shell = networks.build(net.network_name, net.config)
    out = shell(*(cast(a, "meta") for a in args), **{k: cast(v, "meta") for k, v in cond.items()})
    assert out.shape == single.shape and out.device.type == "meta"


@pytest.mark.parametrize("case", [c for c in CASES if c not in VECTORS])
def test_memory_format_does_not_matter(case: str) -> None:
    net, (x, *rest), cond = made(case)
    plain = net(x, *rest, **cond)
    last = net.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last), *rest, **cond)
    torch.testing.assert_close(last, plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", ["unet", "dit", "conv-encoder"])
def test_the_label_matters_in_any_range(case: str) -> None:
    net, (x, label), cond = made(case)
    assert not torch.allclose(net(x, label, **cond), net(x, label + 0.01, **cond))
    integers = networks.build(net.network_name, {**net.config, "scale": 1.0}).eval()
    integers.load_state_dict(net.state_dict())
    steps = torch.tensor([0, 400, 999])
    torch.testing.assert_close(integers(x, steps, **cond), net(x, steps / 1000, **cond), atol=1e-4, rtol=1e-4)


def test_unknown_names_and_arguments_are_refused() -> None:
    with pytest.raises(UnknownName, match="unet"):
        networks.build("u-net", {})
    with pytest.raises(InputError, match="channels"):
        networks.build("unet", {"channels": 3, "wide": True})
    with pytest.raises(InputError, match="name"):
        networks.as_network({"kind": "unet"})
    with pytest.raises(InputError, match="JSON"):
        networks.UNet(3, heads=torch.tensor(4))  # type: ignore[arg-type]


def cost(net: nn.Module, *args: Tensor, **cond: Tensor) -> float:
    """Multiply-accumulates of one call, in units of 1e9; runs on the meta device."""
    with FlopCounterMode(display=False) as counter:
        net(*args, **cond)
    return counter.get_total_flops() / 2e9


def test_bundled_sizes_keep_their_budget() -> None:
    with torch.device("meta"):
        text = {"text": torch.zeros(1, 16, 384), "vector": torch.zeros(1, 384)}
        reads = {"context_channels": 384, "vector_channels": 384, "embeddings": {"vendor": 3}}
        levels = {"multipliers": (1, 2, 2), "blocks": (3, 2, 1)}
        unet = networks.UNet(3, width=64, patch=2, embedding_width=128, **levels, **reads)
        dit = networks.DiT(4, size=8, patch=1, width=192, heads=3, mlp_ratio=3, modulation="shared", **reads)
        coder = networks.AutoencoderKL()
        label = torch.zeros(1)
        costs = [
            (unet, cost(unet, torch.zeros(1, 3, 32, 32), label, **text), 0.30),
            (dit, cost(dit, torch.zeros(1, 4, 8, 8), label, **text), 0.26),
            (coder, cost(coder.decoder, torch.zeros(1, 4, 8, 8)), 0.60),
        ]
    for net, spent, allowed in costs:
        assert 0.1 < spent <= allowed
        assert sum(p.numel() for p in net.parameters()) <= 5e6


def test_dual_encoder_scores_each_image_against_each_text() -> None:
    torch.manual_seed(0)
    image = networks.ConvEncoder(width=8, embedding=6)
    text = {"name": "text-tower", "config": {**TOWER, "embedding": 6}}
    net = networks.DualEncoder(image, text)
    values, images = conditions(4), torch.randn(4, 3, 16, 16)
    texts = {k: values[k] for k in ("vector", "text", "text_mask")}
    logits = net(images, **texts)
    cosine = torch.cosine_similarity(net.image(images)[:, None], net.text(*texts.values())[None], dim=-1)
    torch.testing.assert_close(logits, net.log_scale.exp() * cosine)
    other = networks.build("dual-encoder", net.config)
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(images, **texts), logits)
    assert other.image.config["width"] == 8


@pytest.mark.parametrize("case", ["conv-encoder", "vit-encoder", "text-tower"])
def test_embeddings_have_length_one_unless_asked_for_raw(case: str) -> None:
    net, args, _ = made(case)
    torch.testing.assert_close(net(*args).norm(dim=1), torch.ones(3))
    raw = networks.build(net.network_name, {**net.config, "normalise": False}).eval()
    raw.load_state_dict(net.state_dict())
    torch.testing.assert_close(torch.nn.functional.normalize(raw(*args)), net(*args))


@pytest.mark.parametrize("name", ["conv-encoder", "vit-encoder"])
def test_a_label_is_given_exactly_when_it_is_read(name: str) -> None:
    x, label = torch.randn(1, 3, 16, 16), torch.zeros(1)
    with pytest.raises(InputError, match="labelled=True"):
        networks.build(name, {"labelled": True})(x)
    with pytest.raises(InputError, match="labelled=False"):
        networks.build(name, {})(x, label)


def test_perceptual_distance_is_a_distance_of_directions() -> None:
    class Pixels(nn.Module):
        def features(self, x: Tensor) -> list[Tensor]:
            return [x, nn.functional.avg_pool2d(x, 2)]

    torch.manual_seed(0)
    a, b = torch.randn(2, 4, 3, 8, 8)
    distance = networks.perceptual_distance(Pixels(), a, b)
    cosine = [
        torch.cosine_similarity(p, q).flatten(1)
        for p, q in zip(Pixels().features(a), Pixels().features(b), strict=True)
    ]
    # |u - v|^2 = 2 - 2 cos for unit vectors
    torch.testing.assert_close(distance, sum((2 - 2 * c).mean(1) for c in cosine))
    torch.testing.assert_close(networks.perceptual_distance(Pixels(), 3 * a, b), distance)
    assert networks.perceptual_distance(Pixels(), a, a).abs().max() < 1e-9


@pytest.mark.parametrize("case", ["conv-encoder", "vit-encoder", "discriminator"])
def test_encoders_and_discriminators_show_their_feature_maps(case: str) -> None:
    net, args, _ = made(case)
    maps = net.features(*args)
    assert len(maps) >= 2 and all(m.ndim == 4 and len(m) == 3 for m in maps)
    assert networks.perceptual_distance(lambda_features(net, args[1:]), args[0], -args[0]).min() > 0


def lambda_features(net: nn.Module, rest: tuple) -> Any:
    class Bound:
        def features(self, x: Tensor) -> list[Tensor]:
            return net.features(x, *rest)

    return Bound()


@pytest.mark.parametrize("case", ["unet", "dit", "dit-shared", "vit-encoder", "text-tower"])
def test_explicit_attention_equals_fused(case: str) -> None:
    net, args, cond = made(case)
    fused = net(*args, **cond)
    for module in net.modules():
        if isinstance(module, Attention):
            module.explicit = True
    torch.testing.assert_close(net(*args, **cond), fused, atol=2e-6, rtol=2e-5)


def test_mlp_treats_middle_positions_alike() -> None:
    net, (x, label), cond = made("mlp")
    points = torch.randn(3, 4, 5, 2)
    whole = net(points, label, **cond)
    torch.testing.assert_close(whole[:, 2, 1], net(points[:, 2, 1], label, **cond))
    with pytest.raises(InputError, match="batch"):
        net(torch.randn(3, 3), label)


def test_a_latent_has_only_a_direction_and_is_asked_for() -> None:
    net, (x, label), cond = made("latent")
    said = net(x, label, **cond)
    torch.testing.assert_close(net(x, label, latent=7 * cond["latent"]), said)
    assert (net(x, label, latent=-cond["latent"]) - said).abs().max() > 1e-4
    for wrong in ({}, {"latent": cond["latent"][:, :3]}):
        with pytest.raises(InputError, match="latent"):
            net(x, label, **wrong)
    with pytest.raises(InputError, match="vector_channels"):
        networks.build("latent", {**LATENT, "net": {"name": "mlp", "config": INNER}})


def test_octaves_are_sinusoids_of_doubling_frequency() -> None:
    x = torch.tensor([[0.3, -0.2]])
    waves = networks.MLP(2, octaves=3)._waves(x)[0]
    angles = [k * v for v in (0.3, -0.2) for k in (1, 2, 4)]
    expected = [0.3, -0.2, *map(math.sin, angles), *map(math.cos, angles)]
    torch.testing.assert_close(waves, torch.tensor(expected))
    with pytest.raises(InputError, match="octaves"):
        networks.MLP(1, octaves=-1)


def test_critics_know_pairs_and_levels_of_noise() -> None:
    net, (low, high, label), _ = made("pair-critic")
    assert (net(low, high, label) - net(high, low, label)).abs().max() > 1e-5
    with pytest.raises(InputError, match="alike"):
        net(low, high[:, :1], label)
    torch.manual_seed(0)
    maps = [torch.randn(3, 6, 4, 4), torch.randn(3, 4, 2, 2)]
    aware = perturbed(networks.FeatureCritic([6, 4], width=16))
    blind = networks.build("feature-critic", {**aware.config, "aware": False})
    blind.load_state_dict(aware.state_dict())
    assert (aware(maps, label) - aware(maps, label + 0.3)).abs().max() > 1e-5
    torch.testing.assert_close(blind(maps, label), blind(maps, label + 0.3))
    torch.testing.assert_close(aware(maps, label)[1:2], aware([m[1:2] for m in maps], label[1:2]))
    assert networks.FeatureCritic([6, 4])(maps, label).abs().max() == 0
    with pytest.raises(InputError, match="heads"):
        aware(maps[:1], label)
