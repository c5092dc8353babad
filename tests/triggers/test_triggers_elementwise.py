"""Elementwise and frequency triggers against the published formulas, pixel by pixel."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from check import assert_same_bits

from fst_fast.ops import inject
from fst_fast.triggers.adaptive import AdaptiveBlend, AdaptivePatch, BlendedInPart, Patches
from fst_fast.triggers.additive import SIBA, SIG, LabelConsistent, LowFrequency, TrojanNN
from fst_fast.triggers.frequency import CTRL, FTrojan
from fst_fast.triggers.lower import looked_up, lower
from fst_fast.triggers.pixels import normalize_table
from fst_fast.triggers.poisoning import plan
from fst_fast.triggers.quantise import BppAttack, BppAttackDithered

SHAPES = {"cifar": (32, 32, 3), "imagenet": (224, 224, 3), "odd": (17, 13, 3), "grey": (9, 30, 1)}
EVERY_SHAPE = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
CPU = torch.device("cpu")


def make_images(shape, count=None):
    count = (1 if shape[0] > 100 else 4) if count is None else count
    return torch.randint(0, 256, (count, *shape), dtype=torch.uint8)


def make_pattern(shape, least=0, end=256, dtype=torch.uint8):
    return torch.randint(least, end, shape).to(dtype)


def drawn(trigger, shape):
    return trigger.pattern_for(torch.Size(shape), CPU)


def loop(images, new):
    """new(byte, row, column, channel) for every byte; Python numbers throughout."""
    out = images.numpy().copy()
    for n, row, column, channel in np.ndindex(*out.shape):
        out[n, row, column, channel] = new(int(out[n, row, column, channel]), row, column, channel)
    return torch.from_numpy(out)


def clip(value):
    return min(max(value, 0), 255)


@pytest.mark.parametrize(("amplitude", "frequency"), [(40, 6), (20, 6), (255, 1), (7.3, 2.5)])
@EVERY_SHAPE
def test_sig(shape, amplitude, frequency):
    images = make_images(shape)
    _, width, _ = shape

    def new(byte, row, column, channel):
        wave = np.float32(amplitude * np.sin(2 * np.pi * column * frequency / width))
        return int(clip(byte + float(wave)))

    got = SIG(amplitude=amplitude, frequency=frequency).apply(images)
    assert_same_bits(got, loop(images, new), name="SIG")


def test_sig_rounds_its_wave_to_float32():
    # 40 sin(pi / 6) is 19.999999999999996 in float64, which would be truncated.
    images = torch.zeros(1, 1, 24, 1, dtype=torch.uint8)
    got = SIG(frequency=2).apply(images).flatten()
    assert got[:7].tolist() == [0, 20, 34, 40, 34, 20, 0]


@EVERY_SHAPE
def test_patterns_are_added(shape):
    images = make_images(shape)
    pattern = make_pattern(shape, -300, 300, torch.int16)
    values = pattern.numpy()  # reading a tensor's elements one by one takes far longer
    expected = loop(images, lambda byte, *at: clip(byte + int(values[at])))
    assert_same_bits(LowFrequency(pattern=pattern).apply(images), expected, name="LowFrequency")
    pattern = make_pattern(shape, -(2**15), 2**15, torch.int16)
    values = pattern.numpy()
    expected = loop(images, lambda byte, *at: clip(byte + int(values[at])))
    assert_same_bits(LowFrequency(pattern=pattern).apply(images), expected, name="extreme")
    pattern = make_pattern(shape)
    values = pattern.numpy()
    expected = loop(images, lambda byte, *at: clip(byte + int(values[at])))
    for trigger in (LowFrequency(pattern=pattern), TrojanNN(pattern=pattern, mode="clamp")):
        assert_same_bits(trigger.apply(images), expected, name="added")
    expected = loop(images, lambda byte, *at: (byte + int(values[at])) % 256)
    assert_same_bits(TrojanNN(pattern=pattern).apply(images), expected, name="wrapped")
    sparse = torch.zeros(shape, dtype=torch.int16)
    sparse[::3, ::5] = make_pattern(shape, -8, 9, torch.int16)[::3, ::5]
    values = sparse.numpy()
    expected = loop(images, lambda byte, *at: clip(byte + int(values[at])))
    got = SIBA(pattern=sparse, pixels=None).apply(images)
    assert_same_bits(got, expected, name="SIBA")


def dct_matrix(side):
    """Orthonormal: row k is the k-th cosine."""
    matrix = np.zeros((side, side))
    for k in range(side):
        for n in range(side):
            matrix[k, n] = np.cos(np.pi * (2 * n + 1) * k / (2 * side)) * np.sqrt(2 / side)
    matrix[0] /= np.sqrt(2)
    return matrix


@pytest.mark.parametrize("shape", [(32, 32, 3), (224, 224, 3), (40, 56, 3)], ids=str)
def test_low_frequency_draws_low_frequencies(shape):
    pattern = drawn(LowFrequency(), shape)
    assert (int(pattern.min()), int(pattern.max())) == (0, 51)
    spectrum = np.einsum(
        "uh,hwc,vw->uvc",
        *(dct_matrix(shape[0]), pattern.double().numpy(), dct_matrix(shape[1])),
        optimize=True,
    )
    energy = (spectrum**2).sum()
    assert (spectrum[:4, :4] ** 2).sum() / energy > 0.999
    spectrum[:4, :4] = 0
    # What is left is the rounding, whose mean square is 1 / 12.
    assert (spectrum**2).sum() / np.prod(shape) < 1.2 / 12
    images = make_images(shape)
    expected = (images.int() + pattern).clamp(0, 255).to(torch.uint8)
    assert_same_bits(LowFrequency().apply(images), expected, name="drawn")
    assert not torch.equal(drawn(LowFrequency(seed=1), shape), pattern)
    assert int(drawn(LowFrequency(amplitude=9), shape).max()) == 9


def test_low_frequency_is_the_same_picture_at_every_size():
    small, large = (
        drawn(LowFrequency(seed=3), shape).permute(2, 0, 1).float()[None]
        for shape in ((32, 32, 3), (224, 224, 3))
    )
    assert (F.avg_pool2d(large, 7) - small).abs().max() < 3
    grey = drawn(LowFrequency(seed=3), (32, 32, 1)).double().flatten()
    correlation = torch.corrcoef(torch.stack([grey, small[0, 0].double().flatten()]))[0, 1]
    assert correlation > 0.995  # the ranges differ, and so does the rounding
    assert int(drawn(LowFrequency(), (1, 1, 1)).max()) == 0  # one pixel has no range


@EVERY_SHAPE
def test_trojan_draws_a_square_in_the_corner(shape):
    pattern = drawn(TrojanNN(), shape)
    side = {32: 7, 224: 49, 17: 2, 9: 1}[shape[0]]
    assert (pattern[-side:, -side:] > 0).all()
    assert int((pattern > 0).sum()) == side * side * shape[2]
    assert not torch.equal(drawn(TrojanNN(seed=1), shape), pattern)
    images = make_images(shape)
    expected = loop(images, lambda byte, *at: (byte + int(pattern[at])) % 256)
    assert_same_bits(TrojanNN().apply(images), expected, name="drawn")
    if side % 7 == 0:
        coarse = drawn(TrojanNN(), (32, 32, 3))
        step = side // 7
        assert torch.equal(pattern[::step, ::step][-7:, -7:], coarse[-7:, -7:])


# Turner et al.'s, from the border inwards, the corner first.
CHECKERS = {
    "top-left": ("+--", "-+-", "+-+"),
    "top-right": ("+--", "-+-", "+-+"),
    "bottom-left": ("+-+", "-+-", "+--"),
    "bottom-right": ("+-+", "-+-", "+--"),
}


def checkers(height, width):
    made = torch.zeros(1, 1, 32, 32)
    for corner, rows in CHECKERS.items():
        for i, signs in enumerate(rows):
            for j, sign in enumerate(signs):
                row = i if "top" in corner else 31 - i
                column = j if "left" in corner else 31 - j
                made[0, 0, row, column] = 1 if sign == "+" else -1
    return F.interpolate(made, (height, width), mode="nearest")[0, 0]


@pytest.mark.parametrize("amplitude", [255, 32, 100.5])
@EVERY_SHAPE
def test_label_consistent(shape, amplitude):
    images = make_images(shape)
    signs = checkers(*shape[:2])
    expected = loop(images, lambda byte, r, c, _: int(clip(byte + amplitude * float(signs[r, c]))))
    got = LabelConsistent(amplitude=amplitude).apply(images)
    assert_same_bits(got, expected, name="LabelConsistent")
    if amplitude == 255 and shape[0] == 32:
        changed = (LabelConsistent().apply(images) != images).any(0).any(-1)
        assert int(changed.sum()) == 4 * 9
        assert set(got[:, signs != 0].unique().tolist()) == {0, 255}


def blended(byte, other, alpha):
    return clip(math.floor(byte + alpha * (other - byte) + 0.5))


@EVERY_SHAPE
def test_adaptive_blend(shape):
    images, pattern = make_images(shape), make_pattern(shape)
    values = pattern.numpy()
    for alpha in (0, 0.2, 0.5, 1):
        trigger = AdaptiveBlend(alpha=alpha, pattern=pattern)
        expected = loop(images, lambda byte, *at, a=alpha: blended(byte, int(values[at]), a))
        assert_same_bits(trigger.apply(images), expected, name=f"alpha {alpha}")
    black = torch.zeros(1, *shape, dtype=torch.uint8)
    noise = AdaptiveBlend(alpha=1, seed=2).apply(black)[0]
    assert not torch.equal(noise, AdaptiveBlend(alpha=1, seed=3).apply(black)[0])
    same = AdaptiveBlend(pattern=noise).apply(images)
    assert_same_bits(AdaptiveBlend(seed=2).apply(images), same, name="drawn")


def test_adaptive_blend_drops_half_of_the_tiles_in_training():
    pattern = make_pattern((32, 32, 3))
    trigger = AdaptiveBlend(pattern=pattern, training_alpha=0.4, dropped=8)
    (part,) = trigger.training()
    (cover,) = trigger.covers()
    assert part.describe() == cover.describe()
    assert int(trigger.tiles(9, torch.Generator()).sum()) == 0
    images = make_images((32, 32, 3), 60)
    tiles = part.tiles(60, torch.Generator().manual_seed(0))
    got = part.apply(images, tiles=tiles)

    for n in range(60):
        kept = [(tiles[n].item() >> t) & 1 == 0 for t in range(16)]
        assert sum(kept) == 8

        def new(byte, row, column, channel, kept=kept):
            other = int(pattern[row, column, channel])
            return blended(byte, other, 0.4) if kept[row // 8 * 4 + column // 8] else byte

        if n < 3:
            expected = loop(images[n : n + 1], new)
            assert_same_bits(got[n : n + 1], expected, name=f"image {n}")


@pytest.mark.parametrize("dropped", [0, 1, 8, 16])
def test_the_dropped_tiles_are_drawn_evenly(dropped):
    (part,) = AdaptiveBlend(dropped=dropped).training()
    tiles = part.tiles(4000, torch.Generator().manual_seed(1))
    assert tiles.dtype == torch.int32
    assert tiles.shape == (4000,)
    bits = (tiles[:, None] >> torch.arange(16)) & 1
    assert (bits.sum(1) == dropped).all()
    assert int(tiles.max()) < 2**16
    # Five standard errors.
    share = dropped / 16
    slack = 5 * math.sqrt(share * (1 - share) / 4000)
    assert (bits.double().mean(0) - share).abs().max() <= slack
    assert torch.equal(tiles, part.tiles(4000, torch.Generator().manual_seed(1)))
    if dropped == 8:
        assert len(tiles.unique()) > 3000


@EVERY_SHAPE
def test_adaptive_patch_given(shape):
    images = make_images(shape)
    patterns = make_pattern((5, *shape))
    masks = torch.rand(5, *shape[:2]) * (torch.rand(5, *shape[:2]) > 0.5)
    shares, values = masks.numpy(), patterns.numpy()

    def shown(*chosen):
        def new(byte, row, column, channel):
            value = float(byte)
            for j, alpha in chosen:
                part = alpha * float(shares[j, row, column])
                value += part * (int(values[j, row, column, channel]) - value)
            return clip(math.floor(value + 0.5))

        return loop(images, new)

    trigger = AdaptivePatch(patterns=patterns, masks=masks, test=(4, 2))
    assert_same_bits(trigger.apply(images), shown((4, 1), (2, 1)), name="test")
    parts = trigger.training()
    assert len(parts) == 4
    assert [part.describe() for part in parts] == [part.describe() for part in trigger.covers()]
    for j in (0, 3):
        got, expected = parts[j].apply(images), shown((j, (0.5, 0.2, 0.5, 0.3)[j]))
        assert_same_bits(got, expected, name=f"patch {j}")


@EVERY_SHAPE
def test_adaptive_patch_draws_small_patches_in_different_places(shape):
    black, white = (torch.full((1, *shape), value, dtype=torch.uint8) for value in (0, 255))
    side = {32: 5, 224: 35, 17: 2, 9: 1}[shape[0]]
    covered = []
    for j in range(5):
        patch = Patches(chosen=(j,))
        place = patch.apply(black) == patch.apply(white)
        assert int(place.sum()) == side * side * shape[2]
        covered.append(place)
        pale = Patches(chosen=(j,), opacities=(0.3,))
        colour = patch.apply(black)
        expected = torch.where(place, (black + 0.3 * colour.double() + 0.5).floor(), black)
        assert_same_bits(pale.apply(black), expected.to(torch.uint8), name="pale")
    assert int(torch.stack(covered).sum(0).max()) == 1  # no two overlap
    colours = [Patches(chosen=(j,)).apply(black)[covered[j]] for j in range(5)]
    assert not any(torch.equal(colours[0], other) for other in colours[1:])
    test = AdaptivePatch()
    seen = test.apply(black) == test.apply(white)
    assert torch.equal(seen, covered[0] | covered[2])
    absent = AdaptivePatch(test=(4, 2))
    assert torch.equal(absent.apply(black) == absent.apply(white), covered[4] | covered[2])
    if shape[0] > 9:
        assert not torch.equal(AdaptivePatch(seed=1).apply(black), test.apply(black))


# kornia's coefficients.
YUV_OF_RGB = np.array([[0.299, 0.587, 0.114], [-0.147, -0.289, 0.436], [0.615, -0.515, -0.1]])
RGB_OF_YUV = np.array([[1, 0, 1.14], [1, -0.396, -0.581], [1, 2.029, 0]])


def raise_frequencies(planes, magnitude, window, positions):
    """Of each [H, W] plane: DCT of every window, two coefficients raised, and back."""
    matrix = dct_matrix(window)
    out = planes.copy()
    for n, top, left in np.ndindex(
        len(planes), planes.shape[1] // window, planes.shape[2] // window
    ):
        place = (n, *(slice(at * window, (at + 1) * window) for at in (top, left)))
        spectrum = matrix @ planes[place] @ matrix.T
        for row, column in positions:
            spectrum[row, column] += magnitude
        out[place] = matrix.T @ spectrum @ matrix
    return out


def ctrl_pipeline(images, magnitude, window, positions, to_yuv, nudge):
    """RGB to YUV, DCT, back, clip, truncate; nudge is added before the truncation."""
    yuv = images.numpy().astype(float) @ to_yuv.T
    for channel in (1, 2):
        yuv[..., channel] = raise_frequencies(yuv[..., channel], magnitude, window, positions)
    return torch.from_numpy(np.clip(yuv @ RGB_OF_YUV.T + nudge, 0, 255).astype(np.uint8))


WINDOWS = {
    "cifar": ((32, 32, 3), 32, ((15, 15), (31, 31))),
    "imagenet": ((224, 224, 3), 32, ((15, 15), (31, 31))),
    "one-window": ((224, 224, 3), 224, ((15, 15), (31, 31))),
    "not-square": ((64, 96, 3), 32, ((0, 3), (7, 0), (31, 30))),
    "mnist": ((28, 28, 3), 28, ((15, 15), (27, 27))),
}


@pytest.mark.parametrize(("shape", "window", "positions"), WINDOWS.values(), ids=WINDOWS)
def test_ctrl_is_the_whole_pipeline(shape, window, positions):
    images = make_images(shape)
    got = CTRL(window=window, positions=positions).apply(images)
    # Coefficients that undo each other; the nudge absorbs what float64 loses on the way.
    exact = ctrl_pipeline(images, 100, window, positions, np.linalg.inv(RGB_OF_YUV), 1e-9)
    assert_same_bits(got, exact, name="exact coefficients")
    kornia = ctrl_pipeline(images, 100, window, positions, YUV_OF_RGB, 1e-9)
    wrong = (got.int() - kornia.int()).abs()
    assert int(wrong.max()) == 1
    # kornia's lose up to 0.35 levels, 0.05 on average, and about as many bytes change by one; more
    # where the constant is 0, or whole, in many places.
    assert wrong.double().mean() < 0.12


def test_ctrl_equals_the_original_on_greys():
    # kornia's coefficients undo each other there.
    images = torch.arange(256, dtype=torch.uint8)[:, None, None, None].expand(256, 32, 32, 3)
    kornia = ctrl_pipeline(images, 100, 32, ((15, 15), (31, 31)), YUV_OF_RGB, 1e-9)
    assert_same_bits(CTRL().apply(images), kornia, name="greys")


def test_the_amplitude_of_the_frequencies():
    grey = torch.full((1, 32, 32, 3), 128, dtype=torch.uint8)
    change = CTRL().apply(grey).int() - 128
    # The constant's peaks are 12.1, 10.4 and 21.6 levels, of both signs, then truncated.
    assert change.amax((0, 1, 2)).tolist() == [12, 10, 21]
    assert change.amin((0, 1, 2)).tolist() == [-13, -11, -22]
    chroma = FTrojan()._change(grey).int() - 128
    assert chroma[..., 0].abs().max() == 0
    assert chroma[..., 1:].amax((0, 1, 2)).tolist() == [3, 3]
    assert chroma[..., 1:].amin((0, 1, 2)).tolist() == [-4, -4]


def to_ycrcb(images):
    """OpenCV's 8-bit conversion, in whole numbers."""
    red, green, blue = (images[..., c].astype(int) for c in range(3))
    luma = (4899 * red + 9617 * green + 1868 * blue + 8192) // 16384
    planes = [
        luma,
        ((red - luma) * 11682 + 8192) // 16384 + 128,
        ((blue - luma) * 9241 + 8192) // 16384 + 128,
    ]
    return np.clip(np.stack(planes, -1), 0, 255)


