"""Shapes that are known without running a function are those the function gives."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fst_fast.heads.shapes import SHORTCUTS

A, B = torch.randn(2, 8, 9, 7), torch.randn(2, 8, 9, 7)
CALLS = {
    "conv2d": [
        (F.conv2d, (A, torch.randn(6, 8, 3, 2), None, 2, (1, 0)), {"dilation": (2, 1)}),
        (F.conv2d, (A, torch.randn(6, 4, 1, 1), torch.randn(6)), {"stride": (1, 3), "groups": 2}),
        (F.conv2d, (A, torch.randn(6, 8, 3, 3)), {"padding": "same"}),
    ],
    "elementwise": [
        (F.relu, (A,), {}),
        (F.hardtanh, (A, 0.0, 1.0), {}),
        (F.hardtanh, (A, -1.0, 1.0, True), {}),
        (F.silu, (A,), {"inplace": True}),
        (F.gelu, (A,), {"approximate": "tanh"}),
    ],
    "norms": [
        (F.batch_norm, (A, torch.zeros(8), torch.ones(8)), {}),
        (F.layer_norm, (A, (9, 7)), {}),
    ],
    "products": [
        (F.linear, (A, torch.randn(5, 7), torch.randn(5)), {}),
        (F.scaled_dot_product_attention, (A, B, B), {}),
    ],
    "means": [
        (F.adaptive_avg_pool2d, (A, 1), {}),
        (F.adaptive_avg_pool2d, (A, (2, 3)), {}),
        (torch.mean, (A, (2, 3)), {}),
        (Tensor.mean, (A, [-1, -2], True), {}),
        (Tensor.mean, (A, 3), {"keepdim": True}),
    ],
    "sums": [(torch.add, (A, B), {}), (Tensor.__mul__, (A, B), {}), (Tensor.add, (A, 2), {})],
}


@pytest.mark.parametrize("name", CALLS)
def test_a_shape_that_is_known_is_the_functions_own(name):
    for function, args, kwargs in CALLS[name]:
        args = [a.clone() if isinstance(a, Tensor) else a for a in args]
        known = SHORTCUTS[function](*args, **kwargs)
        wanted = function(*args, **kwargs)
        if known is None:
            assert kwargs.get("padding") == "same" or args[1] == 2
            continue
        assert (known.shape, known.dtype) == (wanted.shape, wanted.dtype), function
        assert (known is args[0]) == (wanted is args[0]), function


@pytest.mark.parametrize(
    ("function", "args"),
    [
        (F.conv2d, (A, torch.randn(6, 7, 3, 3))),
        (F.conv2d, (A, torch.randn(6, 8, 11, 3))),
        (F.conv2d, (A, torch.randn(6, 8, 3, 3).double())),
        (F.batch_norm, (A, torch.zeros(7), torch.ones(7))),
        (F.layer_norm, (A, (9, 8))),
        (F.linear, (A, torch.randn(5, 8))),
        (torch.mean, (A, (3, 3))),
        (F.scaled_dot_product_attention, (A, B[..., :3], B)),
    ],
)
def test_what_does_not_fit_is_left_to_the_function_to_refuse(function, args):
    assert SHORTCUTS[function](*args) is None
    with pytest.raises(RuntimeError):
        function(*args)
