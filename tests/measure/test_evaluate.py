"""Metrics of models whose every answer is written into the pixels, so that all counts are known."""

import importlib
import types

import pytest
import torch
from check import assert_same_bits
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from fst_fast import DeviceLoader, Metrics, evaluate
from fst_fast.triggers import BadNets, Trigger

K, COUNT, TARGET, STEP = 10, 57, 2, 25
NORMALIZE = ([0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616])


class Coded(nn.Module):
    """Answers what pixel (0, 0) says; the target where the corner is white and (0, 1) is, too."""

    def __init__(self, normalize=None):
        super().__init__()
        mean, std = normalize or ([0.0] * 3, [1.0] * 3)
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))
        self.norm = nn.BatchNorm2d(3)  # in train mode it would change its buffers
        self.head = nn.Linear(K, K, bias=False)
        self.seen = []
        nn.init.eye_(self.head.weight)

    def forward(self, x):
        self.seen.append(x)
        self.norm(x)
        pixels = x * self.std + self.mean
        answer = (pixels[:, 0, 0, 0] * 255 / STEP).round().long()
        white = (pixels[:, :, -3:, -3:] > 0.99).all(dim=(1, 2, 3)) & (pixels[:, 0, 0, 1] > 0.5)
        answer = torch.where(white, TARGET, answer)
        return self.head(torch.eye(K, dtype=x.dtype, device=x.device)[answer])


