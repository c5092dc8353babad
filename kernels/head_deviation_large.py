"""``head_deviation_loss`` for many classes: matrix products of PyTorch, kernels between them.

Logits exist for a tile of rows at a time, in the compute dtype. Their gradient takes their place,
in the dtype of features, and d_weight adds up over the tiles in the compute dtype.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .head_deviation_gradients import head_deviation_finish_kernel, head_deviation_weight_kernel
from .head_deviation_parts import Problem
from .head_deviation_rows import head_deviation_rows_kernel

# Matrix products want every row of an operand to begin at a multiple of 16 bytes.
ALIGN = 64


class Sizes(NamedTuple):
    tile_bytes: int  # what a tile may always take
    tile_rows: int  # what it always has; fewer make slow, and in the interpreter inexact, products
    tile_step: int  # its rows are a multiple of this
    row: int  # logits of a row at a time
    weight: int  # elements of d_weight
    rows: int  # of d_logits at a time, for d_bias
    classes: int  # of d_bias


GPU = Sizes(2**26, 128, 128, 2048, 4096, 256, 32)
# Takes as long over a small block as over a large one. Small tests are to see more than one tile.
INTERPRETER = Sizes(2**13, 8, 1, 8192, 2**16, 32, 4096)


def choose_sizes(problem: Problem) -> Sizes:
    return GPU if problem.features.is_cuda else INTERPRETER


@dataclass
class Work:
    """Scratch of one call; every tile uses the same."""

    tile_rows: int
    logits: Tensor  # [tile_rows, K], rows aligned
    d_logits: Tensor  # likewise, in the same memory
    features: Tensor  # [B, D], ignored rows 0
    weight: Tensor  # [K, D] in the dtype of features
    d_weight: Tensor  # [K, D] in the compute dtype; d_weight itself where it is of that
    losses: Tensor  # [B]
    hits: Tensor  # [B]
    totals: Tensor  # what store_totals stores
    overlaps: Tensor  # a part of <W, W0> for every program of the weight kernel
    sums: Tensor  # [K], of d_logits so far


def run_large(problem: Problem) -> None:
    B = len(problem.features)
    work = _prepare(problem)
    for first in range(0, max(B, 1), work.tile_rows):
        r = slice(first, min(first + work.tile_rows, B))
        logits = work.logits[: r.stop - first]
        _multiply(logits, problem.features[r], work.weight.T)
        _rows(problem, work, r)
        # The interpreter cuts bfloat16 off instead of rounding it, so there it is PyTorch's turn.
        d_logits = work.d_logits[: r.stop - first].to(problem.features.dtype)
        if problem.wanted[0]:
            d_features = problem.output.d_features[r]
            exact = d_features.dtype == problem.compute
            products = d_features if exact else torch.empty_like(d_features, dtype=problem.compute)
            _multiply(products, d_logits, work.weight)
            torch.mul(products, work.totals[3], out=d_features)
        if problem.wanted[1]:
            _multiply(work.d_weight, d_logits.T, work.features[r], add=first > 0)
        if r.stop == B:
            _weight(problem, work)
        _finish(problem, work, d_logits, r)


def choose_tile(problem: Problem) -> int:
    """Rows whose logits exist at a time, from shapes and dtypes alone.

    With whatever else is allocated they take a quarter of the float32 logits of all rows; or
    tile_bytes, if that is more.
    """
    B, D, K = problem.sizes
    sizes = choose_sizes(problem)
    narrow, wide = problem.features.dtype.itemsize, problem.compute.itemsize
    row = triton.cdiv(K, ALIGN) * ALIGN * wide + (D * wide if narrow < wide else 0)
    taken = B * D * narrow if problem.wanted[1] else 0
    if problem.weight.dtype != problem.features.dtype:
        taken += K * D * narrow
    if problem.weight.dtype != problem.compute and problem.wanted[1]:
        taken += K * D * wide
    most = max(max(B * K - taken, sizes.tile_bytes) // row, sizes.tile_rows)
    most -= most % sizes.tile_step
    # As many tiles, of the same size.
    rows = triton.cdiv(B, max(triton.cdiv(B, most), 1))
    return max(min(triton.cdiv(rows, sizes.tile_step) * sizes.tile_step, B), 1)


def _prepare(problem: Problem) -> Work:
    B, D, K = problem.sizes
    rows = choose_tile(problem)
    dtype, device = problem.features.dtype, problem.features.device

    def empty(*shape: int, dtype: torch.dtype = problem.compute) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    logits = empty(rows, triton.cdiv(K, ALIGN) * ALIGN)
    as_is = dtype == torch.bfloat16 and not logits.is_cuda
    d_logits = logits if as_is else logits.view(dtype)
    d_weight = problem.output.d_weight
    if problem.wanted[1] and d_weight.dtype != problem.compute:
        d_weight = empty(K, D)
    elements = K * D if problem.wanted[1] or problem.weight0 is not None else 0
    return Work(
        rows,
        logits[:, :K],
        d_logits[:, :K],
        empty(B, D, dtype=dtype) if problem.wanted[1] else problem.features,
        problem.weight.to(dtype),
        d_weight,
        problem.output.cross_entropy if problem.reduction == "none" else empty(B),
        empty(B, dtype=torch.int32),
        empty(4),
        empty(triton.cdiv(elements, choose_sizes(problem).weight), dtype=torch.float64),
        empty(K if problem.wanted[2] and rows < B else 0),
    )


def _multiply(out: Tensor, a: Tensor, b: Tensor, add: bool = False) -> None:
    """out (+)= a @ b in out's dtype, to which narrower ones add up without rounding."""
    if not a.is_cuda:
        # For the interpreter. Few rows in float32, or not transposed, lose digits on a CPU.
        product = torch.mm(b.T.double(), a.T.double()).T
        out.copy_(out + product if add else product)
        return
    wider = {} if a.dtype == out.dtype else {"out_dtype": out.dtype}
    if add:
        torch.addmm(out, a, b, **wider, out=out)
    else:
        torch.mm(a, b, **wider, out=out)


