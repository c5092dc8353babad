"""Other people's training loops end where ``purify`` ends, to rounding."""

import copy
import math

import pytest
import torch
from foreign_loop_cases import (
    BATCH,
    EPOCHS,
    PER_EPOCH,
    SEED,
    difference,
    loss_by,
    prepare,
    problem,
    purified_state,
)
from torch.nn import functional as F

import fst_fast


@pytest.fixture(scope="module")
def purified():
    return purified_state(batch_norm=True)


def plain_loop(model, batches, criterion, optimizer, loss_of):
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=EPOCHS)
    model.train()
    for _ in range(EPOCHS):
        for images, labels in batches:
            optimizer.zero_grad()
            loss_of(images, labels).backward()
            optimizer.step()
        scheduler.step()


def assert_same_end(model, purified):
    error = difference(model.state_dict(), purified)
    print(f"largest relative difference {error:.1e}")
    assert error <= 1e-5


@pytest.mark.parametrize("form", ["features", "logits"])
def test_plain_pytorch(form, purified):
    model, batches = problem(batch_norm=True)
    criterion, optimizer = prepare(model)

    plain_loop(
        model, batches, criterion, optimizer, lambda x, y: loss_by(form, criterion, model, x, y)
    )
    assert_same_end(model, purified)


@pytest.mark.parametrize("left_out", [{"attach": False}, {"alpha": 0.0}], ids=str)
def test_the_comparison_sees_what_is_left_out(left_out, purified):
    model, batches = problem(batch_norm=True)
    criterion, optimizer = prepare(model, **left_out)
    plain_loop(
        model, batches, criterion, optimizer, lambda x, y: criterion.from_logits(model(x), y)
    )
    assert difference(model.state_dict(), purified) > 1e-2


def test_a_wrong_start_is_seen_too(purified):
    model, batches = problem(batch_norm=True)
    criterion, optimizer = prepare(model)
    criterion.reinitialize(SEED + 1)
    plain_loop(
        model, batches, criterion, optimizer, lambda x, y: criterion.from_logits(model(x), y)
    )
    assert difference(model.state_dict(), purified) > 1e-2


@pytest.mark.parametrize("form", ["features", "logits"])
def test_torch_compile(form, purified):
    model, batches = problem(batch_norm=True)
    criterion, optimizer = prepare(model)

    def loss_of(images, labels):
        if form == "logits":
            return criterion.from_logits(model(images), labels)
        features = F.silu(model.norm(model.conv(images))).mean((2, 3))
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

    model, batches = problem(batch_norm=True)
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

    model, batches = problem(batch_norm=True)
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
    model, batches = problem(batch_norm=True)
    criterion, optimizer = prepare(model, attach=False)
    wrapped = accelerator.prepare(optimizer)
    with pytest.raises(ValueError, match=r"got AcceleratedOptimizer; .*optimizer\.optimizer"):
        fst_fast.attach(wrapped, criterion)
    fst_fast.attach(wrapped.optimizer, criterion)
    images, labels = batches[0]
    accelerator.backward(criterion.from_logits(model(images), labels))
    wrapped.step()
    torch.testing.assert_close(model.classify.weight.detach().norm(), criterion.norm0)
