"""Which class a backdoored model falls to when it forgets its clean images."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# So many copies of the model are unlearned, in so many steps at most, of so many images each.
_COPIES, _STEPS, IMAGES = 2, 20, 100
MOST_IMAGES = _COPIES * _STEPS * IMAGES
# Every step moves the weights by this share of their norm, with this momentum.
_STEP, _MOMENTUM = 0.015, 0.8
# Wrong answers count from the step at which fewer than this share of the answers are right.
_COUNTS_BELOW = 0.6


def class_evidence(
    model: nn.Module,
    logits_of: Callable[[Tensor, nn.Module], Tensor],
    images: Tensor,
    labels: Tensor,
    classes: int,
    at_once: int = IMAGES,
) -> Tensor:
    """Unlearn clean images, and return how often each class is the wrong answer: [K], sum 1.

    A copy of the model climbs the cross-entropy of clean images until hardly an answer is right.
    The clean function goes first and a backdoor stays, and the answers of a backdoored model gather
    at its target (Reconstructive Neuron Pruning, Li et al., ICML 2023, arXiv 2305.14876, section
    3). Neither the trigger nor its form plays a part.

    Args:
        model: left as it is.
        logits_of: the model's logits [B, K] for images, given (images, model).
        images, labels: [N, C, H, W] and [N] int64, clean.
        classes: K.
        at_once: images of a step, where the memory does not suffice for the usual number.
    """
    counts = torch.full((classes,), 0.1 / classes, device=images.device)
    for _ in range(_COPIES):
        tuned = copy.deepcopy(model).train()
        for module in tuned.modules():
            if isinstance(module, nn.modules.dropout._DropoutNd):
                module.eval()
        counts += _wrong_answers(tuned, logits_of, images, labels, classes, at_once)
    return counts / counts.sum()


def _wrong_answers(
    model: nn.Module,
    logits_of: Callable[[Tensor, nn.Module], Tensor],
    images: Tensor,
    labels: Tensor,
    classes: int,
    at_once: int,
) -> Tensor:
    parameters = [p.requires_grad_() for p in model.parameters()]
    momenta = [torch.zeros_like(p) for p in parameters]
    size = _norm([p.detach() for p in parameters if p.dim() > 1])
    counts = torch.zeros(classes, device=images.device)
    goes_on = torch.ones((), device=images.device)
    for _ in range(_STEPS):
        rows = torch.randint(len(labels), (at_once,), device=images.device)
        with torch.enable_grad():
            logits = logits_of(images[rows], model)
            climbed = -F.cross_entropy(logits, labels[rows])
            gradients = torch.autograd.grad(climbed, parameters, allow_unused=True)
        with torch.no_grad():
            answers = logits.argmax(1)
            wrong = answers != labels[rows]
            share = wrong.float().mean()
            counted = goes_on * (share > 1 - _COUNTS_BELOW)
            counts += torch.bincount(answers[wrong], minlength=classes) * counted / at_once
            # A model at chance has gathered its answers, and says nothing more.
            goes_on *= share < 1 - 1.5 / classes
            if not goes_on:
                break
            length = _norm([g for g in gradients if g is not None])
            for parameter, momentum, gradient in zip(parameters, momenta, gradients, strict=True):
                if gradient is not None:
                    momentum.mul_(_MOMENTUM).add_(gradient / length, alpha=1 - _MOMENTUM)
                    parameter.sub_(_STEP * size * momentum)
    return counts / counts.sum().clamp(min=1e-6)


def _norm(tensors: list[Tensor]) -> Tensor:
    """The norm of all of them together, and never zero, also of none."""
    norms = [tensor.norm() for tensor in tensors] or [torch.zeros(())]
    return torch.stack(norms).norm().clamp(min=1e-12)