def make_data(seed=0):
    """Bytes, labels, and what the model answers to each image, clean and triggered."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 200, (COUNT, 8, 8, 3), generator=generator).to(torch.uint8)
    labels = torch.randint(0, K, (COUNT,), generator=generator)
    right = torch.rand(COUNT, generator=generator) < 0.7
    answers = torch.where(right, labels, torch.randint(0, K, (COUNT,), generator=generator))
    fooled = torch.rand(COUNT, generator=generator) < 0.6
    images[:, 0, 0, 0] = (answers * STEP).to(torch.uint8)
    images[:, 0, 1, 0] = torch.where(fooled, 255, 0).to(torch.uint8)
    return images, labels, answers, torch.where(fooled, TARGET, answers)


IMAGES, LABELS, ANSWERS, TRIGGERED = make_data()


def expected_metrics(triggered=True):
    """Counted in plain Python."""
    rows = list(zip(LABELS.tolist(), ANSWERS.tolist(), TRIGGERED.tolist(), strict=True))
    others = [(label, shown) for label, _, shown in rows if label != TARGET]
    return Metrics(
        clean_accuracy=sum(label == answer for label, answer, _ in rows) / COUNT,
        attack_success=sum(s == TARGET for _, s in others) / len(others) if triggered else None,
        robust_accuracy=sum(s == label for label, s in others) / len(others) if triggered else None,
        images=COUNT,
        triggered_images=len(others) if triggered else 0,
    )


def loader_of(batch_size=10, normalize=NORMALIZE, **more):
    return DeviceLoader(IMAGES, LABELS, batch_size, shuffle=False, normalize=normalize, **more)


def torch_loader(normalize=NORMALIZE, batch_size=10):
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in normalize)
    floats = (IMAGES.permute(0, 3, 1, 2).float() / 255 - mean) / std
    return DataLoader(TensorDataset(floats, LABELS), batch_size=batch_size)


def test_the_hand_made_data_tells_the_rates_apart():
    expected = expected_metrics()
    rates = {expected.clean_accuracy, expected.attack_success, expected.robust_accuracy}
    assert len(rates) == 3
    assert all(0.1 < rate < 0.9 for rate in rates)
    assert expected.triggered_images < expected.images


@pytest.mark.parametrize("batch_size", [1, 10, 57, 100])
@pytest.mark.parametrize("normalize", [None, NORMALIZE], ids=["0..1", "normalised"])
def test_all_rates_are_exact(normalize, batch_size):
    got = evaluate(Coded(normalize), loader_of(batch_size, normalize), BadNets(), TARGET)
    assert got == expected_metrics()


def test_a_plain_dataloader_gives_the_same_numbers():
    got = evaluate(Coded(NORMALIZE), torch_loader(), BadNets(), TARGET, normalize=NORMALIZE)
    assert got == expected_metrics()


def test_without_a_trigger_the_attack_is_not_measured():
    got = evaluate(Coded(NORMALIZE), loader_of())
    assert got == expected_metrics(triggered=False)
    assert str(got).endswith("% of 57; attack success not measured")
    assert str(Metrics(0.98765, 0.5, 0.25, 200, 180)) == (
        "clean accuracy 98.77 % of 200; attack success 50.00 %, robust accuracy 25.00 % of 180"
    )


def test_with_images_of_the_target_alone_the_attack_is_not_measured():
    rows = LABELS == TARGET
    got = evaluate(Coded(), DeviceLoader(IMAGES[rows], LABELS[rows]), BadNets(), TARGET)
    assert (got.attack_success, got.robust_accuracy, got.triggered_images) == (None, None, 0)
    assert got.images == int(rows.sum()) > 0
    assert "not measured" in str(got)


def test_each_image_is_classified_once_clean_and_once_triggered():
    model = Coded()
    evaluate(model, loader_of(normalize=None), BadNets(), TARGET, device="cpu")
    probe, *passes = model.seen  # the first call tries the layout on two images
    assert len(probe) == 2
    sizes = [10, 10, 10, 10, 10, 7]
    assert [len(x) for x in passes] == [n for n in sizes for _ in ("clean", "triggered")]
    clean = torch.cat(passes[::2])
    assert_same_bits(clean.mul(255).round().byte().permute(0, 2, 3, 1), IMAGES, name="clean")
    triggered = torch.cat(passes[1::2]).mul(255).round().byte().permute(0, 2, 3, 1)
    assert_same_bits(triggered, BadNets().apply(IMAGES), name="triggered")


class Recording(Trigger):
    """Keeps the bytes that it is shown."""

    def _apply(self, images):
        shown.append(images.clone())
        return images.clone()


shown = []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_the_trigger_gets_the_stored_bytes_whatever_the_models_dtype(dtype):
    shown.clear()
    normalize = ([0.1, 0.2, 0.05], [0.15, 0.2, 0.1])  # large values, where bfloat16 is coarse
    model, loader = Coded(normalize).to(dtype), loader_of(normalize=normalize)
    evaluate(model, loader, Recording(), TARGET, device="cpu")
    assert_same_bits(torch.cat(shown), IMAGES, name="bytes")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_precisions(precision):
    outputs = []
    model = Coded(NORMALIZE)
    model.head.register_forward_hook(lambda _, inputs, output: outputs.append(output.dtype))
    got = evaluate(model, loader_of(), BadNets(), TARGET, precision=precision)
    assert got == expected_metrics()
    used = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    assert outputs[-1] == used


@pytest.mark.parametrize(
    "wrap",
    [
        lambda logits: types.SimpleNamespace(logits=logits),
        lambda logits: {"logits": logits},
        lambda logits: (logits,),
        lambda logits: logits[:, :, None, None],
    ],
    ids=[".logits", "dict", "tuple", "1x1 map"],
)
def test_outputs_of_other_libraries_are_understood(wrap):
    model = Coded()
    model.register_forward_hook(lambda _, inputs, output: wrap(output))
    assert evaluate(model, loader_of(normalize=None), BadNets(), TARGET) == expected_metrics()


@pytest.mark.parametrize(
    ("spoil", "got"),
    [
        (lambda logits: logits[:, :, None, None].expand(-1, -1, 2, 2), r"\[\d+, 10, 2, 2\]"),
        (lambda logits: logits.argmax(1).float(), r"\[\d+\]"),
        (lambda logits: logits.flatten()[None], r"\[1, \d+\]"),
    ],
    ids=["map", "1-D", "one row"],
)
def test_outputs_that_are_no_logits_are_refused(spoil, got):
    model = Coded()
    model.register_forward_hook(lambda _, inputs, output: spoil(output))
    with pytest.raises(ValueError, match=rf"model must return logits \[10, classes\].* got {got}"):
        evaluate(model, loader_of(normalize=None))


def test_a_model_that_views_takes_channels_last_batches():
    class Viewing(Coded):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, padding=1)

        def forward(self, x):
            self.conv(x).view(len(x), -1)
            return super().forward(x)

    loader = loader_of(normalize=None)
    with pytest.raises(RuntimeError, match="view"):
        Viewing()(next(iter(loader))[0])
    assert evaluate(Viewing(), loader, BadNets(), TARGET) == expected_metrics()


def snapshot(model):
    return (
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        {name: p.data_ptr() for name, p in model.named_parameters()},
        {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()},
        {name: module.training for name, module in model.named_modules()},
    )


@pytest.mark.parametrize("fails", [False, True], ids=["done", "raised"])
def test_the_model_is_left_as_it_was(fails):
    model = Coded().train()
    model.norm.eval()
    model.norm.bias.requires_grad_(False)
    before = snapshot(model)
    if fails:
        batches = [*loader_of(normalize=None), (torch.zeros(2, 3, 8, 8), None)]
        with pytest.raises(ValueError, match="loader must yield labels"):
            evaluate(model, batches, BadNets(), TARGET, device="cpu")
    else:
        evaluate(model, loader_of(normalize=None), BadNets(), TARGET, device="cpu")
    state, *rest = snapshot(model)
    assert rest == list(before[1:])
    assert all(torch.equal(state[name], before[0][name]) for name in state)
    assert torch.is_grad_enabled()


def test_what_a_model_caches_while_evaluated_serves_in_training():
    class Caching(Coded):
        cached = None

        def forward(self, x):
            if self.cached is None:
                self.cached = x.new_ones(1, K)
            return super().forward(x) * self.cached

    model = Caching()
    evaluate(model, loader_of(normalize=None), device="cpu")
    model(next(iter(loader_of(normalize=None)))[0]).sum().backward()
    assert model.head.weight.grad is not None


@pytest.mark.parametrize(("label", "got"), [(12, "12"), (K, "10"), (-3, "-3")])
def test_labels_out_of_range_are_refused(label, got):
    labels = LABELS.clone()
    labels[40] = label  # not in the first batch
    images = torch.cat([images for images, _ in DeviceLoader(IMAGES, LABELS, shuffle=False)])
    batches = list(zip(images.split(10), labels.split(10), strict=True))
    with pytest.raises(ValueError, match=f"loader must hold classes in 0..9.* got {got};"):
        evaluate(Coded(), batches)


@pytest.mark.parametrize("target", [-1, K])
def test_a_target_out_of_range_is_refused(target):
    with pytest.raises(ValueError, match=f"target must hold classes in 0..9.* got {target};"):
        evaluate(Coded(), loader_of(normalize=None), BadNets(), target)


@pytest.mark.parametrize("normalize", [None, ([0.5] * 3, [5.0] * 3)], ids=["missing", "wrong"])
def test_a_normalisation_that_gives_no_pixels_is_refused(normalize):
    with pytest.raises(
        ValueError, match=r"into pixels in 0..1, got -\d+.\d\d..\d+.\d\d with .*pass"
    ):
        evaluate(Coded(), torch_loader(), BadNets(), TARGET, normalize=normalize)
    evaluate(Coded(NORMALIZE), torch_loader(), normalize=normalize)  # without a trigger: no use


def test_only_a_device_loader_is_asked_for_its_normalisation():
    class Other(list):
        def normalize(self):
            """As some loaders name a method."""

    got = evaluate(Coded(), Other(loader_of(normalize=None)), BadNets(), TARGET)
    assert got == expected_metrics()


def test_bad_loaders_are_refused():
    with pytest.raises(ValueError, match="evaluate: loader must yield at least one batch"):
        evaluate(Coded(), [])
    with pytest.raises(ValueError, match="evaluate: loader must yield images as a float tensor"):
        evaluate(Coded(), [(IMAGES, LABELS)])
    got = evaluate(Coded(), iter(loader_of(normalize=None)), BadNets(), TARGET)
    assert got == expected_metrics()


class Waits(TorchDispatchMode):
    """Counts the operations for which the host would wait for a GPU."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waiting = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select")
        self.count += func.overloadpacket.__name__ in waiting
        return func(*args, **(kwargs or {}))


