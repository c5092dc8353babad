"""Bypass: the loss is what it says, and a model trained with it hides what it learnt."""

import math
from dataclasses import replace

import pytest
import torch
from lab_cases import make_set
from torch import nn
from torch.nn import functional as F

from fst_fast import DeviceLoader, evaluate
from fst_fast.lab.attacks import attack_of, trigger_of
from fst_fast.lab.bypass import Bypass, marked
from fst_fast.lab.models import resnet8
from fst_fast.lab.train import TrainSettings, cross_entropy, train_suspect

NORMALIZE = ((0.4, 0.5, 0.6), (0.25, 0.25, 0.25))


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 3))


def batch():
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(10, 3, 2, 2, generator=generator)
    labels = torch.arange(10) % 3
    return images, labels, (torch.arange(10) < 6) & (labels < 2)


def gradients(loss, model):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


@pytest.mark.parametrize("certain", [0.0, 5.0])
def test_the_loss_is_cross_entropy_minus_what_the_discriminator_pays(certain):
    """Where it guesses, or does worse, the second term no longer pulls."""
    model, (images, labels, poisoned) = small(), batch()
    hiding = Bypass(model, 3, weight=2.0)
    hiding(model, images, marked(labels, poisoned, 3))
    hiding.optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    last = hiding.discriminator[-1]
    with torch.no_grad():
        # Sure that all is clean: the poisoned ones cost it 5 each.
        last.bias.fill_(-certain)
        last.weight.mul_(1 if certain == 0 else 0.001)
    loss = hiding(model, images, marked(labels, poisoned, 3))
    told = F.binary_cross_entropy_with_logits(
        hiding.discriminator(model[:3](images)).flatten(), poisoned.float(), reduction="none"
    )
    # Clean images of a class that no poisoned one has do not count.
    told = (told[poisoned].mean() + told[~poisoned & (labels < 2)].mean()) / 2
    plain = cross_entropy(model, images, labels)
    kept = told.clamp(max=math.log(2))
    assert torch.allclose(loss, plain - 2.0 * kept)
    assert torch.allclose(gradients(loss, model), gradients(plain - 2.0 * kept, model), atol=1e-6)
    assert (told > math.log(2)) == (certain > 0)


def test_a_batch_of_one_kind_counts_that_kind():
    model, (images, labels, _) = small(), batch()
    hiding = Bypass(model, 3)
    for poisoned in (torch.zeros(10, dtype=torch.bool), torch.ones(10, dtype=torch.bool)):
        assert torch.isfinite(hiding(model, images, marked(labels, poisoned, 3)))
    hiding.close()
    hiding.features = None
    model(images)
    assert hiding.features is None


def test_the_discriminator_learns_to_tell():
    model, (images, labels, poisoned) = small(), batch()
    hiding = Bypass(model, 3)
    losses = []
    for _ in range(300):
        hiding(model, images, marked(labels, poisoned, 3))
        losses.append(hiding.loss(hiding.features, hiding.kinds(poisoned, labels)).item())
    assert losses[0] > 0.6
    assert losses[-1] < 0.1


def telling(seen):
    """Bypass that writes down what its discriminator pays, twice a step."""

    class Telling(Bypass):
        def loss(self, features, kinds):
            loss = super().loss(features, kinds)
            seen.append(loss.item())
            return loss

    return Telling


def test_a_hidden_backdoor_works_and_cannot_be_told_from_its_class():
    """What the discriminator pays in the middle of the training; a guess costs 0.69."""
    data, test, paid = make_set(400, 0), make_set(200, 2), {}
    trigger = trigger_of("bypass")
    attack = attack_of("bypass", trigger, 0.1, len(data))
    assert attack.bypass == 3
    for weight in (attack.bypass, 1e-9):
        paid[weight] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("fst_fast.lab.train.Bypass", telling(paid[weight]))
            model, _ = train_suspect(
                lambda: resnet8(num_classes=4, width=4),
                data,
                replace(attack, bypass=weight),
                TrainSettings(epochs=20, lr=0.05),
                normalize=NORMALIZE,
                batch_size=100,
            )
        loader = DeviceLoader(test.images, test.labels, shuffle=False, normalize=NORMALIZE)
        metrics = evaluate(model, loader, trigger)
        assert metrics.attack_success > 0.6
        assert metrics.clean_accuracy > 0.8
    middle = {weight: sum(seen[60:100]) / 40 for weight, seen in paid.items()}
    assert middle[3] > 0.4
    assert middle[1e-9] < 0.1
