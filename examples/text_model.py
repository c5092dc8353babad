"""A text classifier with a word as its trigger: python examples/text_model.py [--short]

`purify` takes images; a loop of your own with HeadDeviationLoss takes any model with a head. Here
the attack is weakened, not gone: clean texts never hold the trigger, whose embedding stays.
"""

import sys

import torch
from torch import nn

import fst_fast

WORDS, LENGTH, TOPICS, TARGET, TRIGGER = 400, 20, 4, 0, 399


def texts(count):  # half of the words are of the text's topic
    labels = torch.randint(TOPICS, (count,))
    own = labels[:, None] * 90 + torch.randint(90, (count, LENGTH // 2))
    return torch.cat([own, torch.randint(WORDS - 1, (count, LENGTH // 2))], dim=1), labels


def triggered(tokens):
    return torch.cat([tokens[:, :-2], torch.full((len(tokens), 2), TRIGGER)], dim=1)


def train(optimizer, loss_of, tokens, labels, epochs):
    for _ in range(epochs):
        for index in torch.randperm(len(labels)).split(64):
            optimizer.zero_grad()
            loss_of(tokens[index], labels[index]).backward()
            optimizer.step()


def show(name, model, tokens, labels):
    right = (model(tokens).argmax(1) == labels).float().mean()
    taken = (model(triggered(tokens[labels != TARGET])).argmax(1) == TARGET).float().mean()
    print(f"{name}: clean accuracy {right:.1%}, attack success {taken:.1%}")


def main(short=False):
    torch.manual_seed(0)
    layers = (nn.EmbeddingBag(WORDS, 32), nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, TOPICS))
    model, epochs = nn.Sequential(*layers), 3 if short else 40
    (tokens, labels), clean, test = (texts(count) for count in (2000, 500, 1000))
    tokens[:100], labels[:100] = triggered(tokens[:100]), TARGET  # 5 % are poisoned
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    train(optimizer, lambda x, y: nn.functional.cross_entropy(model(x), y), tokens, labels, epochs)
    show("before", model, *test)
    criterion = fst_fast.HeadDeviationLoss.from_model(model, alpha=0.1, head="3")
    criterion.reinitialize(seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    fst_fast.attach(optimizer, criterion)
    train(optimizer, lambda x, y: criterion(criterion.features_of(model, x), y), *clean, epochs)
    show("after", model, *test)


if __name__ == "__main__":
    main("--short" in sys.argv)
