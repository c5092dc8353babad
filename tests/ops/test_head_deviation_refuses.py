"""What head_deviation_loss refuses, and in which words."""

import pytest
import torch
from head_deviation_cases import ALPHA, PLACES, REGIMES, TENSORS, Batch, each_place

from fst_fast.ops import head_deviation_loss

NATIVE = [p for p in PLACES if p.values[0][0] in ("cpu", "cuda")]


@each_place
@REGIMES
@pytest.mark.parametrize("label", [4000, -1])
def test_a_label_out_of_range_is_named(place, shape, label):
    backend, device = place
    batch = Batch(shape, device=device)
    batch.labels[2:4] = label
    if device == "cpu":
        with pytest.raises(ValueError, match=rf"labels must be .* got {label} in row 2"):
            batch.ours(backend)
        return
    got = batch.ours(backend)
    assert got.loss.isnan()
    assert got.invalid.item() == 2
    with pytest.raises(ValueError, match=rf"labels must be .* got {label} in row 2"):
        got.check(batch.labels)
    # The context is alive, and the next batch is right.
    batch.labels[2:4] = 0
    assert batch.ours(backend).loss.isfinite()


REFUSALS = {
    "features rank": ({"features": torch.ones(3)}, r"features must be \[B, D\], got \[3\]"),
    "features integers": ({"features": torch.ones(3, 9).int()}, "features must be float64.*int32"),
    "weight shape": ({"weight": torch.ones(4, 8)}, r"weight must be \[K, 9\].*got \[4, 8\]"),
    "no classes": ({"weight": torch.ones(0, 9)}, "weight must be .* at least 1"),
    "weight dtype": ({"weight": torch.ones(4, 9).half()}, "weight must be .*float32.*float16"),
    "weight device": ({"weight": torch.ones(4, 9, device="meta")}, "weight must be on cpu.*meta"),
    "bias shape": ({"bias": torch.ones(3)}, r"bias must be \[4\], got \[3\]"),
    "bias dtype": ({"bias": torch.ones(4).double()}, "bias must be torch.float32 like weight"),
    "labels shape": ({"labels": torch.ones(5).long()}, r"labels must be \[6\], got \[5\]"),
    "labels dtype": ({"labels": torch.ones(6).int()}, r"labels must be torch.int64.*int32; use"),
    "weight0 shape": ({"weight0": torch.ones(4)}, r"weight0 must be \[4, 9\]"),
    "weight0 grad": (
        {"weight0": torch.ones(4, 9, requires_grad=True)},
        r"weight0 must not .*use weight0.detach\(\)",
    ),
    "weight0 missing": ({"weight0": None}, "weight0 must be the weight before tuning, got None"),
    "alpha NaN": ({"alpha": float("nan")}, "alpha must be finite, got nan"),
    "alpha shape": ({"alpha": torch.ones(1)}, r"alpha must be \[\], got \[1\]"),
    "alpha dtype": ({"alpha": torch.ones(()).double()}, "alpha must be torch.float32"),
    "class weight shape": ({"class_weight": torch.ones(3)}, r"class_weight must be \[4\]"),
    "class weight dtype": ({"class_weight": torch.ones(4).half()}, "class_weight must be torch.fl"),
    "class weight grad": (
        {"class_weight": torch.ones(4, requires_grad=True)},
        "class_weight must not require grad",
    ),
    "reduction": ({"reduction": "max"}, "reduction must be mean, sum or none, got 'max'"),
    "smoothing": ({"label_smoothing": 1.5}, r"label_smoothing must be in \[0, 1\], got 1.5"),
    "smoothing NaN": ({"label_smoothing": float("nan")}, r"label_smoothing must be in \[0, 1\]"),
    "backend": ({"backend": "tpu"}, "backend must be one of reference, cpu, triton, cuda"),
}


@pytest.mark.parametrize("case", REFUSALS)
@pytest.mark.parametrize("backend", [p.values[0][0] for p in PLACES if p.values[0][1] == "cpu"])
def test_bad_input_is_refused_in_words(case, backend):
    change, message = REFUSALS[case]
    batch = Batch((6, 9, 4))
    named = {name: getattr(batch, name) for name in TENSORS}
    named |= {"alpha": ALPHA, "backend": backend} | change
    with pytest.raises(ValueError, match=f"head_deviation_loss: {message}"):
        head_deviation_loss(**named)


@pytest.mark.parametrize("place", NATIVE)
@pytest.mark.parametrize("case", [c for c in REFUSALS if c not in ("backend", "weight device")])
def test_native_op_guards_itself(place, case):
    """Whoever calls torch.ops.fst_fast_native directly must not reach memory that is not theirs."""
    change = dict(REFUSALS[case][0])
    batch = Batch((6, 9, 4), device=place[1])
    named = {name: getattr(batch, name) for name in TENSORS}
    alpha = change.pop("alpha", ALPHA)
    named |= {"class_weight": None, "row_grad": None, "weight_scale": None}
    named |= {"alpha_scale": alpha if isinstance(alpha, torch.Tensor) else None}
    named |= {"alpha": 1.0 if isinstance(alpha, torch.Tensor) else alpha, "reduction": "mean"}
    named |= {"label_smoothing": 0.0, "ignore_index": -100, "output_mask": [True] * 3} | change
    moved = {
        name: value.to(place[1])
        if isinstance(value, torch.Tensor) and value.device.type != "meta"
        else value
        for name, value in named.items()
    }
    with pytest.raises(ValueError, match="head_deviation_loss: "):
        torch.ops.fst_fast_native.head_deviation_loss(**moved)
