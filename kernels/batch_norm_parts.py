"""What the Triton kernels of batch_norm_act and of its backward share."""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements that a program holds at a time, and channels beside each other among them, at most.
ELEMENTS = 2048
MOST_CHANNELS = 64
# Programs that share the rows of a channel, at most; one program adds up what they found.
MOST_SLICES = 128
MERGED_CHANNELS = 16


@triton.jit
def offsets_of(row, channel, channels, pixels, PLANAR: tl.constexpr):
    """Where the elements [rows, channels] are; a row is one pixel of one image."""
    # int32 offsets overflow past 2**31 elements.
    row = row.to(tl.int64)[:, None]
    if PLANAR:
        return (row // pixels * channels + channel[None, :]) * pixels + row % pixels
    return row * channels + channel[None, :]


@triton.jit
def line_of(
    mean_ptr,
    var_ptr,
    weight_ptr,
    bias_ptr,
    channel,
    mask,
    EPS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Mean, scale, bias and 1 / standard deviation of channels: y = (x - mean) * scale + bias."""
    mean = tl.load(mean_ptr + channel, mask=mask, other=0)
    # An absent channel has the variance 1, of which no root is zero.
    var = tl.load(var_ptr + channel, mask=mask, other=1)
    rstd = 1 / tl.sqrt(var + EPS)
    scale = rstd
    if HAS_WEIGHT:
        scale = tl.load(weight_ptr + channel, mask=mask, other=0) * rstd
    bias = tl.zeros_like(mean)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + channel, mask=mask, other=0)
    return mean, scale, bias, rstd


@triton.jit
def activation_input(x, residual_ptr, offsets, mask, mean, scale, bias, HAS_RESIDUAL: tl.constexpr):
    """What the ReLU is given; forward and backward must find the same bits."""
    value = (x - mean[None, :]) * scale[None, :] + bias[None, :]
    if HAS_RESIDUAL:
        value += tl.load(residual_ptr + offsets, mask=mask, other=0).to(x.dtype)
    return value


class Blocks:
    """How [rows, channels] is divided among programs."""

    def __init__(self, x: Tensor) -> None:
        images, self.channels, height, width = x.shape
        self.pixels = height * width
        self.rows = images * self.pixels
        self.planar = not x.is_contiguous(memory_format=torch.channels_last)
        self.block_channels = min(triton.next_power_of_2(self.channels), MOST_CHANNELS)
        if self.planar:
            # Neighbours in memory are pixels.
            self.block_channels = min(self.block_channels, 4)
        wanted = ELEMENTS // self.block_channels
        self.block_rows = min(triton.next_power_of_2(self.rows), wanted)
        self.tiles = triton.cdiv(self.channels, self.block_channels)
        self.row_blocks = triton.cdiv(self.rows, self.block_rows)
        self.slices = min(self.row_blocks, MOST_SLICES)
        self.options = {
            # Multiply and add are rounded one by one, so that the backward finds the forward's
            # bits.
            "enable_fp_fusion": False,
            "PLANAR": self.planar,
            "BLOCK_ROWS": self.block_rows,
            "BLOCK_CHANNELS": self.block_channels,
        }

    @property
    def collecting(self) -> tuple[int, int]:
        return self.slices, self.tiles

    @property
    def applying(self) -> tuple[int, int]:
        return self.row_blocks, self.tiles

    @property
    def merging(self) -> tuple[int]:
        return (triton.cdiv(self.channels, MERGED_CHANNELS),)