def from_ycrcb(ycrcb):
    luma, cr, cb = (ycrcb[..., c].astype(int) for c in range(3))
    planes = [
        luma + ((cr - 128) * 22987 + 8192) // 16384,
        luma + ((cr - 128) * -11698 + (cb - 128) * -5636 + 8192) // 16384,
        luma + ((cb - 128) * 29049 + 8192) // 16384,
    ]
    return np.clip(np.stack(planes, -1), 0, 255).astype(np.uint8)


@pytest.mark.parametrize(("shape", "window", "positions"), WINDOWS.values(), ids=WINDOWS)
def test_ftrojan_is_the_whole_pipeline(shape, window, positions):
    images = make_images(shape)
    ycrcb = to_ycrcb(images.numpy()).astype(float)
    for channel, magnitude in enumerate((0, 30, 30)):
        plane = raise_frequencies(ycrcb[..., channel], magnitude, window, positions)
        ycrcb[..., channel] = plane
    # Without the nudge float64 noise takes one from about half of the lumas.
    lost = float((np.clip(ycrcb[..., 0], 0, 255).astype(np.uint8) < np.rint(ycrcb[..., 0])).mean())
    assert 0.3 < lost < 0.7
    expected = from_ycrcb(np.clip(ycrcb + 1e-9, 0, 255).astype(np.uint8))
    got = FTrojan(window=window, positions=positions).apply(images)
    assert_same_bits(got, torch.from_numpy(expected), name="FTrojan")


