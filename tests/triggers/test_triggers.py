"""Triggers against explicit loops and NumPy, byte for byte."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from check import assert_same_bits

from fst_fast import triggers
from fst_fast.triggers import BadNets, Blended, Trigger

CORNERS = ("bottom-right", "bottom-left", "top-right", "top-left")


NEEDS_MORE = ("siba", "input-aware", "ssba", "poison-ink")
NEEDS_COLOUR = ("ctrl", "ftrojan")


def make_images(count=3, height=6, width=9, channels=3):
    return torch.randint(0, 256, (count, height, width, channels), dtype=torch.uint8)


def loop_badnets(images, size, value, corner, margin):
    """Pixel by pixel: inside the square or not."""
    out = images.clone().numpy()
    count, height, width, channels = out.shape
    for n in range(count):
        for row in range(height):
            for column in range(width):
                from_top = row if "top" in corner else height - 1 - row
                from_side = column if "left" in corner else width - 1 - column
                if margin <= from_top < margin + size and margin <= from_side < margin + size:
                    for c in range(channels):
                        out[n, row, column, c] = value[c] if isinstance(value, tuple) else value
    return torch.from_numpy(out)


@pytest.mark.parametrize("margin", [0, 1, 3])
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("corner", CORNERS)
def test_badnets_paints_its_square_and_nothing_else(corner, size, margin):
    images = make_images()
    got = BadNets(size=size, corner=corner, margin=margin, value=200).apply(images)
    expected = loop_badnets(images, size, 200, corner, margin)
    assert_same_bits(got, expected, name=corner)


@pytest.mark.parametrize(
    ("channels", "value"),
    [(1, 255), (1, (7,)), (3, 0), (3, (255, 128, 0)), (4, 9), (4, (1, 2, 3, 4))],
)
def test_badnets_colours(channels, value):
    images = make_images(channels=channels)
    got = BadNets(size=2, value=value, corner="top-right").apply(images)
    assert_same_bits(got, loop_badnets(images, 2, value, "top-right", 0), name="colour")


def test_badnets_by_default_is_three_white_pixels_square_at_the_bottom_right():
    got = BadNets().apply(torch.zeros(1, 32, 32, 3, dtype=torch.uint8))
    assert (got[0, 29:, 29:] == 255).all()
    assert int(got.sum(dtype=torch.int64)) == 9 * 3 * 255


def numpy_blend(images, pattern, alpha):
    """As BackdoorBench computes it."""
    mixed = (1 - alpha) * images.numpy().astype(float) + alpha * pattern.numpy().astype(float)
    return torch.from_numpy(mixed.astype(np.uint8))


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("alpha", [0, 0.1, 0.2, 1 / 3, 0.5, 0.7, 0.999, 1, 1.0])
def test_blended_equals_numpy_to_the_byte(alpha, channels):
    # Every pair of bytes once: 256 x 256 pixels.
    images = torch.arange(256, dtype=torch.uint8).view(1, 256, 1, 1).repeat(1, 1, 256, channels)
    pattern = torch.arange(256, dtype=torch.uint8).view(1, 256, 1).repeat(256, 1, channels)
    got = Blended(alpha=alpha, pattern=pattern).apply(images)
    assert_same_bits(got, numpy_blend(images, pattern, alpha), name=f"alpha {alpha}")
    if alpha in (0, 1):
        assert torch.equal(got, images if alpha == 0 else pattern[None])


def test_blended_draws_one_pattern_from_its_seed():
    black = torch.zeros(4, 6, 9, 3, dtype=torch.uint8)
    pattern = Blended(alpha=1, seed=1).apply(black)
    assert torch.equal(pattern, pattern[:1].expand_as(pattern))  # the same for every image
    assert torch.equal(pattern[:2], Blended(alpha=1, seed=1).apply(black[:2]))  # and every call
    assert not torch.equal(pattern, Blended(alpha=1, seed=2).apply(black))
    large = Blended(alpha=1).apply(torch.zeros(1, 64, 64, 3, dtype=torch.uint8)).double()
    assert abs(large.mean().item() - 127.5) < 3  # uniform: its standard error here is 0.67
    assert large.min() == 0
    assert large.max() == 255


def test_blended_uses_the_drawn_pattern_in_the_mix():
    images = make_images()
    drawn = Blended(seed=3).pattern_for(images.shape[1:], torch.device("cpu"))
    got = Blended(alpha=0.3, seed=3).apply(images)
    assert_same_bits(got, numpy_blend(images, drawn, 0.3), name="drawn pattern")


# Those that need nothing to be given.
NAMES = [name for name in triggers.ZOO if name not in NEEDS_MORE]


@pytest.mark.parametrize(
    ("name", "channels"),
    [(n, c) for n in NAMES for c in (1, 3, 4) if c == 3 or n not in NEEDS_COLOUR],
)
def test_every_trigger_returns_a_new_tensor_of_the_same_kind(name, channels):
    trigger = triggers.get(name)
    for images in (
        make_images(channels=channels),
        make_images(2, 9, 6, channels).permute(0, 2, 1, 3),  # not contiguous
        make_images(0, channels=channels),
    ):
        kept = images.clone()
        got = trigger.apply(images)
        assert torch.equal(images, kept)
        assert got.data_ptr() != images.data_ptr() or len(images) == 0
        assert got.shape == images.shape
        assert got.dtype == torch.uint8
        assert_same_bits(trigger.apply(images.contiguous()), got, name=name)
        if len(images) > 0:
            assert not torch.equal(got, images)


@pytest.mark.parametrize("name", NAMES)
def test_every_trigger_is_frozen_and_describes_itself_in_json(name):
    trigger = triggers.get(name)
    for field in dataclasses.fields(trigger):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(trigger, field.name, 1)
    described = trigger.describe()
    assert json.loads(json.dumps(described)) == described
    assert described.pop("name") == type(trigger).__name__
    assert set(described) == {field.name for field in dataclasses.fields(trigger)}


def test_descriptions_hold_the_settings():
    assert BadNets(size=2, value=(1, 2, 3), margin=1).describe() == {
        "name": "BadNets",
        "size": 2,
        "value": [1, 2, 3],
        "corner": "bottom-right",
        "margin": 1,
    }
    pattern = torch.zeros(4, 5, 3, dtype=torch.uint8)
    described = Blended(alpha=0.1, pattern=pattern, seed=7).describe()
    expected = {"name": "Blended", "alpha": 0.1, "pattern": "tensor [4, 5, 3]", "seed": 7}
    assert described == expected


@pytest.mark.parametrize("trigger", [BadNets(), Blended()], ids=["BadNets", "Blended"])
@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(2, 3, 8, 8), r"uint8 tensor .* got torch.float32 \[2, 3, 8, 8\]; .*permute"),
        (make_images()[0], r"uint8 tensor \[N, H, W, C\], got torch.uint8 \[6, 9, 3\]"),
        (make_images().permute(0, 3, 1, 2), r"got \[3, 3, 6, 9\]; .* use images.permute\(0, 2"),
        (make_images().numpy(), "uint8 tensor .* got ndarray"),
    ],
    ids=["float", "3-D", "channels-first", "numpy"],
)
def test_images_of_another_kind_are_refused(trigger, images, message):
    with pytest.raises(ValueError, match=f"{type(trigger).__name__}: images must be .*{message}"):
        trigger.apply(images)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BadNets(size=0), "size must be a whole number >= 1, got 0; the default is 3"),
        (lambda: BadNets(margin=-1), "margin must be a whole number >= 0, got -1"),
        (lambda: BadNets(size=2.5), "size must be a whole number >= 1, got 2.5"),
        (lambda: BadNets(size="3"), "size must be a whole number >= 1, got '3'"),
        (lambda: BadNets(size=True), "size must be a whole number >= 1, got True"),
        (lambda: BadNets(margin=np.float32(1)), "margin must be a whole number .* got np.float32"),
        (lambda: Blended(alpha="0.1"), "alpha must be a number in 0..1, got '0.1'"),
        (lambda: Blended(seed=None), "seed must be a whole number in .*, got None"),
        (lambda: triggers.get(["badnets"]), r"name must be one of .*, got \['badnets'\]"),
        (lambda: BadNets(corner="middle"), "corner must be one of .*top-left.* got 'middle'"),
        (lambda: BadNets(value=256), "value must be an integer in 0..255, .* got 256"),
        (lambda: BadNets(value=(0, -1, 0)), r"value must be .* got \(0, -1, 0\)"),
        (lambda: BadNets(value=1.0), "value must be an integer .* got 1.0"),
        (lambda: BadNets(value=[255, 0, 0]), r"or a tuple .* got \[255, 0, 0\]"),
        (lambda: BadNets(size=5, margin=2).apply(make_images()), "fit into 6 x 9 pixels, got 7"),
        (lambda: BadNets(size=7).apply(make_images(1, 9, 6)), "fit into 9 x 6 pixels, got 7"),
        (lambda: BadNets(value=(1, 2)).apply(make_images()), r"per channel \(3\), got \(1, 2\)"),
        (lambda: Blended(alpha=1.5), "alpha must be a number in 0..1, got 1.5"),
        (lambda: Blended(alpha=-0.1), "alpha must be a number in 0..1, got -0.1"),
        (lambda: Blended(alpha=float("nan")), "alpha must be a number in 0..1, got nan"),
        (lambda: Blended(pattern=torch.rand(6, 9, 3)), r"of uint8, got Tensor torch.float32"),
        (lambda: Blended(pattern=np.zeros((6, 9, 3))), "got ndarray float64 .*from_numpy"),
        (
            lambda: Blended(pattern=make_images()[0]).apply(make_images(1, 8, 8)),
            r"pattern must be \[8, 8, 3\] like one image, got \[6, 9, 3\]; resize",
        ),
        (
            lambda: triggers.get("wanted"),
            r"name must be one of \['adaptive-blend', .*'badnets', .*\], got 'wanted'",
        ),
        (lambda: triggers.get("badnets", sise=2), "badnets does not take .*sise"),
        (lambda: triggers.get("badnets", size=0), "size must be a whole number >= 1"),
    ],
)
def test_wrong_settings_are_refused_in_words(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_trigger_that_fits_exactly_is_taken():
    got = BadNets(size=4, margin=2, value=5).apply(make_images())
    assert (got[:, :4, 3:7] == 5).all()


def test_get_makes_the_zoos_triggers():
    assert triggers.ZOO["badnets"] is BadNets
    made = triggers.get("badnets", size=2, corner="top-left")
    assert type(made) is BadNets
    assert (made.size, made.corner) == (2, "top-left")
    assert triggers.get("blended", alpha=0.4).alpha == 0.4


def test_a_trigger_without_pixels_says_so():
    with pytest.raises(NotImplementedError, match="Trigger does not define _apply"):
        Trigger().apply(make_images())
