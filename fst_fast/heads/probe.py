"""Runs a model for ``find_head`` without touching it: in a copy that holds no weights."""

import logging
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .copies import Stage, copy_of
from .evidence import Trace

SIDES = (224, 32, 64, 28, 256, 299, 384, 96, 128, 160, 192, 240, 288, 320, 336, 448, 512, 518)
BATCH = 2
MAX_REJECTED = 6

Input = tuple[tuple[int, ...], torch.dtype]

DETACHES = (
    torch.Tensor.detach,
    torch.Tensor.detach_,
    torch.detach,
    torch.detach_,
    vars(torch._C.TensorBase)["data"].__get__,
)


class KeepHistory(TorchFunctionMode):
    """Makes detach and no_grad inside a forward do nothing, so that no branch hides from the graph.

    Nothing is trained here, so nothing needs the protection. A model that insists (by changing a
    parameter in place, say) cannot be run.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func is torch._C._set_grad_enabled:
            return None
        if func in DETACHES:
            return torch.ops.aten.alias(args[0])
        if func is torch.Tensor.numpy:
            return args[0].detach().numpy()
        return func(*args, **(kwargs or {}))


class ProbeError(Exception):
    """No input made the copy run to a classifier's output."""


def trace(model: nn.Module, example: Any, accepts: Callable[[Any], bool]) -> Trace:
    """Run a copy of ``model`` in eval mode until an input gives an output that ``accepts``.

    The copy first holds meta tensors, then fake ones: no weights, no arithmetic. Where both fail
    (values decide the control flow, say) a copy that shares the model's weights really runs.

    Raises:
        ProbeError: no input fits; says what the first one did.
    """
    inputs = list(inputs_for(model, example))
    failures: list[str] = []
    rejected = 0
    for stage in _stages(model):
        for shape, dtype in inputs:
            try:
                result = _run(model, stage, shape, dtype)
            except Exception as error:
                failures.append(f"{list(shape)}: {type(error).__name__}: {_first_line(error)}")
                continue
            if accepts(result.output):
                return result
            failures.append(f"{list(shape)}: output {_describe(result.output)}, not [{BATCH}, K]")
            rejected += 1
            tokens = isinstance(result.output, Tensor) and result.output.dim() == 3
            if rejected == MAX_REJECTED or tokens:
                # The output is tokens, or always a map of scores: another size will not mend that.
                raise ProbeError(failures[-1])
    raise ProbeError(failures[0] if failures else "no Linear or Conv2d tells the input's shape")


def _stages(model: nn.Module) -> Iterator[Stage]:
    """Cheapest first. Meta is the fastest; fake tensors also take constants on real devices."""
    meta = torch.device("meta")
    yield Stage((meta, KeepHistory()), lambda tensor: meta)
    from torch._subclasses.fake_tensor import FakeTensorMode

    cpu = torch.device("cpu")
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    yield Stage((mode, KeepHistory()), lambda tensor: cpu if tensor.is_meta else tensor.device)
    if not any(tensor.is_meta for tensor in model.parameters()):
        yield Stage((KeepHistory(),), None)


def inputs_for(model: nn.Module, example: Any) -> Iterator[Input]:
    """Shapes and dtypes to try, most trusted first."""
    dtypes = [p.dtype for p in model.parameters() if p.is_floating_point()]
    dtype = dtypes[0] if dtypes else torch.get_default_dtype()
    if example is not None:
        images = example[0] if isinstance(example, (tuple, list)) and example else example
        if not isinstance(images, Tensor) or images.dim() < 2:
            raise ValueError(
                "find_head: example must be a batch of images [B, ...] or (images, labels), "
                f"got {_describe(images)}; take one batch from the loader, or pass head="
            )
        shape = (BATCH, *images.shape[1:])
        yield from dict.fromkeys([(shape, images.dtype), (shape, dtype)])
        return
    seen = set()
    for shape in _guess_shapes(model):
        if shape not in seen:
            seen.add(shape)
            yield (BATCH, *shape), dtype


def _guess_shapes(model: nn.Module) -> Iterator[tuple[int, ...]]:
    for module in model.modules():
        config = getattr(module, "pretrained_cfg", None) or getattr(module, "default_cfg", None)
        size = config.get("input_size") if isinstance(config, dict) else None
        if size:
            yield tuple(size)
    channels = dict.fromkeys(m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d))
    # The first convolution registered need not be the first used; images have few channels.
    for count in [c for i, c in enumerate(channels) if i == 0 or c <= 4]:
        for side in SIDES:
            yield count, side, side
    widths = dict.fromkeys(m.in_features for m in model.modules() if isinstance(m, nn.Linear))
    for width in list(widths)[:8]:
        for count in (3, 1):
            side = math.isqrt(width // count)
            if count * side * side == width:
                yield count, side, side
        yield (width,)


def _run(model: nn.Module, stage: Stage, shape: tuple[int, ...], dtype: torch.dtype) -> Trace:
    with ExitStack() as stack:
        for context in quiet(model):
            stack.enter_context(context)
        twin, tensors, modules = copy_of(model, stage)
        result = Trace(None, modules, tensors, values=stage.device_for is None, copy=twin)

        def record(module: nn.Module, _: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.is_inference():
                raise ProbeError("inference_mode inside the forward hides part of it")
            node = getattr(output, "grad_fn", None)
            if node is not None and id(module) in modules:
                result.calls.append((modules[id(module)], node))

        for module in twin.modules():
            stack.callback(module.register_forward_hook(record).remove)
        for mode in stage.modes:
            stack.enter_context(mode)
        device = next((tensor.device for tensor in twin.parameters()), None)
        result.output = twin(torch.zeros(shape, dtype=dtype, device=device))
        return result


def quiet(model: nn.Module) -> Iterator[AbstractContextManager]:
    """Gradients on, compiled parts eager, random state put back, no log of failed attempts."""
    yield _silent(logging.getLogger("torch._subclasses.fake_tensor"))
    yield torch.inference_mode(False)
    yield torch.enable_grad()
    yield torch.random.fork_rng(devices={p.device for p in model.parameters() if p.is_cuda})
    if "torch._dynamo" in sys.modules:
        yield torch.compiler.set_stance("force_eager")


@contextmanager
def _silent(logger: logging.Logger) -> Iterator[None]:
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]


def _describe(output: Any) -> str:
    if isinstance(output, Tensor):
        return str(list(output.shape))
    return type(output).__name__
