"""Triggers of each image's own: reflections, networks' outputs, stored images."""

import math

import numpy as np
import pytest
import torch
import zoo_cases
from torch import nn

from fst_fast.triggers import SSBA, InputAware, PoisonInk, Refool


def make_images(count=5, height=12, width=10, channels=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (count, height, width, channels)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def hashed(seed, key, element):
    """In 0..1: the project's hash, in Python's own integers."""
    value = (seed + key * 0x9E3779B9 + element * 0x85EBCA6B) % 2**32
    value = (value ^ value >> 16) * 0x7FEB352D % 2**32
    value = (value ^ value >> 15) * 0x846CA68B % 2**32
    return ((value ^ value >> 16) >> 8) / 2**24


def ghostly(image, bank, key, seed, transmission):
    """Refool's ghost in float64, pixel by pixel."""
    height, width, channels = image.shape
    picture = bank[int(hashed(seed, key, 0) * len(bank))]
    shift = 3 + int(hashed(seed, key, 1) * 6)
    share = (38 + int(hashed(seed, key, 2) * 90)) / 256
    share = 1 - share if hashed(seed, key, 3) >= 0.5 else share
    out = np.zeros(image.shape)
    for row in range(height):
        for column in range(width):
            for c in range(channels):
                near = (picture[row, column, c] / 255) ** 2.2
                far = picture[max(row - shift, 0), max(column - shift, 0), c] / 255
                ghost = share * near + (1 - share) * far**2.2
                own = (image[row, column, c] / 255) ** 2.2
                light = transmission * own + (1 - transmission) * ghost
                out[row, column, c] = light ** (1 / 2.2) * 255
    return out


@pytest.mark.parametrize("transmission", [0.0, 0.4, 0.85])
@pytest.mark.parametrize("channels", [1, 3])
def test_refool_adds_a_ghost_in_linear_light(channels, transmission):
    images = make_images(channels=channels)
    bank = make_images(3, channels=channels, seed=1)
    trigger = Refool(bank, transmission, seed=11)
    keys = torch.tensor([0, 7, 3, 7, 10**6])
    got = trigger.apply(images, keys).numpy()
    for n, key in enumerate(keys.tolist()):
        exact = ghostly(images[n].numpy(), bank.numpy(), key, 11, transmission)
        # Truncated; fixed point may fall short of a whole byte by a little.
        assert (np.floor(exact + 0.02) >= got[n]).all()
        assert (np.floor(exact - 0.02) <= got[n]).all()


def test_refool_leaves_an_image_that_lets_all_its_light_through():
    images = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1)
    assert torch.equal(Refool(transmission=1).apply(images), images)


def test_refool_draws_by_key_and_seed():
    image = make_images(1).expand(40, -1, -1, -1)
    one = Refool().apply(image)
    assert torch.equal(one, Refool().apply(image))
    assert torch.equal(one[7:9], Refool().apply(image[:2], torch.tensor([7, 8])))
    assert not torch.equal(one, Refool(seed=1).apply(image))
    assert len({out.numpy().tobytes() for out in one}) > 30


def test_input_aware_blends_the_networks_outputs():
    images = make_images(300)
    mean, std = torch.tensor([0.5] * 3).view(3, 1, 1), torch.tensor([0.25] * 3).view(3, 1, 1)
    generator, mask = zoo_cases.networks(3)
    generator.train()
    trigger = InputAware(generator, mask, ((0.5,) * 3, (0.25,) * 3))
    before = {name: value.clone() for name, value in generator.state_dict().items()}
    got = trigger.apply(images)
    assert generator.training
    for name, value in generator.state_dict().items():
        assert torch.equal(value, before[name])
    x = (images.permute(0, 3, 1, 2).float() / 255 - mean) / std
    generator.eval(), mask.eval()
    with torch.no_grad():
        out = x + (generator(x) - x) * mask(x)
    pixels = (out * std + mean) * 255
    wanted = pixels.round().clamp(0, 255).permute(0, 2, 3, 1)
    difference = (got.float() - wanted).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 1e-3
    assert not torch.equal(got, images)
    # 256 at a time makes no difference.
    assert torch.equal(got[290:], trigger.apply(images[290:]))


