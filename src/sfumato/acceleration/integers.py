"""Eight bits for real: a quantised network on the integer units of a CPU, by the kernels of oneDNN that torch brings."""

from __future__ import annotations

import threading
from functools import partial
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from sfumato.acceleration._registry import Fitted, register
from sfumato.acceleration.calibration import Calibration
from sfumato.acceleration.engines import BACKENDS, attached
from sfumato.acceleration.quantization import Quantized, _rebuilt, layers, quantized
from sfumato.acceleration.ranges import Quantizer
from sfumato.core import Denoiser, InputError

_last = threading.local()


def codes(x: Tensor, quantise: Quantizer) -> Tensor:
    """The codes of x, uint8. A tensor that several layers read in turn (query, key, value) is quantised once."""
    key = None if x.is_inference() else (x._version, quantise)
    kept = getattr(_last, "kept", None)
    if key is not None and kept is not None and kept[0]() is x and kept[1] == key:
        return kept[2]  # type: ignore[no-any-return]
    steps = quantise.steps(x)
    steps = steps if quantise.zero == 128 else steps.add_(quantise.zero - 128)
    found = steps.to(torch.int8).view(torch.uint8).bitwise_xor_(128)  # far faster than the conversion to uint8
    if key is not None:
        _last.kept = (ref(x), key, found)
    return found


class Int8(nn.Module):
    """A linear layer or convolution of 8-bit integers: what :class:`Quantized` simulates, to rounding of the last sum."""

    def __init__(self, layer: Quantized) -> None:
        super().__init__()
        base: Any = layer.base
        self.input, self.facts = layer.input, {k: v for k, v in vars(base).items() if not k.startswith("_")}
        self.register_buffer("codes", layer.steps.to(torch.int8))
        self.register_buffer("scale", layer.scale.flatten().float())
        self.register_buffer("zero", torch.zeros(len(base.weight), dtype=torch.int64))
        self.bias = base.bias
        conv = isinstance(base, nn.Conv2d)
        self.form = (list(base.stride), list(base.padding), list(base.dilation), base.groups) if conv else None
        self._ready: Any = None
        self._lock = threading.Lock()

    def __deepcopy__(self, memo: Any) -> Int8:
        new = object.__new__(Int8)
        memo[id(self)] = new
        kept = {k: dict(v) if isinstance(v, dict) else v for k, v in self.__dict__.items()}  # tensors never change
        new.__dict__ = {**kept, "_lock": threading.Lock()}
        return new

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lock": None, "_ready": None}  # packed again where it is opened

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._lock = threading.Lock()

    def __getattr__(self, name: str) -> Any:  # in_features and the like, which networks look at
        facts = self.__dict__.get("facts", {})
        return facts[name] if name in facts else super().__getattr__(name)

    @property
    def weight(self) -> Tensor:
        """The weight that its integers stand for."""
        return self.codes * self.scale.view(-1, *[1] * (self.codes.ndim - 1))

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        if x.dtype != torch.float32 or x.device.type != "cpu":
            raise InputError(
                f"int8 runs on float32 states on a CPU, not {x.dtype} on {x.device}: use quantized() there"
            )
        if torch.is_grad_enabled() and x.requires_grad:
            raise InputError("no gradient passes through integers: sample without grad, or use quantized()")
        quantise: Any = self.input
        q, packed = codes(x, quantise), self._packed()
        end: tuple[Any, ...] = (1.0, 0, torch.float32, "none", [], "none")
        if self.form is None:
            return torch.ops.onednn.qlinear_pointwise(
                q, quantise.scale, quantise.zero, packed, self.scale, self.zero, self.bias, *end
            )  # type: ignore[no-any-return]  # fmt: skip
        return torch.ops.onednn.qconv2d_pointwise(
            q, quantise.scale, quantise.zero, packed, self.scale, self.zero, self.bias, *self.form, *end
        )  # type: ignore[no-any-return]  # fmt: skip

    def _packed(self) -> Any:
        """The weight in the kernel's own order, made at the first call."""
        with self._lock:
            if self._ready is None:
                if self.form is None:
                    self._ready = torch.ops.onednn.qlinear_prepack(self.codes, None)
                else:
                    numbers = (self.scale, self.input.scale, self.input.zero)  # type: ignore[union-attr]
                    self._ready = torch.ops.onednn.qconv_prepack(self.codes, *numbers, *self.form, None)
            return self._ready


