"""Context managers that change a model or the random state for a while."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn


@contextmanager
def on_device(device: torch.device) -> Iterator[None]:
    """Make a GPU the current one, whose stream events and kernels then take; put it back after."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device):
        yield


@contextmanager
def evaluating(model: nn.Module, device: torch.device) -> Iterator[None]:
    """The model in eval mode on the device, the current one; all is put back afterwards."""
    modes = {module: module.training for module in model.modules()}
    own = next((p.device for p in model.parameters()), device)
    try:
        with on_device(device):
            model.to(device).eval()
            yield
    finally:
        model.to(own)
        for module, training in modes.items():
            module.training = training


@contextmanager
def tuning(model: nn.Module, device: torch.device) -> Iterator[None]:
    """The model on the device and in eval mode; device, layout and flags are put back."""
    own = next((p.device for p in model.parameters()), device)
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    was_channels_last = any(
        p.ndim == 4 and p.is_contiguous(memory_format=torch.channels_last) and not p.is_contiguous()
        for p in flags
    )
    try:
        if own.type != "meta":
            model.to(device)
        model.eval()
        yield
    finally:
        model.eval()
        model.zero_grad(set_to_none=True)
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
        if own.type != "meta":
            model.to(own)
        if not was_channels_last:
            model.to(memory_format=torch.contiguous_format)


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Whatever runs forward and backward within leaves no trace: buffers, modes, random state."""
    modes = {module: module.training for module in model.modules()}
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    kept = [(buffer, buffer.clone()) for buffer in model.buffers()]
    device = next((p.device for p in flags), torch.device("cpu"))
    try:
        with seeded(0, device):
            yield
    finally:
        with torch.no_grad():
            for buffer, value in kept:
                buffer.copy_(value)
        for module, training in modes.items():
            module.training = training
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch, NumPy and random, which transforms draw from; put their states back after."""
    # Transforms draw from NumPy's global state, so that is what must be seeded.
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        # torch.manual_seed would also seed the GPUs whose state is not put back.
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002


@contextmanager
def deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """Use only algorithms that give the same bits every time, if ``wanted``; put back after.

    Raises, within, RuntimeError where PyTorch has none for an operation.
    """
    if not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    fills = memory.fill_uninitialized_memory
    try:
        torch.use_deterministic_algorithms(True)
        # This debugging aid comes with it, and costs a pass over every new tensor.
        memory.fill_uninitialized_memory = False
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
            yield
    finally:
        memory.fill_uninitialized_memory = fills
        torch.use_deterministic_algorithms(before, warn_only=warned)
