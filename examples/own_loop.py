"""Feature Shift Tuning in a training loop of your own, with a scheduler and a validation set.

python examples/own_loop.py [--short]
"""

import sys

import suspect
import torch

import fst_fast


def main(short=False):
    model, clean, test, normalize = suspect.make(short)
    loader = suspect.loader_of(clean, normalize)
    measured = suspect.loader_of(test, normalize, shuffle=False)
    print("before:", fst_fast.evaluate(model, measured, suspect.TRIGGER, suspect.TARGET))

    epochs = 1 if short else 30
    # Before anything changes the head: the criterion keeps its weight W0 and the norm of it.
    criterion = fst_fast.HeadDeviationLoss.from_model(model, alpha=0.07)
    criterion.reinitialize(seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    fst_fast.attach(optimizer, criterion)  # after every step: W <- W * ||W0|| / ||W||
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)

    for epoch in range(epochs):
        model.train()
        for images, labels in loader:
            optimizer.zero_grad()
            criterion(criterion.features_of(model, images), labels).backward()
            optimizer.step()
        schedule.step()
        if epoch % 10 == 9 or short:
            parts = criterion.last
            print(f"epoch {epoch + 1}: cross-entropy {parts.cross_entropy:.3f}")

    model.eval()
    print("after:", fst_fast.evaluate(model, measured, suspect.TRIGGER, suspect.TARGET))


if __name__ == "__main__":
    main("--short" in sys.argv)
