"""DeviceLoader.from_loader: the DataLoader's own batches, or a word on why they stay there."""

import warnings
from collections import Counter

import pytest
import torch
from check import assert_same_bits
from test_lift import (
    CIFAR,
    cifar10_v1,
    cifar100_v2,
    folder_cropped,
    gtsrb_resized,
    make_tensors,
    tensor_subset,
)
from torch.utils.data import DataLoader, TensorDataset, default_collate
from torchvision.transforms import v2

from fst_fast import Augment, DeviceLoader, evaluate
from fst_fast.data.prefetch import HostLoader
from fst_fast.triggers import BadNets

PIPELINES = (cifar10_v1, cifar100_v2, gtsrb_resized, folder_cropped, tensor_subset)


@pytest.mark.parametrize("make", PIPELINES)
def test_five_pipelines_to_the_last_bit(make, tmp_path, monkeypatch):
    loader = DataLoader(make(tmp_path, monkeypatch), batch_size=3)
    lifted = DeviceLoader.from_loader(loader, "cpu")
    assert isinstance(lifted, DeviceLoader)
    assert len(lifted) == len(loader)
    for _ in range(2):
        for (images, labels), (wanted, wanted_labels) in zip(lifted, loader, strict=True):
            assert_same_bits(images, wanted.as_subclass(torch.Tensor), name="images")
            assert torch.equal(labels, wanted_labels)


def test_augmentation_has_the_same_distribution():
    pixels = torch.arange(12 * 3).view(1, 3, 3, 4).float() / 255
    many = TensorDataset(pixels.expand(4000, -1, -1, -1), torch.zeros(4000, dtype=torch.int64))
    crop = v2.Compose([v2.RandomCrop((3, 4), padding=1), v2.RandomHorizontalFlip()])
    by_torchvision = Counter(crop(image).numpy().tobytes() for image, _ in many)
    loader = DeviceLoader(
        (many.tensors[0] * 255).round().to(torch.uint8).permute(0, 2, 3, 1),
        many.tensors[1],
        4000,
        augment=Augment(pad=1, flip=True),
    )
    [(images, _)] = loader
    ours = Counter(image.contiguous().numpy().tobytes() for image in images)
    assert set(ours) == set(by_torchvision)
    assert len(ours) == 18
    # Five standard deviations of a count with probability 1/18.
    for counts in (ours, by_torchvision):
        assert all(abs(count - 4000 / 18) < 5 * (4000 / 18) ** 0.5 for count in counts.values())


def test_settings_are_carried_over_and_options_added():
    torch.manual_seed(3)
    loader = DataLoader(make_tensors(9), batch_size=4, shuffle=True, drop_last=True)
    lifted = DeviceLoader.from_loader(loader, "cpu", trigger=BadNets(), poisoned=0.5, seed=2)
    assert (lifted.batch_size, lifted.shuffle, lifted.drop_last) == (4, True, True)
    assert lifted.mask.sum() == 4
    assert len(lifted) == 2
    first, second = (torch.cat([labels for _, labels in lifted]) for _ in range(2))
    assert not torch.equal(first, second)


def test_what_is_not_recognised_stays_and_says_so_once():
    loader = DataLoader(
        make_tensors(9), batch_size=4, collate_fn=lambda rows: default_collate(rows)
    )
    with pytest.warns(UserWarning, match="from_loader: left on the host: collate_fn") as caught:
        stays = DeviceLoader.from_loader(loader, "cpu")
    assert len(caught) == 1
    assert "\n" not in str(caught[0].message)
    assert isinstance(stays, HostLoader)
    assert len(stays) == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [len(labels) for _, labels in stays] == [4, 4, 1]
    with pytest.raises(ValueError, match="trigger must be left out, as the loader stays"):
        DeviceLoader.from_loader(loader, "cpu", trigger=BadNets())


class Numbers:
    """A loader that may fail, and counts what was taken from it."""

    def __init__(self, fails_at=None):
        self.taken, self.fails_at = 0, fails_at

    def __len__(self):
        return 10

    def __iter__(self):
        for number in range(10):
            if number == self.fails_at:
                raise OSError("the disk is gone")
            self.taken += 1
            yield torch.full((2, 3, 4, 4), float(number)), torch.tensor([number, number])


def test_batches_come_in_order_from_the_thread():
    ahead = HostLoader(Numbers(), torch.device("cpu"))._ahead()
    got = [(images[0, 0, 0, 0].item(), labels.tolist()) for images, labels in ahead]
    assert got == [(number, [number, number]) for number in range(10)]


def test_an_error_of_the_loader_is_raised_where_batches_are_read():
    ahead = HostLoader(Numbers(fails_at=3), torch.device("cpu"))._ahead()
    for _ in range(3):
        next(ahead)
    with pytest.raises(OSError, match="the disk is gone"):
        next(ahead)


def test_stopping_early_stops_the_thread():
    numbers = Numbers()
    ahead = HostLoader(numbers, torch.device("cpu"))._ahead()
    next(ahead)
    ahead.close()
    assert numbers.taken < 10


def test_a_lifted_loader_is_evaluated_like_the_dataloader(tmp_path, monkeypatch):
    loader = DataLoader(cifar10_v1(tmp_path, monkeypatch), batch_size=7)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 10))
    expected = evaluate(model, loader, BadNets(), normalize=CIFAR)
    assert evaluate(model, DeviceLoader.from_loader(loader, "cpu"), BadNets()) == expected
