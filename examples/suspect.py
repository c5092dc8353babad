"""The examples share a small backdoored network, trained on handwritten digits."""

from fst_fast import triggers
from fst_fast.data.augment import Augment
from fst_fast.data.device_loader import DeviceLoader
from fst_fast.data.image_sets import digits
from fst_fast.lab import Attack, TrainSettings, train_suspect
from fst_fast.lab.models import resnet8

TARGET = 0
TRIGGER = triggers.BadNets(size=3)  # a white square in a corner


def make(short=False, width=8):
    """(suspect model, clean images, test images, normalize); ``short`` trains one epoch only."""
    data = digits()
    training, clean, test = data.split(200 if short else 1000, 64 if short else 400)
    normalize = training.statistics()
    model, _ = train_suspect(
        lambda: resnet8(num_classes=10, width=width),
        training,
        Attack(TRIGGER, rate=0.1, target=TARGET),
        TrainSettings(epochs=1 if short else 20, lr=0.1),
        normalize=normalize,
        augment=Augment(pad=2, flip=False),
        batch_size=64,
    )
    return model, clean, test.subset(slice(0, 64)) if short else test, normalize


def loader_of(images, normalize, shuffle=True):
    """Batches of 64, on the CPU."""
    return DeviceLoader(images.images, images.labels, 64, normalize=normalize, shuffle=shuffle)