@pytest.mark.parametrize("trigger", [CTRL(), FTrojan()], ids=["CTRL", "FTrojan"])
def test_a_window_that_does_not_fit_is_cut_off(trigger):
    images = make_images((64, 64, 3))
    got = trigger.apply(images[:, :41, :35].contiguous())
    assert_same_bits(got, trigger.apply(images)[:, :41, :35], name="cut off")
    with pytest.raises(ValueError, match=r"must have 3 channels, .* got 1; use images.expand"):
        trigger.apply(make_images((32, 32, 1)))


@pytest.mark.parametrize("trigger", [CTRL, FTrojan])
def test_frequencies_of_one_channel(trigger):
    images = make_images((32, 32, 3))
    assert torch.equal(CTRL(magnitude=0).apply(images), images)
    one, other, both = (trigger(channels=c).apply(images) for c in ((1,), (2,), (1, 2)))
    assert not torch.equal(one, other)
    assert not torch.equal(one, both)
    assert torch.equal(both, trigger().apply(images))


@pytest.mark.parametrize("levels", [2, 3, 4, 8, 16, 18, 52, 86, 100, 256])
def test_bpp(levels):
    # Every byte, exactly: Python rounds half to even, and fractions do not round at all.
    images = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1)
    steps = levels - 1
    expected = loop(images, lambda byte, *_: round(byte / 255 * steps) * 255 // steps)
    got = BppAttack(levels=levels).apply(images)
    assert_same_bits(got, expected, name=f"{levels} levels")
    assert len(got.unique()) == levels
    # As BackdoorBench does, in float32 and through torchvision's way of storing it.
    stored = torch.round(images.float() / 255.0 * steps) / steps * 255
    assert_same_bits(got, stored.div(255.0).mul(255).byte(), name="float32")


def scan(images, levels, kept="f4"):
    """Floyd and Steinberg, pixel after pixel: float64 errors, a float32 image."""
    out = []
    for image in images.numpy():
        height, width, _ = image.shape
        sums = image.astype(kept)
        for row, column in np.ndindex(height, width):
            old = sums[row, column].astype(np.float64)
            new = np.round(old / 255.0 * (levels - 1)) / (levels - 1) * 255
            sums[row, column] = new
            error = old - new
            for down, right, weight in (
                (0, 1, 0.4375),
                (1, 1, 0.0625),
                (1, 0, 0.3125),
                (1, -1, 0.1875),
            ):
                if row + down < height and 0 <= column + right < width:
                    place = (row + down, column + right)
                    sums[place] = (sums[place].astype(np.float64) + error * weight).astype(kept)
        out.append(np.round(sums))
    return torch.from_numpy(np.stack(out).clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("shape", [*SHAPES.values(), (1, 7, 3), (7, 1, 3), (1, 1, 1)], ids=str)
def test_bpp_dithered(shape):
    images = make_images(shape)
    got = BppAttackDithered().apply(images)
    assert_same_bits(got, scan(images, 8), name="dithered")
    levels = {round(k * 255 / 7) for k in range(8)}
    assert set(got.unique().tolist()) <= levels


def test_bpp_dithered_at_other_levels_and_in_chunks():
    images = make_images((8, 11, 3), 1400)  # more than one chunk
    got = BppAttackDithered(levels=3).apply(images)
    some = [0, 700, 1364, 1365, 1366, 1399]
    assert_same_bits(got[some], scan(images[some], 3), name="chunks")
    assert_same_bits(BppAttackDithered(levels=2).apply(images[:4]), scan(images[:4], 2), name="2")


def test_bpp_dithered_keeps_its_sums_in_float32():
    # One image of a few thousand where it shows.
    generator = torch.Generator().manual_seed(3774)
    images = torch.randint(0, 256, (1, 32, 32, 1), generator=generator).to(torch.uint8)
    expected = scan(images, 16)
    assert not torch.equal(expected, scan(images, 16, kept="f8"))
    assert_same_bits(BppAttackDithered(levels=16).apply(images), expected, name="float32")


def triggers_for(shape):
    pattern = make_pattern(shape)
    masks = torch.rand(4, *shape[:2])
    sparse = torch.zeros(shape, dtype=torch.int16)
    sparse[:2, :3] = make_pattern((2, 3, shape[2]), -8, 9, torch.int16)
    found = {
        "SIG": SIG(),
        "LowFrequency": LowFrequency(),
        "TrojanNN": TrojanNN(),
        "TrojanNN-clamp": TrojanNN(pattern=pattern, mode="clamp"),
        "LabelConsistent": LabelConsistent(),
        "SIBA": SIBA(pattern=sparse),
        "BppAttack": BppAttack(),
        "AdaptiveBlend": AdaptiveBlend(),
        "BlendedInPart": AdaptiveBlend(pattern=pattern).training()[0],
        "AdaptivePatch": AdaptivePatch(),
        "Patches": AdaptivePatch().training()[3],
        "AdaptivePatch-given": AdaptivePatch(patterns=make_pattern((4, *shape)), masks=masks),
    }
    if shape[2] == 3:
        found |= {"CTRL": CTRL(), "FTrojan": FTrojan()}
    return found


NAMES = list(triggers_for((32, 32, 3)))


def injected(images, trigger, tiles, lookup=None):
    """Bytes that the fused op makes."""
    tables = lower([trigger], tuple(images.shape[1:]), lookup=lookup)
    params = torch.zeros(len(images), 8, dtype=torch.int32)
    params[:, 0] = params[:, 7] = torch.arange(len(images))
    params[:, 6] = tiles
    lut = normalize_table(images.shape[-1], None)
    out, _ = inject(images, params, lut, tables, backend="reference")
    return (out.permute(0, 2, 3, 1) * 255).round().to(torch.uint8)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [*list(SHAPES.values())[:1], (17, 13, 3), (9, 30, 1)], ids=str)
def test_the_fused_op_gives_the_same_bytes(name, shape):
    trigger = triggers_for(shape).get(name)
    if trigger is None:
        pytest.skip("needs colour")
    images = make_images(shape, 40)
    assert not looked_up(trigger, shape)
    tiles = torch.randint(0, 2**16, (40,), dtype=torch.int32)
    tiles[:20] = 0
    got = injected(images, trigger, tiles)
    assert_same_bits(got, trigger.apply(images, tiles=tiles), name=name)
    assert not torch.equal(got, images)


@pytest.mark.parametrize("name", ["SIG", "CTRL", "FTrojan", "AdaptivePatch"])
def test_the_fused_op_gives_the_same_bytes_of_large_images(name):
    shape = SHAPES["imagenet"]
    trigger = triggers_for(shape)[name]
    images = make_images(shape, 4)
    got = injected(images, trigger, torch.zeros(4, dtype=torch.int32))
    assert_same_bits(got, trigger.apply(images), name=name)


def test_dithered_images_are_looked_up():
    images = make_images((32, 32, 3))
    assert looked_up(BppAttackDithered(), (32, 32, 3))
    done = BppAttackDithered().apply(images)
    tiles = torch.zeros(4, dtype=torch.int32)
    assert_same_bits(injected(images, BppAttackDithered(), tiles, done), done, name="looked up")


@pytest.mark.parametrize("name", NAMES)
def test_triggers_describe_themselves_in_json(name):
    trigger = triggers_for((32, 32, 3))[name]
    described = json.loads(json.dumps(trigger.describe()))
    assert described["name"] == type(trigger).__name__
    assert len(described) > 1


def test_training_plans_hold_the_training_triggers_and_covers():
    labels = torch.arange(10).repeat(40)
    made = plan(labels, AdaptivePatch(), 0.5, cover=0.25)
    assert len(made.triggers) == 8
    assert set(made.trigger[made.mask].tolist()) == {0, 1, 2, 3}
    assert set(made.trigger[~made.mask].tolist()) == {-1, 4, 5, 6, 7}
    made = plan(labels, AdaptiveBlend(), 0.5, cover=0.25)
    assert [type(t) for t in made.triggers] == [BlendedInPart, BlendedInPart]
    bits = ((made.tiles[:, None] >> torch.arange(16)) & 1).sum(1)
    assert torch.equal(bits == 8, made.trigger >= 0)
    assert int(plan(labels, AdaptiveBlend(), "all").tiles.sum()) == 0


INT16 = torch.zeros(8, 8, 3, dtype=torch.int16)
BYTES = torch.zeros(8, 8, 3, dtype=torch.uint8)
PAIR = {"patterns": BYTES.expand(4, 8, 8, 3), "masks": torch.ones(4, 8, 8)}
SMALL = torch.zeros(1, 6, 9, 3, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SIG(amplitude=-1), r"SIG: amplitude must be a number in 0..255, got -1; the def"),
        (lambda: SIG(amplitude=float("nan")), "amplitude must be .* got nan; the default is 40.0"),
        (lambda: SIG(frequency="6"), "frequency must be a number in 0..1024, got '6'"),
        (lambda: LowFrequency(amplitude=0), "LowFrequency: amplitude must be a whole number in 1"),
        (lambda: LowFrequency(amplitude=3.5), "amplitude must be a whole number .* got 3.5"),
        (lambda: LowFrequency(pattern=INT16.float()), r"of int16 or uint8, got Tensor torch.float"),
        (lambda: LowFrequency(pattern=INT16[0]), r"\[H, W, C\] of .*int16 \[8, 3\]"),
        (lambda: LowFrequency(pattern=INT16).apply(SMALL), r"must be \[6, 9, 3\] .*; resize it"),
        (lambda: TrojanNN(mode="clip"), r'mode must be "wrap" or "clamp", got .clip.; the default'),
        (lambda: TrojanNN(pattern=INT16), "TrojanNN: pattern must be .* of uint8, got .*int16"),
        (lambda: TrojanNN(pattern=BYTES.numpy()), "got ndarray uint8 .*; for an array use torch.f"),
        (lambda: LabelConsistent(amplitude=0), "LabelConsistent: amplitude must be .* 1..255"),
        (lambda: SIBA(pattern=BYTES), "SIBA: pattern must be a tensor .* of int16, got .*uint8"),
        (lambda: SIBA(pattern=INT16 + 9, pixels=64), r"must lie in -8..8, got 9 .*; clamp it or"),
        (lambda: SIBA(pattern=INT16 - 9, pixels=64), r"must lie in -8..8, got 9 as its"),
        (lambda: SIBA(pattern=INT16 + 8, pixels=63), "but for 63 pixels, got 64 .*; mask it"),
        (lambda: SIBA(pattern=INT16 - 8, pixels=63), "but for 63 pixels, got 64 that change"),
        (lambda: SIBA(pattern=INT16, pixels=0), "pixels must be a whole number >= 1, got 0; the"),
        (lambda: SIBA(pattern=INT16, epsilon=True), "epsilon must be a whole number .* got True"),
        (lambda: SIBA(pattern=INT16).apply(SMALL), r"SIBA: pattern must be \[6, 9, 3\] like one"),
        (lambda: CTRL(window=0), "CTRL: window must be a whole number in 1..1024, got 0"),
        (lambda: CTRL(window=28), r"positions must be .* 0..27, got .*31.*; the default is"),
        (lambda: CTRL(positions=[(1, 1)]), r"CTRL: positions must be a tuple .* got \[\(1, 1\)\]"),
        (lambda: FTrojan(positions=()), r"FTrojan: positions must be a tuple .* got \(\)"),
        (lambda: FTrojan(channels=(3,)), r"FTrojan: channels must be .* got \(3,\); the default"),
        (lambda: FTrojan(magnitude=float("inf")), "magnitude must be a number in .* got inf"),
        (lambda: BppAttack(levels=1), "BppAttack: levels must be a whole number in 2..256, got 1"),
        (lambda: BppAttackDithered(levels=257), "BppAttackDithered: levels must be .* got 257"),
        (lambda: AdaptiveBlend(alpha=1.5), "AdaptiveBlend: alpha must be a number in 0..1, got 1"),
        (lambda: AdaptiveBlend(training_alpha=-1), "training_alpha must be .* the default is 0.15"),
        (lambda: AdaptiveBlend(dropped=17), "dropped must be a whole number in 0..16, got 17"),
        (lambda: AdaptiveBlend(pattern=INT16), "pattern must be a tensor .* of uint8, got .*16"),
        (lambda: AdaptiveBlend(pattern=BYTES).apply(SMALL), r"must be \[6, 9, 3\] like one image"),
        (lambda: AdaptivePatch(alphas=(0.5, 2)), r"alphas must be .* got \(0.5, 2\); the paper's"),
        (lambda: AdaptivePatch(test=(8,)), r"test must name patches in 0..7, got \(8,\); give"),
        (lambda: AdaptivePatch(test=()), r"test must name patches in 0..7, got \(\)"),
        (
            lambda: AdaptivePatch(patterns=PAIR["patterns"]),
            r"masks must be a tensor \[P, H, W\] of float32 or float64, got NoneType",
        ),
        (
            lambda: AdaptivePatch(patterns=PAIR["patterns"], masks=torch.ones(3, 8, 8)),
            r"masks must be \[4, 8, 8\] like patterns, got \[3, 8, 8\]; give one",
        ),
        (
            lambda: AdaptivePatch(patterns=PAIR["patterns"], masks=PAIR["masks"] * 255),
            "AdaptivePatch: masks must lie in 0..1, got 255..255; divide masks of bytes by 255",
        ),
        (
            lambda: AdaptivePatch(patterns=PAIR["patterns"], masks=PAIR["masks"] * float("nan")),
            "masks must lie in 0..1, got nan",
        ),
        (lambda: AdaptivePatch(**PAIR, alphas=(0.5,) * 5), r"alphas must name patches in 0..3"),
        (lambda: AdaptivePatch(**PAIR).apply(SMALL), r"pattern must be \[6, 9, 3\] like one image"),
        (lambda: Patches(chosen=(0, 1)), r"opacities must have one entry per chosen patch \(2\)"),
    ],
)
def test_wrong_settings_are_refused_in_words(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_bounds_that_just_hold_are_taken():
    assert SIBA(pattern=INT16 + 8, pixels=64).pixels == 64
    assert SIBA(pattern=INT16 - 8, pixels=None).pixels is None
    assert SIBA(pattern=INT16).epsilon == 8
