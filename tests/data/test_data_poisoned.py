"""DeviceLoader with triggers: the bytes of apply, whatever kind of trigger, wherever the images."""

from dataclasses import dataclass

import pytest
import torch

from fst_fast import DeviceLoader
from fst_fast.triggers import BadNets, Blended, Trigger
from fst_fast.triggers.base import Chroma, Elementwise, Gather, Warp, WarpField
from fst_fast.triggers.poisoning import plan, poison

generator = torch.Generator().manual_seed(3)
IMAGES = torch.randint(0, 256, (37, 12, 10, 3), generator=generator).to(torch.uint8)
LABELS = torch.arange(37) % 5
NORMALIZE = ((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))


@dataclass(frozen=True, eq=False)
class Redder(Chroma):
    def _change(self, ycrcb):
        out = ycrcb.int()
        out[..., 1] += 20
        return out.clamp(0, 255).to(torch.uint8)


@dataclass(frozen=True, eq=False)
class Mirrored(Gather):
    def _sources(self, height, width):
        out = torch.arange(height * width).view(height, width).flip(1)
        out[0] = -1
        return out


@dataclass(frozen=True, eq=False)
class Wavy(Warp):
    noisy: bool = False

    def _field(self, height, width):
        row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        coords = torch.stack([row + 0.3 * (column % 3), column - 0.4], dim=-1)
        return WarpField(coords, not self.noisy, (-0.5, 1.0, -1.0, 2.0) if self.noisy else None, 7)


@dataclass(frozen=True, eq=False)
class Average(Trigger):
    """No table holds it: every pixel depends on the whole image."""

    def _apply(self, images):
        mean = images.float().mean(dim=(1, 2), keepdim=True)
        return (0.5 * images + 0.5 * mean).to(torch.uint8)


@dataclass(frozen=True, eq=False)
class Shaded(Elementwise):
    """In training a fainter one with tiles left out; on cover images a mirror."""

    step: int = 100

    def _apply(self, images):
        return (images.int() + self.step).clamp(max=255).to(torch.uint8)

    def training(self):
        return (Shaded(50), Shaded(60))

    def covers(self):
        return (Mirrored(),)

    def tiles(self, count, generator):
        return torch.randint(1, 2**16, (count,), generator=generator).int()


@dataclass(frozen=True, eq=False)
class ShadedAverage(Average):
    def tiles(self, count, generator):
        return torch.randint(1, 2**16, (count,), generator=generator).int()


KINDS = {
    "map": BadNets(),
    "blend": Blended(),
    "chroma": Redder(),
    "gather": Mirrored(),
    "warp": Wavy(),
    "noise": Wavy(True),
    "looked-up": Average(),
    "several": (BadNets(), Mirrored(), Average(), Wavy(True), Redder()),
    "parts": Shaded(),
    "looked-up-tiles": ShadedAverage(),
}


def batches(*arguments, **options):
    return [(x.clone(), y.clone()) for x, y in DeviceLoader(*arguments, batch_size=8, **options)]


