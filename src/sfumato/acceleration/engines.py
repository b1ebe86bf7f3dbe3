"""The same 8-bit network on other engines: as a graph of onnxruntime, or by torchao under torch.compile."""

from __future__ import annotations

import logging
import sys
import threading
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.acceleration.calibration import Batch
from sfumato.acceleration.counting import counting
from sfumato.acceleration.keeping import digest, kept
from sfumato.core import Denoiser, InputError, rebuild
from sfumato.core.errors import need
from sfumato.denoisers import Parametrized

BACKENDS = ("onednn", "onnxruntime", "torchao")


class Engine:
    """Calls a network on another engine; where operations are counted, in torch, which sees them there."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net

    def __deepcopy__(self, memo: Any) -> Engine:
        return self  # it never changes

    def __call__(self, x: Tensor, label: Tensor, **cond: Tensor) -> Tensor:
        if counting.get():
            return self.net(x, label, **cond)  # type: ignore[no-any-return]
        if x.dtype != torch.float32 or x.device.type != "cpu":
            raise InputError(
                f"int8 runs on float32 states on a CPU, not {x.dtype} on {x.device}: use quantized() there"
            )
        if torch.is_grad_enabled() and (x.requires_grad or any(v.requires_grad for v in cond.values())):
            raise InputError("no gradient passes through integers: sample without grad, or use quantized()")
        return self.run(x, label, cond)

    def run(self, x: Tensor, label: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """The network's output."""
        raise NotImplementedError


