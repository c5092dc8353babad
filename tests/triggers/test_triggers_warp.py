"""Triggers that move pixels, against Pillow and grid_sample."""

import numpy as np
import pytest
import torch
from check import assert_same_bits
from PIL import Image
from torch.nn import functional as F

from fst_fast.ops import inject
from fst_fast.triggers import BattRotation, BattTranslation, WaNet, lower
from fst_fast.triggers.pixels import normalize_table

SHAPES = [(32, 32, 3), (224, 224, 3), (17, 13, 1), (9, 30, 3)]


def make_images(shape, count=3):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, *shape), generator=generator).to(torch.uint8)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("degrees", [16, -16, 0, 3.5, 45, 90, -90, 180, 133.7, -0.5])
def test_rotation_is_pillows(shape, degrees):
    images = make_images(shape)
    got = BattRotation(degrees).apply(images)
    for image, turned in zip(images, got, strict=True):
        array = image.squeeze(-1).numpy()
        expected = np.asarray(Image.fromarray(array).rotate(degrees)).reshape(shape)
        assert torch.equal(turned, torch.from_numpy(expected.copy()))


@pytest.mark.parametrize("pixels", [6, -4, 0])
def test_translation(pixels):
    images = make_images((8, 10, 3))
    got = BattTranslation(pixels).apply(images).numpy()
    expected = np.zeros_like(got)
    for column in range(10):
        if 0 <= column - pixels < 10:
            expected[:, :, column] = images[:, :, column - pixels]
    assert (got == expected).all()


def original_grid(trigger, height, width, noise=None):
    """As written in the paper's section 3, [1, H, W, 2] with x first."""
    generator = torch.Generator().manual_seed(trigger.seed)
    points = torch.rand(1, 2, trigger.grid, trigger.grid, generator=generator) * 2 - 1
    points = points / torch.mean(torch.abs(points))
    large = F.interpolate(points, size=(height, width), mode="bicubic", align_corners=True)
    large = large.permute(0, 2, 3, 1).double()
    y, x = torch.meshgrid(
        torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij"
    )
    sizes = torch.tensor([width, height])
    grid = torch.stack((x, y), 2)[None] + trigger.strength * large / sizes
    grid = torch.clamp(grid, -1, 1)
    return grid if noise is None else torch.clamp(grid + noise / sizes, -1, 1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("strength", [0.5, 2.0])
def test_wanet_is_grid_sample(shape, strength):
    trigger = WaNet(strength=strength, seed=4)
    images = make_images(shape)
    grid = original_grid(trigger, *shape[:2]).expand(len(images), -1, -1, -1)
    expected = F.grid_sample(images.permute(0, 3, 1, 2).double(), grid, align_corners=True)
    got = trigger.apply(images).permute(0, 3, 1, 2)
    # Truncated from float32 there, from float64 here: where the value is whole to a hair.
    difference = (got.int() - expected.floor().int()).abs()
    whole = (expected - expected.round()).abs() < 2e-2
    assert difference.max() <= 1
    assert (difference[~whole] == 0).all()
    # Off whole pixels almost none is that close.
    assert (got != images.permute(0, 3, 1, 2)).float().mean() > 0.5


def test_wanet_moves_by_about_half_a_pixel_at_strength_one():
    moved = WaNet(strength=1.0)._field(32, 32).coords
    rows, columns = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    shift = (moved - torch.stack([rows, columns], -1)).abs().mean()
    assert 0.2 < shift < 0.6


def test_noise_is_uniform_and_of_each_image():
    trigger = WaNet(noise=True, seed=2)
    field = trigger._field(32, 32)
    assert field.noise == (0.0, 0.5 * 31 / 32, 0.0, 0.5 * 31 / 32)
    images = make_images((32, 32, 3), 1).expand(4, -1, -1, -1)
    got = trigger.apply(images, keys=torch.tensor([5, 9, 5, 2**31 - 1]))
    assert torch.equal(got[0], got[2])
    assert not torch.equal(got[0], got[1])
    assert not torch.equal(got[0], got[3])
    assert not torch.equal(got[0], WaNet(seed=2).apply(images)[0])


TRIGGERS = {
    "wanet": WaNet(),
    "wanet-noise": WaNet(noise=True),
    "rotation": BattRotation(),
    "translation": BattTranslation(),
}


@pytest.mark.parametrize("name", TRIGGERS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_fused_op_gives_the_same_bytes(name, shape):
    images = make_images(shape)
    params = torch.zeros(3, 8, dtype=torch.int32)
    params[:, 0] = torch.arange(3)
    params[:, 7] = torch.tensor([7, 0, 2**31 - 1])
    tables = lower([TRIGGERS[name]], shape)
    out, _ = inject(images, params, normalize_table(shape[2], None), tables, backend="reference")
    got = (out.permute(0, 2, 3, 1) * 255).round().to(torch.uint8)
    assert_same_bits(got, TRIGGERS[name].apply(images, params[:, 7]), name=name)


def test_covers():
    assert [t.noise for t in WaNet(seed=3).covers()] == [True]
    angles = [t.degrees for t in BattRotation().covers()]
    assert (len(angles), min(angles), max(angles)) == (41, -10, 10)
    assert 16 not in angles
    assert [t.pixels for t in BattTranslation().covers()] == list(range(-3, 4))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: WaNet(strength=-1), "WaNet: strength must"),
        (lambda: WaNet(grid=1), "WaNet: grid must"),
        (lambda: BattRotation(degrees=181), "BattRotation: degrees must"),
        (lambda: BattTranslation(pixels=0.5), "BattTranslation: pixels must"),
        (lambda: BattTranslation(10).apply(make_images((8, 10, 3))), "less than the width"),
    ],
)
def test_wrong_settings_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