def int8(
    denoiser: Denoiser, calibration: Calibration | None = None, *, backend: str = "onednn", **options: Any
) -> Denoiser:
    """A copy of a denoiser whose linear layers and convolutions of maps and tokens run on 8-bit integers on a CPU.

    ``denoiser`` is a full one, with the calibration set and the options of :func:`quantized` (no attention: its products
    stay in float, as its softmax does), or a quantised one of 8 bits. Each layer equals its simulation to float rounding (a
    value that rounding moves across the border of two codes changes a step, so that networks agree less closely). It serves
    any batch, solver, guidance and thread, and keeps the paths of submodules. It is fast where the processor has
    integer dot products (AVX512-VNNI, AVX-VNNI, AMX).

    backend  "onednn"       torch's own kernels; needs nothing else, takes convolutions, any shape and taps
             "onnxruntime"  the same codes as one graph (extra ``onnx``), for linear layers and items of one shape: 1.35 x the speed
                            of the default on the bundled transformer; ten seconds at the first opening
             "torchao"      linear layers of torchao under torch.compile (extra ``torchao``, and a C++ compiler): each token has
                            a range of its own, so it is the nearest to the full network; 1.2 x the speed of the default
                            there, a minute at the first call of a shape

    The two other engines need the calibration set, whose items show what the network reads. A call with taps (a cache, token
    merging, attention control) runs on torch's own kernels with any of them. docs/acceleration.md has all three in one run.

    Raises InputError for other bits, and at a call for other dtypes and devices and where a gradient is asked for.
    """
    if backend not in BACKENDS:
        raise InputError(f"backend = {backend!r}: one of {', '.join(BACKENDS)}")
    if backend != "onednn" and calibration is None:
        raise InputError(f"{backend} is given the calibration set, whose items show what the network reads")
    if not hasattr(torch.ops.onednn, "qlinear_pointwise") or not torch.backends.mkldnn.is_available():
        raise InputError("this torch has no oneDNN kernels for 8-bit integers: use quantized(), which simulates them")
    if calibration is not None:
        denoiser = quantized(denoiser, calibration, **{"attention": False, **options})
    elif options:
        raise InputError(f"{sorted(options)} are options of the calibration: give one")
    new: dict[str, Int8] = {}
    for path, layer in layers(denoiser).items():
        if layer.input is None:
            continue  # of vectors: exact input
        if layer.bits > 8 or layer.input.bits != 8:
            raise InputError(f"{path} has {layer.bits} bits and inputs of {layer.input.bits}: integers here are of 8")
        if isinstance(layer.base, nn.Conv2d) and (
            layer.base.padding_mode != "zeros" or isinstance(layer.base.padding, str)
        ):
            raise InputError(f"{path} pads with {layer.base.padding_mode!r}: only numbers of zeros; skip= it")
        new[path] = Int8(layer)
    if not new:
        raise InputError("no layer has quantised inputs: activations=8")
    made: Denoiser = _rebuilt(denoiser, new)
    if backend == "onednn" or calibration is None:
        return made
    return attached(made, new, backend, next(calibration.batches(2)))


@register("int8")
def fitted(items: int = 64, steps: int = 20, seed: int = 1, backend: str = "onednn") -> Fitted:
    """Linear layers and convolutions on the 8-bit integers of a CPU, their ranges fitted to runs of the model.

    items, steps, seed  of those runs; :func:`sfumato.acceleration.int8` takes a calibration set of your own
    backend             which kernels compute: "onednn", "onnxruntime" or "torchao", see there
    """
    if backend not in BACKENDS:
        raise InputError(f"backend = {backend!r}: one of {', '.join(BACKENDS)}")
    return Fitted(partial(int8, backend=backend), items, steps, seed)


__all__ = ["Int8", "codes", "int8"]
