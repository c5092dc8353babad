"""A batch that takes too much memory: split where that gives the same result, else told."""

import pytest
import torch
from purify_cases import equal_states, make_batches, make_model, quick
from torch import nn

import fst_fast
from fst_fast import methods


class Narrow(nn.Module):
    """Has room for so many images at once, on the way forward or back."""

    def __init__(self, room, batch_norm=False, error=None):
        super().__init__()
        self.net = make_model() if batch_norm else without_batch_norm()
        self.room, self.error = room, error or on_gpu()
        self.seen = []

    def forward(self, x):
        if self.training:
            self.seen.append(len(x))
            if len(x) > self.room:
                raise self.error
        return self.net(x)


def without_batch_norm():
    layers = [m for m in make_model() if not isinstance(m, nn.BatchNorm2d)]
    return nn.Sequential(*layers)


def batches():
    return [*make_batches(2, size=12), *make_batches(1, size=7)]


def on_gpu():
    return torch.OutOfMemoryError("CUDA out of memory")


def on_cpu():
    return RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")


@pytest.mark.parametrize("settings", [{"alpha": 0.1}, {"method": "fst_auto"}], ids=str)
@pytest.mark.parametrize("room", [11, 3, 1])
def test_split_batches_give_the_same_run(room, settings):
    tuned = quick(Narrow(room), batches(), epochs=4, **settings)
    whole = quick(without_batch_norm(), batches(), epochs=4, **settings)
    assert len(tuned.history) == len(whole.history)
    for one, other in zip(tuned.history, whole.history, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-5)
        assert one.clean_accuracy == other.clean_accuracy
    for got, want in zip(tuned.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_a_table_on_the_device_loses_no_batch():
    images = torch.randint(0, 256, (20, 8, 8, 3), generator=torch.Generator().manual_seed(4))
    loaders = [
        fst_fast.DeviceLoader(images.to(torch.uint8), torch.arange(20) % 4, 8, augment="cifar")
        for _ in range(2)
    ]
    tuned = quick(Narrow(4), loaders[0], alpha=0.1)
    whole = quick(without_batch_norm(), loaders[1], alpha=0.1)
    assert tuned.history[-1].loss == pytest.approx(whole.history[-1].loss, rel=1e-5)


def test_split_no_further_than_needed():
    model = Narrow(6)
    quick(model, batches(), alpha=0.1, inplace=True)
    assert max(model.seen[1:]) == 6


@pytest.mark.parametrize("make", [on_gpu, on_cpu])
def test_with_batch_norm_the_size_that_fits_is_told(make):
    model = Narrow(3, batch_norm=True, error=make())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(
        RuntimeError,
        match=r"a batch of 12 takes more memory than there is on cpu, and cannot be split, as "
        r"batch norm averages over all of it; a batch of 3 fits: give the loader batch_size=3",
    ):
        quick(model, batches(), alpha=0.1)
    assert equal_states(model.state_dict(), before)


def test_a_loss_of_the_whole_batch_is_not_split():
    class Whole(type(methods.get("ft"))):
        def loss(self, logits, labels, head):
            return logits.std() + super().loss(logits, labels, head)

    with pytest.raises(RuntimeError, match=r"its loss is one of the whole; a batch of 6 fits"):
        quick(Narrow(6), batches(), method=Whole())


def test_where_nothing_fits():
    with pytest.raises(RuntimeError, match=r"nothing smaller fits; use a machine with more memory"):
        quick(Narrow(0), batches(), alpha=0.1)


def test_other_errors_are_passed_on():
    with pytest.raises(RuntimeError, match="a shape"):
        quick(Narrow(3, error=RuntimeError("a shape is wrong")), batches(), alpha=0.1)