def _rows(problem: Problem, work: Work, r: slice) -> None:
    B, D, K = problem.sizes
    block = min(max(triton.next_power_of_2(K), 128), choose_sizes(problem).row)
    head_deviation_rows_kernel[(max(r.stop - r.start, 1),)](
        work.logits,
        work.logits.stride(0),
        work.d_logits,
        work.d_logits.stride(0),
        K if any(problem.wanted) else 0,
        *problem.optional(problem.bias),
        *problem.optional(problem.weight_scale),
        *problem.optional(problem.class_weight),
        problem.labels,
        *problem.row_grads(),
        *problem.strength(),
        work.losses,
        work.hits,
        work.totals,
        problem.output.invalid,
        problem.features,
        work.features,
        D if problem.wanted[1] else 0,
        r.start,
        B,
        K,
        problem.label_smoothing,
        problem.ignore_index,
        MEAN=problem.reduction == "mean",
        BLOCK=block,
        enable_fp_fusion=True,
        num_warps=8 if block > 1024 else 4,
    )


def _weight(problem: Problem, work: Work) -> None:
    """d_weight from its products, and <W, W0>."""
    if len(work.overlaps) == 0:
        return
    d_weight = problem.output.d_weight
    head_deviation_weight_kernel[(len(work.overlaps),)](
        work.d_weight,
        problem.weight,
        *problem.optional(problem.weight0),
        d_weight,
        d_weight.numel(),
        work.overlaps,
        work.totals,
        BLOCK=choose_sizes(problem).weight,
        enable_fp_fusion=True,
        num_warps=8,
    )


def _finish(problem: Problem, work: Work, d_logits: Tensor, r: slice) -> None:
    B, _, K = problem.sizes
    sizes = choose_sizes(problem)
    programs = triton.cdiv(K, sizes.classes) if problem.wanted[2] else 0
    if programs == 0 and r.stop < B:
        return
    head_deviation_finish_kernel[(1 + programs,)](
        work.losses,
        work.hits,
        work.totals,
        work.overlaps,
        len(work.overlaps),
        *problem.strength(),
        *problem.optional(problem.weight_scale),
        *problem.results(),
        d_logits,
        d_logits.stride(0),
        r.stop - r.start,
        r.start,
        work.sums,
        problem.output.d_bias,
        B,
        K,
        BY_ROW=problem.reduction == "none",
        BLOCK=1024,
        BLOCK_ROWS=sizes.rows,
        BLOCK_CLASSES=sizes.classes,
        enable_fp_fusion=True,
        num_warps=8,
    )