class Session(Engine):
    """A network as a graph of onnxruntime, for any number of items of the shapes that it was made with."""

    def __init__(self, net: nn.Module, graph: bytes, shapes: Mapping[str, Sequence[int]]) -> None:
        super().__init__(net)
        self.graph, self.shapes = graph, {name: tuple(shape) for name, shape in shapes.items()}
        self._session: Any = None
        self._lock = threading.Lock()

    def run(self, x: Tensor, label: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        given = {"x": x, "label": label, **cond}
        found = {name: tuple(value.shape[1:]) for name, value in given.items()}
        if found != self.shapes:
            raise InputError(
                f"this graph was made for items {self.shapes} and is given {found}: calibrate with those, or use "
                "backend='onednn', which takes any"
            )
        session, read = self._opened()
        out = session.run(None, {name: value.detach().contiguous().numpy() for name, value in given.items() if name in read})  # fmt: skip
        return torch.from_numpy(out[0])

    def _opened(self) -> Any:
        """The session, begun at the first call with as many threads as torch has then; and what it reads."""
        with self._lock:
            if self._session is None:
                runtime = need("onnxruntime", "onnx")
                options = runtime.SessionOptions()
                options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
                options.log_severity_level = 3
                made = runtime.InferenceSession(self.graph, options, providers=["CPUExecutionProvider"])
                self._session = made, {i.name for i in made.get_inputs()}
            return self._session


class Compiled(Engine):
    """A network under torch.compile: seconds to a minute at the first call of each shape."""

    def __init__(self, net: nn.Module, changed: nn.Module) -> None:
        super().__init__(net)
        self.compiled: Any = torch.compile(changed)

    def run(self, x: Tensor, label: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        return self.compiled(x, label, **cond)  # type: ignore[no-any-return]


class Nodes(nn.Module):
    """A linear layer of 8-bit integers as the graph has it: quantise, product of dequantised codes, bias."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.register_buffer("codes", layer.codes.T.contiguous())
        self.register_buffer("scale", layer.scale)
        self.register_buffer("zero", torch.zeros(len(layer.scale), dtype=torch.int8))
        self.bias, self.input = layer.bias, (float(layer.input.scale), int(layer.input.zero), 0, 255, torch.uint8)

    def forward(self, x: Tensor) -> Tensor:
        ops = torch.ops.quantized_decomposed
        x = ops.dequantize_per_tensor.default(ops.quantize_per_tensor.default(x, *self.input), *self.input)
        weight = ops.dequantize_per_channel.default(self.codes, self.scale, self.zero, 1, -128, 127, torch.int8)
        return x @ weight if self.bias is None else x @ weight + self.bias  # type: ignore[no-any-return]


def attached(denoiser: Denoiser, layers: Mapping[str, Any], backend: str, batch: Batch) -> Denoiser:
    """``denoiser``, whose network has these ``Int8`` layers, with its calls on the engine ``backend``.

    batch  items as the network will read them. Calls with taps stay on the network itself, which has a place for them.
    InputError for convolutions: neither engine has a product of theirs that does not round its result as well.
    """
    spatial = sorted(path for path, layer in layers.items() if layer.form is not None)
    if spatial:
        raise InputError(
            f"{spatial[0]} is a convolution: {backend} runs linear layers in 8 bits, backend='onednn' convolutions too"
        )
    leaf = next(m for m in denoiser.modules() if isinstance(m, Parametrized))
    make = _session if backend == "onnxruntime" else _compiled
    leaf._graph = [make(leaf, layers, batch)]
    return denoiser


def _session(leaf: Parametrized, layers: Mapping[str, Any], batch: Batch) -> Session:
    """The graph of a network and the session that runs it; the graph is kept from one opening to the next."""
    import torch.ao.quantization.fx._decomposed  # noqa: F401  (registers the operators of Nodes)

    for package in ("onnxruntime", "onnx", "onnxscript"):
        need(package, "onnx")
    x, label = batch.x.float(), leaf._label(batch.t.float(), batch.x)
    told = {k: batch.cond[k].contiguous() for k in sorted(batch.cond)}  # in one order, so that the graph is found again
    inputs = {"x": x, "label": label, **told}
    shapes = {name: tuple(value.shape[1:]) for name, value in inputs.items()}
    facts = [torch.__version__, need("onnx", "onnx").__version__, repr(leaf.net), repr(shapes)]
    facts += [f"{path} {layer.input}" for path, layer in layers.items()] + sources(leaf.net)
    key = digest(facts, leaf.net.state_dict())

    def make() -> bytes:
        net = untapped(rebuild(leaf.net, lambda path, m: Nodes(layers[path]) if path in layers else None))
        program = exported(Positional(net, tuple(told)).eval(), inputs, "prediction")
        return program.model_proto.SerializeToString()  # type: ignore[no-any-return]

    return kept("the graph of 8-bit integers", f"graph-{key}.onnx", make, lambda data: Session(leaf.net, data, shapes))


def sources(net: nn.Module) -> list[str]:
    """The code that a network is made of: a graph of older code is made again."""
    names = {cls.__module__ for module in net.modules() for cls in type(module).__mro__} - {
        Denoiser.__module__
    }  # of taps
    files = {getattr(sys.modules.get(name), "__file__", None) for name in names if not name.startswith("torch")}
    return [Path(file).read_text("utf-8") for file in sorted(f for f in files if f and f.endswith(".py"))]


def _compiled(leaf: Parametrized, layers: Mapping[str, Any], batch: Batch) -> Compiled:
    """The network with torchao's linear layers: inputs quantised a token at a time, by the range each has."""
    quantization = need("torchao.quantization", "torchao")

    def plain(path: str, module: nn.Module) -> nn.Module | None:
        if path not in layers:
            return None
        layer = layers[path]
        linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        linear.weight, linear.bias = nn.Parameter(layer.weight, requires_grad=False), layer.bias
        return linear

    net = untapped(rebuild(leaf.net, plain))
    quantization.quantize_(
        net, quantization.Int8DynamicActivationInt8WeightConfig(), filter_fn=lambda m, path: path in layers
    )
    return Compiled(leaf.net, net)


def untapped(net: nn.Module) -> nn.Module:
    """``net`` with the classes that its modules had before they were first tapped: graphs have no place for taps."""
    from sfumato.core.denoiser import _Tapped

    for module in net.modules():
        kinds: Any = type(module).__mro__
        module.__class__ = next(kind for kind in kinds if not issubclass(kind, _Tapped))
    return net


class Positional(nn.Module):
    """A network whose conditions are arguments in order, as ONNX wants them."""

    def __init__(self, net: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.net, self.names = net, names

    def forward(self, x: Tensor, label: Tensor, *conditions: Tensor) -> Tensor:
        """The network's output."""
        return self.net(x, label, **dict(zip(self.names, conditions, strict=True)))  # type: ignore[no-any-return]


@torch.no_grad()
def exported(module: nn.Module, inputs: Mapping[str, Tensor], output: str) -> Any:
    """The ONNX program of a module, its batch size free where the code allows."""
    batch = torch.export.Dim("batch", min=1, max=1 << 20)
    free = tuple({0: batch} for _ in inputs)
    shapes: Any = (*free[:2], free[2:]) if isinstance(module, Positional) else free
    said = logging.getLogger("torch.onnx")
    level = said.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        said.setLevel(logging.ERROR)  # it says that torchvision is not installed
        try:
            return torch.onnx.export(
                module, tuple(inputs.values()), dynamo=True, verbose=False, input_names=list(inputs), output_names=[output],
                dynamic_shapes=shapes, optimize=True,
            )  # fmt: skip
        finally:
            said.setLevel(level)


__all__ = ["BACKENDS", "Compiled", "Engine", "Positional", "Session", "attached", "exported", "untapped"]