def assert_same(got, expected):
    assert len(got) == len(expected) > 0
    for (x, y), (wanted_x, wanted_y) in zip(got, expected, strict=True):
        assert torch.equal(x, wanted_x)
        assert torch.equal(y, wanted_y)


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("augment", [None, "cifar"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_rate_is_poisoned_as_the_lab_does_it(kind, augment, resident):
    options = {"augment": augment, "normalize": NORMALIZE, "seed": 5}
    poisoned = poison(IMAGES, LABELS, KINDS[kind], rate=0.4, target=2, seed=5)
    assert (poisoned.images != IMAGES).flatten(1).any(1).sum() == poisoned.mask.sum() == 15
    got = batches(
        *(IMAGES, LABELS),
        **(options | {"trigger": KINDS[kind], "poisoned": 0.4, "target": 2, "resident": resident}),
    )
    assert_same(got, batches(poisoned.images, poisoned.labels, **options))


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_all_images_carry_the_trigger_of_test_time(kind, resident):
    triggers = KINDS[kind]
    loader = DeviceLoader(
        IMAGES, LABELS, 8, trigger=triggers, shuffle=False, target=3, resident=resident
    )
    pixels = torch.cat([x for x, _ in loader]).mul(255).round().to(torch.uint8).permute(0, 2, 3, 1)
    assert all((y == 3).all() for _, y in loader)
    if isinstance(triggers, Trigger):
        expected = triggers.apply(IMAGES)
        hidden = isinstance(triggers, Shaded | ShadedAverage)
        assert torch.equal(pixels, expected) != hidden
    else:
        each = torch.stack([t.apply(IMAGES) for t in triggers])
        assert (pixels == each).flatten(2).all(2).any(0).all()


def test_a_mask_names_the_images():
    mask = torch.arange(37) % 3 == 1
    loader = DeviceLoader(IMAGES, LABELS, 37, trigger=BadNets(), poisoned=mask, shuffle=False)
    assert torch.equal(loader.mask, mask)
    [(_, labels)] = loader
    assert torch.equal(labels, torch.where(mask, 0, LABELS))


def test_labels_of_each_kind_of_attack():
    def planned(relabel, **options):
        return plan(LABELS, BadNets(), 0.2, target=1, relabel=relabel, **options)

    one, to_all, clean = (planned(r) for r in ("all-to-one", "all-to-all", "clean-label"))
    assert one.mask.sum() == to_all.mask.sum() == clean.mask.sum() == 7
    assert (one.labels[one.mask] == 1).all()
    assert (LABELS[one.mask] != 1).all()
    assert torch.equal(to_all.labels[to_all.mask], (LABELS[to_all.mask] + 1) % 5)
    assert (LABELS[clean.mask] == 1).all()
    for each in (one, to_all, clean):
        assert torch.equal(each.labels[~each.mask], LABELS[~each.mask])
        assert torch.equal(each.trigger >= 0, each.mask)


def test_covers_keep_their_labels():
    planned = plan(LABELS, Shaded(), 0.2, cover=0.3, seed=1)
    covered = (planned.trigger >= 0) & ~planned.mask
    assert covered.sum() == 11
    assert planned.mask.sum() == 7
    assert torch.equal(planned.labels[covered], LABELS[covered])
    assert torch.equal(planned.apply(IMAGES)[covered], Mirrored().apply(IMAGES[covered]))
    assert {type(t) for t in planned.triggers} == {Shaded, Mirrored}
    assert len(set(planned.trigger[planned.mask].tolist())) == 2  # both of training()


@pytest.mark.parametrize("augment", [None, "cifar"])
def test_streaming_gives_the_same_batches(augment):
    options = {"augment": augment, "normalize": NORMALIZE, "trigger": Blended(), "poisoned": 0.5}
    resident = DeviceLoader(IMAGES, LABELS, 8, resident=True, **options)
    streamed = DeviceLoader(IMAGES, LABELS, 8, resident=False, **options)
    for _ in range(2):
        # As lists: a batch stays what it is while later ones are made.
        assert_same(list(streamed), list(resident))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_batches_in_half_precision_are_rounded_once(dtype):
    [(half, _)] = DeviceLoader(IMAGES, LABELS, 37, normalize=NORMALIZE, dtype=dtype)
    [(full, _)] = DeviceLoader(IMAGES, LABELS, 37, normalize=NORMALIZE)
    assert torch.equal(half, full.to(dtype))


def test_contiguous_batches():
    [(images, _)] = DeviceLoader(IMAGES, LABELS, 37, channels_last=False)
    [(usual, _)] = DeviceLoader(IMAGES, LABELS, 37)
    assert images.is_contiguous()
    assert usual.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images, usual)


def test_a_table_normalises_as_it_says():
    table = torch.rand(3, 256)
    [(images, _)] = DeviceLoader(IMAGES, LABELS, 37, normalize=table, shuffle=False)
    for channel in range(3):
        assert torch.equal(images[:, channel], table[channel][IMAGES[..., channel].long()])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"poisoned": 0.1}, "trigger must be given to poison images, got None"),
        ({"cover": 0.1}, "trigger must be given"),
        ({"trigger": BadNets(), "poisoned": 1.5}, r"a rate that lies in 0..1, .* got 1.5"),
        ({"trigger": BadNets(), "poisoned": 0.9}, r"asks for 33 images, but only 29 are not of"),
        ({"trigger": BadNets(), "poisoned": "some"}, "a rate that lies in 0..1, or a bool mask"),
        ({"trigger": BadNets(), "poisoned": torch.ones(5, dtype=torch.bool)}, r"mask \[37\]"),
        ({"trigger": BadNets(), "poisoned": torch.ones(37)}, "bool mask"),
        ({"trigger": BadNets(), "target": 5}, r"target must be a class in 0..4, got 5"),
        ({"trigger": BadNets(), "relabel": "none"}, "relabel must be one of all-to-one"),
        ({"trigger": BadNets(), "poisoned": 0.1, "cover": 0.1}, "cover must be 0 for BadNets"),
        ({"trigger": Shaded(), "poisoned": 0.5, "cover": 0.9}, "asks for 33 images, but only 19"),
        ({"trigger": Shaded(), "cover": -0.1, "poisoned": 0.1}, "cover must be a rate"),
        ({"trigger": BadNets(size=11)}, "must fit into 12 x 10 pixels"),
        ({"trigger": "badnets"}, "trigger must be a Trigger or several"),
        ({"trigger": ()}, "trigger must be a Trigger or several"),
        ({"normalize": torch.ones(3, 255)}, r"normalize must be floats \[3, 256\]"),
        ({"dtype": torch.float64}, "dtype must be one of torch.float32, torch.bfloat16, .* got"),
    ],
)
def test_bad_settings_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        list(DeviceLoader(IMAGES, LABELS, 8, **options))