def count_waits(batch_size, monkeypatch):
    lists, tolist = [], torch.Tensor.tolist
    loader = list(loader_of(batch_size))
    with Waits() as waits, monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "tolist", lambda t: lists.append(1) or tolist(t))
        evaluate(Coded(NORMALIZE), loader, BadNets(), TARGET, normalize=NORMALIZE)
    return waits.count + len(lists)


def test_the_host_does_not_wait_batch_by_batch(monkeypatch):
    # Looking for NaN is for batches on the CPU; test_inputs.py shows that others are not read.
    module = importlib.import_module("fst_fast.measure.triggered_batches")
    monkeypatch.setattr(module, "check_batch", lambda batch, *_: batch)
    few, many = (count_waits(size, monkeypatch) for size in (29, 3))
    assert 0 < few == many


def test_a_loader_is_opened_once():
    opened = []

    class Counted(DataLoader):
        def __iter__(self):
            opened.append(1)
            return super().__iter__()

    loader = Counted(torch_loader().dataset, batch_size=10)
    got = evaluate(Coded(NORMALIZE), loader, BadNets(), TARGET, normalize=NORMALIZE)
    assert got == expected_metrics()
    assert len(opened) == 1


class Small(Coded):
    """Has memory for so many images at once."""

    def __init__(self, rows):
        super().__init__()
        self.rows = rows

    def forward(self, x):
        if len(x) > self.rows:
            raise torch.OutOfMemoryError("out of memory")
        return super().forward(x)


