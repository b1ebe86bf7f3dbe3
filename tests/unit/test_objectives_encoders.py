"""Autoencoding and contrastive objectives against their formulas, and that they learn."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sfumato import networks
from sfumato.core import Context, InputError, Run
from sfumato.networks import AutoencoderKL, ConvEncoder, PatchDiscriminator
from sfumato.objectives import Autoencoding, Contrastive
from sfumato.training import Trainer


def images(n=4, size=16, seed=0):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def codec(seed=0):
    torch.manual_seed(seed)
    return AutoencoderKL(factor=4, width=8, patch=2, decoder_blocks=1, attention=False)


def critic(seed=1):
    torch.manual_seed(seed)
    net = PatchDiscriminator(width=8, depth=2)
    nn.init.normal_(net.output.weight, std=0.1)  # it starts at 0
    return net


def features(seed=2):
    torch.manual_seed(seed)
    return ConvEncoder(width=8, multipliers=(1, 2))


def run(objective, x, player="codec", step=0, seed=0):
    return objective({"x": x}, Context.of(len(x), seed, run=Run(step=step)), player)


# ------------------------------------------------------------------ autoencoding


def test_the_loss_is_its_formula():
    """Every term written out with the noise of the context's streams, KL by torch.distributions."""
    x, net, by = images(), codec(), features()
    loss = run(Autoencoding(net, perceptual_by=by, perceptual=0.3, kl=0.01), x)
    moments = net.encode(x)
    posterior = torch.distributions.Normal(moments.mean, (0.5 * moments.logvar).exp())
    noise = Context.of(4, 0).rng.normal(moments.mean)
    y = net.decode(posterior.mean + posterior.stddev * noise)
    kl = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).flatten(1).sum(1)
    cosine = sum(
        (2 - 2 * F.cosine_similarity(a, b, dim=1)).mean((1, 2))
        for a, b in zip(by.features(x), by.features(y), strict=True)
    )
    expected = (x - y).abs().mean() + 0.01 * kl.mean() / x[0].numel() + 0.3 * cosine.mean()
    torch.testing.assert_close(loss.total, expected, rtol=1e-4, atol=1e-6)


def test_charbonnier_bounds_the_absolute_error():
    x, net = images(), codec()
    plain, smooth = (run(Autoencoding(net, kl=0.0, pixels=p), x).total.item() for p in ("l1", "charbonnier"))
    assert plain < smooth < plain + 1e-3


def test_the_perceptual_network_is_neither_trained_nor_changed():
    by = features()
    before = [p.clone() for p in by.parameters()]
    trainer = Trainer(Autoencoding(codec(), perceptual_by=by), lambda it: {"x": images(seed=it)}, steps=2, cpu=True)
    trainer.fit()
    assert all(
        torch.equal(a, b) and b.requires_grad and b.grad is None for a, b in zip(before, by.parameters(), strict=True)
    )
    assert not [name for name in trainer.objective.state_dict() if "perceptual" in name]


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_the_adaptive_weight_equals_the_gradients(scale):
    """Whatever the scale of the critic, at the last layer its gradient is `adversarial` times the reconstruction's."""
    x, net, judge = images(), codec(), critic()
    with torch.no_grad():
        judge.output.weight.mul_(scale)

    def gradient(objective):
        return torch.autograd.grad(run(objective, x).total, net.last_layer)[0]

    ours = gradient(Autoencoding(net))
    theirs = gradient(Autoencoding(net, critic=judge, adversarial=0.5)) - ours
    assert theirs.norm().item() == pytest.approx(0.5 * ours.norm().item(), rel=0.02)