class Wide(nn.Module):
    def forward(self, x):
        return x.repeat(1, 2, 1, 1)


def test_stored_images_are_picked_by_key(tmp_path):
    table = make_images(6, seed=2)
    path = tmp_path / "table.npy"
    np.save(path, table.numpy())
    shown = torch.zeros(3, 12, 10, 3, dtype=torch.uint8)
    for trigger in (SSBA(table), PoisonInk.from_npy(path)):
        got = trigger.apply(shown, torch.tensor([5, 0, 5]))
        assert torch.equal(got, table[[5, 0, 5]])
        assert torch.equal(trigger.apply(shown), table[:3])
    got[0] = 0
    assert not torch.equal(table[5], got[0])
    assert PoisonInk.from_npy(path).describe() == {
        "name": "PoisonInk",
        "images": "tensor [6, 12, 10, 3]",
    }


def file_of(content):
    def write(tmp_path):
        path = tmp_path / "table.npy"
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            np.save(path, content, allow_pickle=True)
        return lambda: SSBA.from_npy(path)

    return write


IMAGES = make_images(2)
ONE = make_images(6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda _: lambda: Refool(transmission=1.5), r"transmission must be a number in 0..1"),
        (lambda _: lambda: Refool(ONE.float()), r"reflections must be a tensor \[R, H, W, C\]"),
        (lambda _: lambda: Refool(ONE[:0]), r"reflections must hold a picture, got none"),
        (lambda _: lambda: Refool(seed=-1), r"seed must be a whole number in 0..2147483647"),
        (
            lambda _: lambda: Refool(make_images(2, 8, 8)).apply(IMAGES),
            r"reflections must be \[12, 10, 3\] each like one image, got \[8, 8, 3\]; resize",
        ),
        (lambda _: lambda: InputAware(len, nn.Identity()), r"generator must be a torch.nn.Module"),
        (
            lambda _: lambda: InputAware(Wide(), nn.Identity()).apply(IMAGES),
            r"generator must give a tensor \[2, 3, 12, 10\] .* got \[2, 6, 12, 10\]; check",
        ),
        (
            lambda _: lambda: InputAware(nn.Identity(), Wide()).apply(IMAGES),
            r"mask must give a tensor \[2, 1, 12, 10\] .* got \[2, 6, 12, 10\]",
        ),
        (lambda _: lambda: SSBA(ONE.int()), r"SSBA: images must be a tensor \[N, H, W, C\] of ui"),
        (
            lambda _: lambda: SSBA(make_images(6, 8, 8)).apply(IMAGES),
            r"SSBA: images must be \[8, 8, 3\] each like the stored ones, got \[12, 10, 3\]",
        ),
        (
            lambda _: lambda: SSBA(ONE).apply(IMAGES, torch.tensor([1, 6])),
            r"SSBA: keys must be in 0..5, a stored image each, got 6; store one for every image",
        ),
        (
            lambda _: lambda: SSBA(ONE).apply(IMAGES, torch.tensor([-1, 2])),
            r"keys must be in 0..5, .* got -1",
        ),
        (file_of(np.zeros((2, 3))), r"must hold uint8 images \[N, H, W, C\], got float64"),
        (file_of(np.zeros((2, 3), np.uint8)), r"images must be a tensor \[N, H, W, C\] of uint8"),
        (file_of(b"no array"), r"must be a NumPy array file, got"),
        (file_of(b""), r"must be a NumPy array file, got"),
        (file_of(np.array([math.sin], dtype=object)), r"must be a NumPy array file, got: Object"),
    ],
)
def test_wrong_settings_are_refused_in_words(tmp_path, make, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path)()
