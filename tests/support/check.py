"""What counts as right. Tolerances live here and nowhere else."""

import torch


def assert_same_bits(got, expected, *, name):
    """Equal to the last bit, NaN included."""
    assert got.dtype == expected.dtype, f"{name}: {got.dtype}, expected {expected.dtype}"
    same = torch.equal(got.nan_to_num(nan=12345), expected.nan_to_num(nan=12345))
    assert same, f"{name}: differs by up to {(got.double() - expected.double()).abs().max():.2e}"


def assert_close_to_rounding(got, expected, *, name):
    """Two steps of the dtype at the largest element: for a rounding that may go either way."""
    error = (got.double() - expected.double()).abs().max().item()
    slack = 2 * torch.finfo(got.dtype).eps * expected.double().abs().max().item()
    assert error <= slack, f"{name}: differs by up to {error:.2e}, expected at most {slack:.2e}"


def assert_no_worse_than_torch(got, eager, truth, *, name, rounded_to=None):
    """At most twice eager PyTorch's own error in the same dtype, and one rounding to spare.

    The truth is float64 itself, so a float64 result is allowed the truth's own error as well.
    ``rounded_to``: the dtype that factors are rounded to on the way, where it is not got's. A
    scalar's error is then chance, on either side, so one rounding of that kind is to spare.
    """
    ours = (got.double() - truth).abs().max().item()
    theirs = (eager.double() - truth).abs().max().item()
    # On a GPU cuBLAS adds up in whatever order it likes, for eager in another one.
    roundings = 64 if got.dtype == torch.float64 else 4 if got.is_cuda else 1
    eps = torch.finfo(got.dtype if rounded_to is None else rounded_to).eps
    floor = roundings * eps * truth.abs().max().item()
    assert ours <= 2 * theirs + floor, f"{name}: error {ours:.2e}, torch's own {theirs:.2e}"


def assert_norm(tensor, norm, *, name):
    """The Frobenius norm, to a few roundings: those of the elements and of the measurement."""
    got = tensor.double().norm().item()
    slack = 16 * torch.finfo(tensor.dtype).eps * norm
    assert abs(got - norm) <= slack, f"{name}: norm {got:.9f}, expected {norm:.9f}"