def test_the_critic_learns_the_hinge_loss_and_does_not_move_the_codec():
    x, net, judge = images(), codec(), critic()
    objective = Autoencoding(net, critic=judge)
    loss = run(objective, x, "critic").total
    moments = net.encode(x)
    y = net.decode(moments.sample(Context.of(4, 0).rng.normal(moments.mean)))
    real, fake = judge(x), judge(y)
    torch.testing.assert_close(loss, 0.5 * ((1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean()))
    assert all(g is None for g in torch.autograd.grad(loss, list(net.parameters()), allow_unused=True))


def test_the_critic_joins_at_its_iteration():
    objective = Autoencoding(codec(), critic=critic(), begin=3)
    assert objective.turns(2) == [["codec"]] and objective.turns(3) == [["codec"], ["critic"]]
    assert "fool" not in run(objective, images(), step=2).terms and "fool" in run(objective, images(), step=3).terms


def stripes(it):
    """Pictures of two colours side by side."""
    colour = torch.rand(8, 3, 1, 2, generator=torch.Generator().manual_seed(it)) * 2 - 1
    return {"x": colour.repeat_interleave(8, 3).expand(8, 3, 16, 16).contiguous()}


def test_an_autoencoder_learns_unseen_pictures():
    players = Trainer(Autoencoding(codec()), stripes, steps=150, lr=3e-3, ema=0, clip=1.0, cpu=True).fit()
    x = stripes(999)["x"]
    with torch.no_grad():
        assert (players["codec"](x) - x).abs().mean() < 0.6 * x.abs().mean()  # 1 for a grey picture


def test_a_critic_learns_to_tell_reconstructions():
    """With the codec held still, the hinge loss falls from 1, where it knows nothing, towards 0."""
    objective = Autoencoding(codec(), critic=PatchDiscriminator(width=8, depth=2))
    assert run(objective, stripes(999)["x"], "critic").total.item() == pytest.approx(1.0)
    Trainer(objective, stripes, steps=25, lr={"codec": 0.0, "critic": 3e-3}, ema=0, cpu=True).fit()
    assert run(objective, stripes(999)["x"], "critic").total < 0.5


@pytest.mark.parametrize(("make", "message"), [
    (lambda: Autoencoding(codec(), pixels="l2"), "charbonnier"),
    (lambda: Autoencoding(codec(), kl=-1.0), "at least 0"),
    (lambda: Autoencoding(nn.Linear(1, 1), critic=critic()), "last_layer"),
    (lambda: Autoencoding(codec())({"images": 0}, Context.of(1)), r"batch\['x'\]"),
    (lambda: run(Autoencoding(codec()), images(), seed=None), "Context.of"),
])  # fmt: skip
def test_refusals(make, message):
    with pytest.raises(InputError, match=message):
        make()


# ------------------------------------------------------------------ contrastive


class Given(nn.Module):
    """An encoder whose embeddings are given: the images are the image embeddings, "vector" the text embeddings."""

    def __init__(self, scale=2.0):
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale), dtype=torch.float64))
        self.heads = nn.ModuleDict({"vendor": nn.Linear(3, 4).double()})
        self.text = lambda vector: F.normalize(vector, dim=-1)
        self.image = lambda x: F.normalize(x, dim=-1)

    def classify(self, embedding):
        return {name: head(embedding) for name, head in self.heads.items()}


