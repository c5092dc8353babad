"""The devices, precisions and memory layouts that a model computes with."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

PRECISIONS = ("auto", "fp32", "bf16", "fp16")
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_device(device: torch.device | str | None, model: nn.Module) -> torch.device:
    """The device to work on: as given; else the model's GPU; else any GPU; else the CPU.

    Raises:
        ValueError: an unknown device, or one that is not there.
    """
    if device is None:
        own = next((p.device for p in model.parameters()), torch.device("cpu"))
        use_gpu = own.type == "cpu" and torch.cuda.is_available()
        return torch.device("cuda") if use_gpu else own
    return existing_device(device)


def existing_device(device: torch.device | str) -> torch.device:
    """The device of this name, where this machine has it.

    Raises:
        ValueError: an unknown device, or one that is not there.
    """
    try:
        resolved = torch.device(device)
        torch.empty(1, device=resolved)
    except (RuntimeError, AssertionError, ImportError, TypeError) as error:
        reason = str(error).partition("\n")[0].partition(". ")[0]  # PyTorch's may fill a screen
        raise ValueError(
            f"device must be one that this machine has, got {device!r}: {reason}; "
            'use device="cpu" or leave it out'
        ) from None
    return resolved


def resolve_precision(
    precision: str, device: torch.device, dtype: torch.dtype = torch.float32
) -> str:
    """ "fp32", "bf16" or "fp16"; "auto" is the fastest that the device has instructions for.

    A model whose weights are not float32 keeps to its own dtype, which is called "fp32" here.

    Raises:
        ValueError: an unknown precision.
    """
    if not isinstance(precision, str) or precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {list(PRECISIONS)}, got {precision!r}")
    if precision != "auto":
        return precision
    if dtype != torch.float32:
        return "fp32"
    if device.type != "cuda":
        return "bf16" if native_bf16() else "fp32"
    # PyTorch looks at the current GPU.
    with torch.cuda.device(device):
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def dtype_of(model: nn.Module) -> torch.dtype:
    """Return the dtype of the model's weights; float32 where it has none."""
    return next((p.dtype for p in model.parameters()), torch.float32)


def native_bf16() -> bool:
    """Return whether this CPU has instructions that multiply bfloat16 (AVX-512 BF16 or AMX)."""
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    """Autocast for a resolved precision; for "fp32" the model's own dtype is used."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, AUTOCAST[precision])


def memory_layout(model: nn.Module, images: Tensor) -> torch.memory_format:
    """channels_last where the model takes it; contiguous where it does not, or may crash.

    Convolutions are faster in channels-last, but ``x.view(len(x), -1)`` after them is refused by
    PyTorch, so two images are tried. The model should be in eval mode.
    """
    if safe_layout(model, images.device) == torch.contiguous_format:
        return torch.contiguous_format
    with torch.no_grad():
        try:
            model(images[:2].contiguous(memory_format=torch.channels_last))
        except Exception:
            # The first real batch meets the same error again, with nothing hidden.
            return torch.contiguous_format
    return torch.channels_last


def safe_layout(model: nn.Module, device: torch.device) -> torch.memory_format:
    """channels_last, but for models whose backward pass may then crash the process.

    On CPUs without AVX-512, oneDNN 3.12 writes past its memory in a channels-last 1x1 convolution
    with a stride and fewer than 8 input channels.
    """
    crashes = device.type == "cpu" and any(
        isinstance(m, nn.Conv2d)
        and m.kernel_size == (1, 1)
        and m.stride != (1, 1)
        and m.in_channels // m.groups < 8
        for m in model.modules()
    )
    return torch.contiguous_format if crashes else torch.channels_last