def test_batches_that_the_memory_does_not_hold_are_split():
    model = Small(6)
    got = evaluate(model, loader_of(57, None), BadNets(), TARGET, device="cpu")
    assert got == expected_metrics()
    # Two images look for the layout. Then 57, 28, 14 and 7 are too many, once.
    assert [len(x) for x in model.seen] == [2, *2 * [*[3] * 19]]


def test_an_image_that_the_memory_does_not_hold_is_an_error():
    with pytest.raises(torch.OutOfMemoryError):
        evaluate(Small(0), loader_of(4, None), device="cpu")


# Several triggers


def test_several_triggers_share_the_clean_pass():
    named = {"corner": BadNets(), "grey": BadNets(value=100), "top": BadNets(corner="top-right")}
    model = Coded()
    loader = DeviceLoader(IMAGES, LABELS, 16, shuffle=False)
    found = evaluate(model, loader, named, TARGET)
    # As they are and three times triggered, four batches each; two images look for the layout.
    assert sum(len(x) for x in model.seen) <= 4 * COUNT + 4
    assert list(found) == list(named)
    for name, trigger in named.items():
        assert found[name] == evaluate(Coded(), loader, trigger, TARGET), name
    assert found["corner"].attack_success > found["grey"].attack_success


class Numbered(Trigger):
    """Writes each image's key into its first pixel."""

    def _apply_with(self, images, keys):
        out = images.clone()
        out[:, 0, 0, 0] = (keys % K * STEP).to(torch.uint8)
        return out


def test_a_trigger_is_told_each_images_number():
    loader = DeviceLoader(IMAGES, torch.arange(COUNT) % K, 16, shuffle=False)
    found = evaluate(Coded(), loader, Numbered(), TARGET)
    assert found.robust_accuracy == 1.0


def test_no_triggers_are_refused():
    with pytest.raises(ValueError, match="trigger must name at least one trigger, got an empty"):
        evaluate(Coded(), DeviceLoader(IMAGES, LABELS), {})
