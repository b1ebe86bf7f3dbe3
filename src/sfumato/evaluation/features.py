"""Feature extractors: uint8 images (B, 3, H, W) to features (B, d). A figure is only as good as its features.

Add one with ``@EXTRACTORS.register("name")`` on a class or function that makes an extractor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.core.errors import InputError
from sfumato.core.registry import Registry
from sfumato.evaluation.backbones import EFFICIENTNET_LITE0, MOBILENET_V2, Backbone, read

EXTRACTORS = Registry("feature extractor")


class Extractor(Protocol):
    """Images uint8 (B, C, H, W) to features (B, d), item by item; ``name`` goes into every figure."""

    name: str

    def __call__(self, images: Tensor) -> Tensor: ...


@runtime_checkable
class DualEncoder(Protocol):
    """An extractor whose features can be compared with those of texts by cosine."""

    name: str

    def __call__(self, images: Tensor) -> Tensor: ...

    def encode_text(self, texts: Sequence[str]) -> Tensor: ...


def names() -> list[str]:
    """The registered extractors."""
    return EXTRACTORS.names()


def get(name: str, **numbers: Any) -> Extractor:
    """Make a registered extractor.

    Raises:
        UnknownName: no extractor of that name.
        MissingExtra: the package with its weights is not installed.
    """
    return EXTRACTORS.get(name, **numbers)


def check_images(images: Tensor, channels: int | None = None) -> Tensor:
    """The images, if they are uint8 (B, C, H, W) with at least one item.

    Raises:
        InputError: anything else.
    """
    if not isinstance(images, Tensor):
        raise InputError(f"images: a uint8 tensor (B, C, H, W) is wanted, got {type(images).__name__}")
    if images.dtype != torch.uint8:
        raise InputError(
            f"images: uint8 in 0..255 is wanted, got {images.dtype}; "
            "((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8) makes it of floats in [-1, 1]"
        )
    if images.dim() != 4 or not images.numel():
        raise InputError(f"images: shape (B, C, H, W) with B >= 1 is wanted, got {tuple(images.shape)}")
    if channels is not None and images.shape[1] != channels:
        hint = "; images.expand(-1, 3, -1, -1) repeats a grey channel" if images.shape[1] == 1 else ""
        raise InputError(f"images: {channels} channels are wanted, got {images.shape[1]}{hint}")
    return images


class NetworkFeatures:
    """Any network as an extractor: ``net(preprocess(images))`` must be (B, d).

    Args:
        net: in evaluation mode; it runs on its own device, without gradients.
        name: what figures call these features.
        preprocess: uint8 images to what the network reads; by default float32 in [-1, 1].

    Raises:
        InputError: the network is in training mode (its output would depend on the batch), or its output is not (B, d).
    """

    def __init__(self, net: nn.Module, name: str, preprocess: Callable[[Tensor], Tensor] | None = None) -> None:
        if not name:
            raise InputError("features need a name: it is printed with every figure made from them")
        self.net, self.name, self.preprocess = net, name, preprocess or _signed

    def __call__(self, images: Tensor) -> Tensor:
        check_images(images)
        if self.net.training:
            raise InputError(f"{self.name}: the network is in training mode, call net.eval() first")
        place = next((t.device for t in (*self.net.parameters(), *self.net.buffers())), images.device)
        with torch.no_grad():
            found = self.net(self.preprocess(images.to(place)))
        if not isinstance(found, Tensor) or found.dim() != 2 or len(found) != len(images):
            given = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise InputError(f"{self.name}: features ({len(images)}, d) are wanted, the network gave {given}")
        return found


def _signed(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1


class BackboneFeatures:
    """Pooled features (B, 1280) of an ImageNet classifier, of the whole image resized to ``size`` x ``size``.

    Resizing is bicubic with antialiasing and saturates at 0 and 255, as image files do; a smaller size is faster and
    another measurement, so it is part of the name.

    Raises:
        MissingExtra: the package with the weights is not installed.
        InputError: images that are not uint8 (B, 3, H, W), or a size below 32.
    """

    def __init__(self, backbone: Backbone, name: str, size: int = 224, device: str | torch.device = "cpu") -> None:
        if isinstance(size, bool) or not isinstance(size, int) or size < 32:
            raise InputError(
                f"size = {size!r}: pixels to resize to, an integer of at least 32; 224 is what it was trained on"
            )
        self.name, self.size, self.device = f"{name}@{size}", size, torch.device(device)
        self.net = read(backbone).to(self.device)
        self.mean = torch.tensor(backbone.mean, device=self.device).view(3, 1, 1)
        self.std = torch.tensor(backbone.std, device=self.device).view(3, 1, 1)

    # Activations of this many pixels stay in the cache of a CPU: a whole batch of 64 at size 224 is 5 times slower.
    PIXELS = 4 * 224 * 224

    def __call__(self, images: Tensor) -> Tensor:
        check_images(images, 3)
        at_once = max(1, self.PIXELS // self.size**2) if self.device.type == "cpu" else len(images)
        with torch.no_grad():
            return torch.cat([self.net(self._scaled(part)) for part in images.split(at_once)])

    def logits(self, images: Tensor) -> Tensor:
        """ImageNet logits, (B, 1000)."""
        with torch.no_grad():
            return self.net.classifier(self(images))

    def _scaled(self, images: Tensor) -> Tensor:
        x = images.to(self.device).float()
        if x.shape[-2:] != (self.size, self.size):
            x = F.interpolate(x, (self.size, self.size), mode="bicubic", antialias=True).clamp_(0, 255)
        return (x / 255 - self.mean) / self.std


@EXTRACTORS.register("mobilenet-v2")
def mobilenet_v2(size: int = 224, device: str | torch.device = "cpu") -> BackboneFeatures:
    """MobileNetV2 trained on ImageNet (weights of torchvision): Sandler, Howard, Zhu, Zhmoginov, Chen (2018)."""
    return BackboneFeatures(MOBILENET_V2, "mobilenet-v2", size, device)


@EXTRACTORS.register("efficientnet-lite0")
def efficientnet_lite0(size: int = 224, device: str | torch.device = "cpu") -> BackboneFeatures:
    """EfficientNet-Lite0 trained on ImageNet, a second opinion beside MobileNetV2: Tan and Le (2019)."""
    return BackboneFeatures(EFFICIENTNET_LITE0, "efficientnet-lite0", size, device)


@EXTRACTORS.register("pixels")
class PixelFeatures:
    """The pixels themselves, (B, C H W) float32 in [0, 1]."""

    name = "pixels"

    def __call__(self, images: Tensor) -> Tensor:
        return check_images(images).flatten(1).float() / 255


class PCAFeatures:
    """The first ``dims`` principal components of the pixels of ``fit_on``: no weights, and d as small as wanted.

    Each direction is signed so that its largest entry is positive: the features are a function of ``fit_on`` alone.

    Args:
        fit_on: uint8 images (N, C, H, W), or batches of them. Fit on training data, not on what is to be measured.
        dims: number of components, at most min(N - 1, C H W).

    Raises:
        InputError: too few images for ``dims``; more than 6,000 images of more than 6,000 values; other images than
            these.
    """

    MOST = 6000

    def __init__(self, fit_on: Tensor | Iterable[Tensor], dims: int) -> None:
        batches = [fit_on] if isinstance(fit_on, Tensor) else list(fit_on)
        if not batches:
            raise InputError("fit_on holds no images")
        images = torch.cat([check_images(batch) for batch in batches])
        n, width = len(images), images[0].numel()
        if isinstance(dims, bool) or not isinstance(dims, int) or not 1 <= dims <= min(n - 1, width):
            raise InputError(f"dims = {dims!r}: {n} images of {width} values allow 1 to {min(n - 1, width)} components")
        if min(n, width) > self.MOST:
            raise InputError(f"{n} images of {width} values are too many: fit on at most {self.MOST} images")
        x = images.flatten(1).double() / 255
        self.shape, self.name = tuple(images.shape[1:]), f"pca-{dims}"
        self.mean = x.mean(0)
        self.directions, self.variances = _principal(x - self.mean, dims)

    def __call__(self, images: Tensor) -> Tensor:
        if tuple(check_images(images).shape[1:]) != self.shape:
            raise InputError(f"{self.name} was fitted on images {self.shape}, got {tuple(images.shape[1:])}")
        return (images.cpu().flatten(1).double() / 255 - self.mean) @ self.directions


def _principal(x: Tensor, dims: int) -> tuple[Tensor, Tensor]:
    """Directions (D, dims) and variances (dims,) of centred x (N, D), by the smaller of the two Gram matrices."""
    n, width = x.shape
    values, vectors = torch.linalg.eigh(x.T @ x if width <= n else x @ x.T)
    values, vectors = values.flip(0)[:dims], vectors.flip(1)[:, :dims]
    if values[-1] <= 1e-12 * values[0]:
        rank = int((values > 1e-12 * values[0]).sum())
        raise InputError(f"the images vary in only {rank} directions: dims can be at most {max(rank, 1)}")
    directions = vectors if width <= n else x.T @ vectors / values.sqrt()
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    return directions * largest.sign(), values / (n - 1)
