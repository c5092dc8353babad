"""Patterns behind a mask, and patterns that are added: bytes, tables and refusals."""

import pytest
import torch
from check import assert_same_bits

from fst_fast import DeviceLoader
from fst_fast.triggers import AddedPattern, MaskedPattern, looked_up


def make_bytes(*shape):
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def shifts(*shape):
    return torch.randint(-255, 256, shape, dtype=torch.int16)


@pytest.mark.parametrize("opacities", [1, 3])
def test_a_mask_mixes_pixel_by_pixel(opacities):
    images, pattern = make_bytes(5, 6, 9, 3), make_bytes(6, 9, 3)
    mask = make_bytes(6, 9, opacities)
    exact = images.double() + mask.double() / 255 * (pattern.double() - images.double())
    got = MaskedPattern(mask, pattern).apply(images)
    # Float32 may round the other way only where the exact value is a half.
    assert ((got.double() - exact).abs() <= 0.5 + 1e-4).all()
    opaque, clear = torch.full_like(mask, 255), torch.zeros_like(mask)
    assert_same_bits(MaskedPattern(clear, pattern).apply(images), images, name="clear")
    shown = MaskedPattern(opaque, pattern).apply(images)
    assert_same_bits(shown, pattern.expand_as(images).contiguous(), name="opaque")


def test_a_pattern_is_added_and_clipped():
    images, pattern = make_bytes(5, 6, 9, 1), shifts(6, 9, 1)
    expected = (images.int() + pattern.int()).clamp(0, 255).to(torch.uint8)
    assert_same_bits(AddedPattern(pattern).apply(images), expected, name="added")


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("kind", [MaskedPattern, AddedPattern])
def test_the_fused_op_gives_the_same_bytes(kind, channels):
    shape = (17, 13, channels)
    given = (
        (shifts(*shape),) if kind is AddedPattern else (make_bytes(17, 13, 1), make_bytes(*shape))
    )
    trigger = kind(*given)
    assert not looked_up(trigger, shape)
    images = make_bytes(12, *shape)
    loader = DeviceLoader(
        images, torch.arange(12), 12, shuffle=False, device="cpu", trigger=trigger, poisoned="all"
    )
    got = (next(iter(loader))[0].permute(0, 2, 3, 1) * 255).round().to(torch.uint8)
    assert_same_bits(got.contiguous(), trigger.apply(images), name=kind.__name__)


BYTES = torch.zeros(8, 8, 3, dtype=torch.uint8)
INT16 = torch.zeros(8, 8, 3, dtype=torch.int16)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: MaskedPattern(BYTES.float(), BYTES),
            "MaskedPattern: mask must be a tensor .*uint8",
        ),
        (lambda: MaskedPattern(BYTES[..., 0], BYTES), r"mask must be a tensor \[H, W, C\]"),
        (lambda: MaskedPattern(BYTES[..., :2], BYTES), r"must be \[8, 8, 1\] or \[8, 8, 3\]"),
        (lambda: MaskedPattern(BYTES[:4], BYTES), r"like the pattern, got \[4, 8, 3\]"),
        (lambda: MaskedPattern(BYTES, INT16), "pattern must be a tensor .* of uint8, got .*int16"),
        (
            lambda: MaskedPattern(BYTES, BYTES).apply(BYTES[None, :4]),
            r"pattern must be \[4, 8, 3\]",
        ),
        (lambda: AddedPattern(BYTES), "AddedPattern: pattern must be .* of int16, got .*uint8"),
        (lambda: AddedPattern(INT16 - 256), r"in -255..255, got 256 .* pattern.clamp\(-255, 255\)"),
        (lambda: AddedPattern(INT16).apply(BYTES[None, :4]), r"pattern must be \[4, 8, 3\] like"),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
