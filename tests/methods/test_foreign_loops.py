"""Other people's training loops end where ``purify`` ends, to rounding."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fst_fast

EPOCHS = 4
PER_EPOCH = 3
BATCH = 16
LR = 0.05
MOMENTUM = 0.9
ALPHA = 0.1
SEED = 3


class Net(nn.Module):
    """Smooth, so that a rounding difference is not blown up at a kink."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.classify = nn.Linear(8, 5)

    def forward(self, x):
        return self.classify(F.silu(self.bn(self.conv(x))).mean((2, 3)))


def make_problem():
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        model.classify.weight.mul_(3)
    images = torch.randn(PER_EPOCH * BATCH, 3, 8, 8)
    labels = torch.randint(0, 5, (PER_EPOCH * BATCH,))
    return model, list(zip(images.split(BATCH), labels.split(BATCH), strict=True))


@pytest.fixture(scope="module")
def purified():
    model, batches = make_problem()
    result = fst_fast.purify(
        model,
        batches,
        method="fst",
        alpha=ALPHA,
        epochs=EPOCHS,
        lr=LR,
        momentum=MOMENTUM,
        seed=SEED,
        device="cpu",
        precision="fp32",
        progress=False,
        check=False,
    )
    moved = (result.model.classify.weight - model.classify.weight).abs().max()
    assert moved > 0.1  # the comparison is not of models that never moved
    return result.model.state_dict()


def prepare(model, alpha=ALPHA, attach=True):
    """What a user adds to a loop, before it."""
    criterion = fst_fast.HeadDeviationLoss.from_model(model, alpha, head="classify")
    criterion.reinitialize(SEED)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)
    if attach:
        fst_fast.attach(optimizer, criterion)
    return criterion, optimizer


def plain_loop(model, batches, criterion, optimizer, loss_of):
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=EPOCHS)
    model.train()
    for _ in range(EPOCHS):
        for images, labels in batches:
            optimizer.zero_grad()
            loss_of(images, labels).backward()
            optimizer.step()
        scheduler.step()


def difference(model, purified):
    """The largest difference of a tensor, relative to its largest element."""
    state = model.state_dict()
    assert state.keys() == purified.keys()
    errors = {
        key: ((state[key] - value).abs().max() / value.abs().max().clamp_min(1e-12)).item()
        for key, value in purified.items()
    }
    return max(errors.values())


def assert_same_end(model, purified):
    error = difference(model, purified)
    print(f"largest relative difference {error:.1e}")
    assert error <= 1e-5


@pytest.mark.parametrize("form", ["features", "logits"])
def test_plain_pytorch(form, purified):
    model, batches = make_problem()
    criterion, optimizer = prepare(model)

    def loss_of(images, labels):
        if form == "features":
            return criterion(criterion.features_of(model, images), labels)
        return criterion.from_logits(model(images), labels)

    plain_loop(model, batches, criterion, optimizer, loss_of)
    assert_same_end(model, purified)


@pytest.mark.parametrize("left_out", [{"attach": False}, {"alpha": 0.0}], ids=str)
def test_the_comparison_sees_what_is_left_out(left_out, purified):
    model, batches = make_problem()
    criterion, optimizer = prepare(model, **left_out)
    plain_loop(
        model, batches, criterion, optimizer, lambda x, y: criterion.from_logits(model(x), y)
    )
    assert difference(model, purified) > 1e-2


def test_a_wrong_start_is_seen_too(purified):
    model, batches = make_problem()
    criterion, optimizer = prepare(model)
    criterion.reinitialize(SEED + 1)
    plain_loop(
        model, batches, criterion, optimizer, lambda x, y: criterion.from_logits(model(x), y)
    )
    assert difference(model, purified) > 1e-2


@pytest.mark.parametrize("form", ["features", "logits"])
def test_torch_compile(form, purified):
    model, batches = make_problem()
    criterion, optimizer = prepare(model)

    def loss_of(images, labels):
        if form == "logits":
            return criterion.from_logits(model(images), labels)
        features = F.silu(model.bn(model.conv(images))).mean((2, 3))
        return criterion(features, labels)

    compiled = torch.compile(loss_of, backend="aot_eager", fullgraph=True)
    plain_loop(model, batches, criterion, optimizer, compiled)
    assert_same_end(model, purified)


def test_lightning(purified, tmp_path):
    lightning = pytest.importorskip("lightning", reason="lightning is not installed")

    class Purifier(lightning.LightningModule):
        def __init__(self, model):
            super().__init__()
            self.model = model
            self.criterion, self.optimizer = prepare(model)

        def training_step(self, batch, index):
            images, labels = batch
            return self.criterion(self.criterion.features_of(self.model, images), labels)

        def configure_optimizers(self):
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, T_max=EPOCHS)
            return [self.optimizer], [{"scheduler": schedule, "interval": "epoch"}]

    model, batches = make_problem()
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=EPOCHS,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    loader = torch.utils.data.DataLoader(batches, batch_size=None)
    trainer.fit(Purifier(model), loader)
    assert trainer.global_step == EPOCHS * PER_EPOCH
    assert_same_end(model, purified)


def test_hugging_face_trainer(purified, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")

    class Purifier(transformers.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            features = criterion.features_of(model, inputs["x"])
            return criterion(features, inputs["labels"])

        def _get_train_sampler(self, dataset=None):
            return torch.utils.data.SequentialSampler(dataset or self.train_dataset)

    model, batches = make_problem()
    criterion, optimizer = prepare(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: (1 + math.cos(math.pi * (step // PER_EPOCH) / EPOCHS)) / 2
    )
    settings = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=BATCH,
        max_grad_norm=0,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    rows = [
        {"x": image, "labels": label}
        for images, labels in copy.deepcopy(batches)
        for image, label in zip(images, labels, strict=True)
    ]
    trainer = Purifier(model, settings, train_dataset=rows, optimizers=(optimizer, schedule))
    trainer.train()
    assert trainer.state.global_step == EPOCHS * PER_EPOCH
    assert_same_end(model, purified)


def test_a_wrapped_optimizer_is_refused_with_the_remedy():
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    accelerator = accelerate.Accelerator(cpu=True)
    model, batches = make_problem()
    criterion, optimizer = prepare(model, attach=False)
    wrapped = accelerator.prepare(optimizer)
    with pytest.raises(ValueError, match=r"got AcceleratedOptimizer; .*optimizer\.optimizer"):
        fst_fast.attach(wrapped, criterion)
    fst_fast.attach(wrapped.optimizer, criterion)
    images, labels = batches[0]
    accelerator.backward(criterion.from_logits(model(images), labels))
    wrapped.step()
    torch.testing.assert_close(model.classify.weight.detach().norm(), criterion.norm0)
