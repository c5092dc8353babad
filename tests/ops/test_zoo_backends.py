"""Every trigger of the zoo, through every backend, in the loader: the bytes of ``apply``."""

import pytest
import torch
import zoo_cases
from check import assert_same_bits
from inject_cases import CIFAR, DTYPES, large_blocks

from fst_fast import DeviceLoader, triggers
from fst_fast.ops import backends, inject
from fst_fast.triggers.pixels import normalize_table

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BACKENDS = backends.available("inject", DEVICE)


@pytest.fixture(autouse=True)
def _large_blocks(monkeypatch):
    large_blocks(monkeypatch, 2**15)


def expected(images, params, lut):
    """Crop, flip and look up, image by image."""
    out = []
    for image, (_, row, column, flip, *_) in zip(images, params.tolist(), strict=True):
        height, width = image.shape[:2]
        padded = torch.zeros(height + 8, width + 8, 3, dtype=torch.uint8)
        padded[4 : 4 + height, 4 : 4 + width] = image
        shown = padded[4 + row : 4 + row + height, 4 + column : 4 + column + width]
        shown = shown.flip(1) if flip else shown
        out.append(torch.stack([lut[c][shown[..., c].long()] for c in range(3)]))
    return torch.stack(out)


@pytest.mark.parametrize("side", [32, 224])
@pytest.mark.parametrize("name", triggers.ZOO)
def test_every_backend_gives_the_bytes_of_apply(name, side):
    generator = torch.Generator().manual_seed(side)
    images = torch.randint(0, 256, (6, side, side, 3), generator=generator, dtype=torch.uint8)
    trigger = zoo_cases.make(name, images)
    # The interpreter takes its time over large images.
    source = torch.tensor([3, 0, 5, 3] if side == 32 else [5, 3])
    triggered = trigger.apply(images, torch.arange(6))
    assert not torch.equal(triggered, images)
    lookup = triggered if triggers.looked_up(trigger, images.shape[1:]) else None
    tables = triggers.lower([trigger], images.shape[1:], device=DEVICE, lookup=lookup)
    params = torch.zeros(len(source), 8, dtype=torch.int32)
    params[:, 0] = params[:, 7] = source
    params[:, 1:3] = torch.randint(-4, 5, (len(source), 2), generator=generator)
    params[1:3, 3] = 1
    params[:, 5] = torch.arange(len(source))
    # Types are independent of the size.
    for dtype in DTYPES if side == 32 else DTYPES[:1]:
        lut = normalize_table(3, CIFAR, dtype)
        truth = expected(triggered[source], params, lut)
        for backend in BACKENDS:
            given = (t.to(DEVICE) for t in (images, params, lut))
            out, labels = inject(*given, tables, backend=backend)
            assert_same_bits(out.cpu(), truth, name=f"{backend} {dtype}")
            assert labels.tolist() == list(range(len(source)))


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("name", triggers.ZOO)
def test_the_loader_gives_the_bytes_of_apply(name, resident):
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (20, 16, 16, 3), generator=generator, dtype=torch.uint8)
    labels = torch.arange(20) % 5
    trigger = zoo_cases.make(name, images)
    mask = torch.arange(20) % 3 == 1
    loader = DeviceLoader(
        *(images, labels, 6),
        shuffle=False,
        device=DEVICE,
        normalize=torch.arange(256.0).expand(3, 256),
        trigger=trigger,
        poisoned=mask,
        resident=resident,
    )
    shown = torch.cat([batch for batch, _ in loader]).cpu().permute(0, 2, 3, 1).to(torch.uint8)
    poisoned = loader.mask.cpu()
    assert torch.equal(shown[~poisoned], images[~poisoned])
    assert (shown != images).flatten(1).any(1)[poisoned].all()
    # Those two train on parts of themselves; test_data_poisoned.py has their plans.
    if not name.startswith("adaptive"):
        wanted = trigger.apply(images, torch.arange(20))
        assert torch.equal(shown[poisoned], wanted[poisoned])