def embeddings(n, seed):
    return torch.randn(n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def contrast(objective, a, b, concept, **more):
    return objective(
        {"x": a, "text": {"vector": b}, "concept": torch.as_tensor(concept), **more}, Context.of(len(a))
    ).total


@settings(max_examples=30, deadline=None)
@given(concept=st.lists(st.integers(0, 3), min_size=2, max_size=7), seed=st.integers(0, 1000), scale=st.floats(0.5, 20))
def test_contrastive_losses_are_their_double_sums(concept, seed, scale):
    n, encoder = len(concept), Given(scale)
    a, b = embeddings(n, seed), embeddings(n, seed + 1)
    logits = [[scale * F.cosine_similarity(a[i], b[j], dim=0) for j in range(n)] for i in range(n)]

    def side(get):
        total = 0.0
        for i in range(n):
            same = [j for j in range(n) if concept[j] == concept[i]]
            total -= sum(
                get(i, j) - torch.logsumexp(torch.stack([get(i, k) for k in range(n)]), 0) for j in same
            ) / len(same)
        return total / n

    expected = 0.5 * (side(lambda i, j: logits[i][j]) + side(lambda i, j: logits[j][i]))
    torch.testing.assert_close(contrast(Contrastive(encoder), a, b, concept), expected, rtol=1e-8, atol=1e-10)
    sigmoid = Contrastive(encoder, loss="sigmoid")
    pairs = [(1 if concept[i] == concept[j] else -1) * (logits[i][j] - 10.0) for i in range(n) for j in range(n)]
    expected = -sum(F.logsigmoid(p) for p in pairs) / n
    torch.testing.assert_close(contrast(sigmoid, a, b, concept), expected, rtol=1e-6, atol=1e-8)


@settings(max_examples=20, deadline=None)
@given(order=st.permutations(range(6)), loss=st.sampled_from(["softmax", "sigmoid"]))
def test_the_order_of_the_batch_does_not_matter(order, loss):
    a, b, concept, objective = (
        embeddings(6, 0),
        embeddings(6, 1),
        torch.tensor([0, 0, 1, 2, 2, 2]),
        Contrastive(Given(), loss=loss),
    )
    one, other = contrast(objective, a, b, concept), contrast(objective, a[order], b[order], concept[order])
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_the_optimum_is_one_embedding_a_concept():
    """With equal embeddings in a concept and large scale the softmax loss is the entropy of its target."""
    basis, concept = torch.eye(3, dtype=torch.float64), torch.tensor([0, 0, 1, 2, 2, 2])
    best = contrast(Contrastive(Given(1000.0)), basis[concept], basis[concept], concept)
    assert best.item() == pytest.approx((2 * math.log(2) + 3 * math.log(3)) / 6, abs=1e-6)


def test_class_heads_add_their_cross_entropy_and_skip_unlabelled_items():
    a, b, encoder = embeddings(5, 0), embeddings(5, 1), Given()
    vendor = torch.tensor([0, 3, -100, 1, -100])
    both = contrast(Contrastive(encoder, {"vendor": 0.7}), a, b, range(5), vendor=vendor)
    alone = contrast(Contrastive(encoder), a, b, range(5))
    logits = encoder.heads["vendor"](F.normalize(a, dim=-1)).log_softmax(1)
    expected = -(logits[0, 0] + logits[1, 3] + logits[3, 1]) / 3
    torch.testing.assert_close(both - alone, 0.7 * expected)
    with pytest.raises(InputError, match=r"no class heads \['colour'\]; it has \['vendor'\]"):
        Contrastive(encoder, {"colour": 1.0})


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_a_dual_encoder_learns_to_match(loss):
    """Six concepts in two styles, by colour; texts are their one-hot vectors."""
    torch.manual_seed(0)
    colours = torch.rand(6, 3, 1, 1) * 2 - 1
    image = {"name": "conv-encoder", "config": {"width": 8, "multipliers": [1, 2], "embedding": 16}}
    text = {
        "name": "text-tower",
        "config": {"vector_channels": 6, "context_channels": None, "width": 16, "embedding": 16},
    }
    encoder = networks.build("dual-encoder", {"image": image, "text": text, "classes": {"style": 2}})

    def data(it):
        g = torch.Generator().manual_seed(it)
        concept, style = torch.randint(0, 6, (24,), generator=g), torch.randint(0, 2, (24,), generator=g)
        x = colours[concept].expand(24, 3, 8, 8) + 0.1 * torch.randn(24, 3, 8, 8, generator=g)
        x = torch.where(style[:, None, None, None] == 1, x * torch.linspace(-1, 1, 8), x)
        return {"x": x, "text": {"vector": F.one_hot(concept, 6).float()}, "concept": concept, "style": style}

    objective = Contrastive(encoder, {"style": 0.2}, loss=loss)
    players = Trainer(objective, data, steps=60, lr=5e-3, ema=0, cpu=True).fit()
    assert set(players) == ({"encoder"} if loss == "softmax" else {"encoder", "bias"})
    test = data(10_000)
    with torch.no_grad():
        terms = Contrastive(players["encoder"], {"style": 0.2})(test, Context.of(24)).terms
    assert terms["accuracy"] > 0.85  # chance is 1/6


def test_a_batch_is_not_split():
    with pytest.raises(InputError, match="cannot be split"):
        Trainer(Contrastive(Given()), lambda it: {"x": embeddings(4, it)}, steps=1, accumulate=2, cpu=True).fit()


def test_contrastive_refusals():
    with pytest.raises(InputError, match="'softmax' or 'sigmoid'"):
        Contrastive(Given(), loss="triplet")
    with pytest.raises(InputError, match="5 images, 4 concepts"):
        contrast(Contrastive(Given()), embeddings(5, 0), embeddings(5, 1), range(4))
