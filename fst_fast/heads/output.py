"""The logits in what a model returns."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor


def logits_of(output: Any) -> Tensor:
    """The logits in a model's output: a tensor, ``.logits``, ``["logits"]`` or a 1-tuple of one.

    Raises:
        ValueError: the output is none of these, or its logits are not a floating tensor.

    Example:
        >>> fst_fast.heads.logits_of({"logits": torch.zeros(2, 3)}).shape
        torch.Size([2, 3])
    """
    logits = output
    if not isinstance(output, Tensor):
        if isinstance(getattr(output, "logits", None), Tensor):
            logits = output.logits
        elif isinstance(output, Mapping):
            logits = output.get("logits")
        elif isinstance(output, (tuple, list)) and len(output) == 1:
            logits = output[0]
    if isinstance(logits, Tensor) and logits.is_floating_point():
        return logits
    raise ValueError(
        "logits_of: output must be a floating tensor, an object or mapping with 'logits', or a "
        f"1-tuple, got {_describe(output)}; wrap the model so that it returns its logits"
    )


def tensors_in(output: Any) -> Iterator[Tensor]:
    """All tensors of a nested output."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for item in output.values():
            yield from tensors_in(item)
    elif isinstance(output, (tuple, list)):
        for item in output:
            yield from tensors_in(item)


def _describe(output: Any) -> str:
    if isinstance(output, Tensor):
        return f"a {output.dtype} tensor"
    size = f" of {len(output)}" if isinstance(output, (tuple, list, Mapping)) else ""
    return f"{type(output).__name__}{size}"
