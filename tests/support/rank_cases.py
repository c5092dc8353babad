"""Runs of purify that one process and several ranks are to do alike."""

import os
import signal

import torch
from purify_cases import CLASSES, make_batches, quick
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import fst_fast
from fst_fast import methods

# Some methods search or unlearn first: in few steps here.
SETTINGS = {
    "rnp": {"images": 8, "passes": 2},
    "i_bau": {"search_steps": 2, "iterations": 2},
    "sau": {"steps": 1},
    "bti_dbf": {"rounds": 2, "mask_steps": 3, "invert_steps": 3},
    "trigger_unlearning": {"forms": ("mask",), "images_per_trigger": 1},
}


class Net(nn.Module):
    """Batch norm, a residual and a head: smooth, so that no rounding is blown up at a kink."""

    def __init__(self, dropout=0.0, norm=nn.BatchNorm2d):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.bn1 = norm(6)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.classify = nn.Linear(6, CLASSES)

    def forward(self, x):
        x = F.silu(self.bn1(self.conv1(x)))
        x = F.silu(x + self.conv2(x))
        return self.classify(self.dropout(x.mean((2, 3))))


class NormAndSilu(nn.BatchNorm2d):
    """A batch norm with a forward of its own, as timm's are."""

    def forward(self, x):
        averages = self.training
        return F.silu(
            F.batch_norm(
                *(x, self.running_mean, self.running_var, self.weight, self.bias),
                training=averages,
                momentum=0.2,
                eps=self.eps,
            )
        )


class Alone(methods.Method):
    """A method that cannot run data parallel."""

    name = "alone"
    data_parallel = False


def model(seed=1, **more):
    torch.manual_seed(seed)
    return Net(**more).eval()


def loader(images=14, batch_size=6, seed=2, **more):
    generator = torch.Generator().manual_seed(seed)
    stored = torch.randint(0, 256, (images, 8, 8, 3), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, CLASSES, (images,), generator=generator)
    more = {"augment": "cifar", "normalize": "cifar10", **more}
    return fst_fast.DeviceLoader(stored, labels, batch_size, **more)


def dataset(images=14, batch_size=6, order=0, seed=2):
    """A DataLoader that shuffles by a generator of its own."""
    (stored, labels), *_ = make_batches(1, images, seed=seed)
    generator = torch.Generator().manual_seed(order)
    return DataLoader(TensorDataset(stored, labels), batch_size, shuffle=True, generator=generator)


def rank():
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def outcome(result):
    """What two runs must agree in."""
    return {
        "state": {name: value.clone() for name, value in result.model.state_dict().items()},
        "losses": [record.loss for record in result.history],
        "accuracies": [record.clean_accuracy for record in result.history],
        "findings": [dict(found) for found in result.findings],
        "settings": dict(result.settings),
        "stopped": result.stopped,
        "before": result.before,
    }


def tuned(name="ft", suspect=None, batches=None, lr=0.01, more=None, **options):
    """The outcome of purify(), here or on every rank."""
    options = {**options, **(more or {}), "lr": lr}
    settings = {**SETTINGS.get(name, {}), **options.pop("settings", {})}
    batches = loader() if batches is None else batches
    chosen = options.pop("method", None) or methods.get(name, **settings)
    return outcome(quick(suspect or model(), batches, method=chosen, **options))


def forty_steps(name):
    """Three epochs of 14 steps, or one that the method makes four of."""
    epochs = 3 if methods.METHODS[name].epochs_factor == 1 else 1
    return tuned(name, None, loader(54, 4), epochs=epochs)


def on_batches(options, sizes, more):
    """Batches of these sizes, as a list."""
    listed = [make_batches(1, size, seed=place)[0] for place, size in enumerate(sizes)]
    return tuned("ft", model(**more), listed, **options)


def on_dataset(options, orders=(0, 0)):
    return tuned("ft", None, dataset(order=orders[rank()]), **options)


def on_iterators(counts):
    """A function that makes iterators: nobody tells how many batches come."""
    batches = make_batches(4, 4)
    return tuned("ft", None, lambda: iter(batches[: counts[rank()]]))


def wrapped():
    """A model in DistributedDataParallel, tuned in place, and then used as it is."""
    net = DistributedDataParallel(model())
    result = quick(net, loader(), method="fst", inplace=True)
    assert result.model is net
    kinds = {type(m).__name__ for m in net.modules()}
    out = outcome(result)
    out["state"] = {n.removeprefix("module."): value for n, value in out["state"].items()}
    net.train()(torch.zeros(2, 3, 8, 8)).sum().backward()
    return out, kinds


def until(epoch, folder, epochs=5):
    """Stop after an epoch, and go on there when called again."""
    folder = folder if rank() == 0 else f"{folder}-nobody-writes-here"
    return tuned(
        "ft",
        None,
        epochs=epochs,
        resume=folder,
        callbacks=[lambda record, _: record.epoch == epoch],
    )


def differing(given):
    """Each rank's own arguments: pairs for ranks 0 and 1."""
    own = {name: values[rank()] for name, values in given.items()}
    suspect = model(own.pop("weights", 1))
    batches = loader(own.pop("images", 14), seed=own.pop("pixels", 2))
    calls = own.pop("callbacks", 0)
    return tuned("ft", suspect, batches, callbacks=[lambda *_: None] * calls, **own)


class Asking:
    """Batches that on one rank do something as the given one is made."""

    def __init__(self, at, what):
        self.batches, self.at, self.what, self.made = make_batches(3, 4), at, what, 0

    def __call__(self):
        for batch in self.batches:
            self.made += 1
            if rank() == 1 and self.made == self.at:
                self.what()
            yield batch


def _stop():
    os.kill(os.getpid(), signal.SIGINT)


def _fail():
    raise OSError("the disk is gone")


def interrupted(folder, at):
    """Rank 1 alone hears Ctrl-C."""
    folder = folder if rank() == 0 else f"{folder}-nobody-writes-here"
    suspect = Asking(at, _stop)
    return tuned("ft", None, suspect, resume=folder, epochs=4)


def one_stops():
    """A callback of rank 1 alone asks to stop."""
    return tuned("ft", None, callbacks=[lambda record, _: rank() == 1], epochs=3)


def one_fails(at):
    return tuned("ft", None, Asking(at, _fail), epochs=3)


def one_changes():
    """A callback of rank 1 changes the model, which then is another one there."""

    def change(record, net):
        if rank() == 1:
            with torch.no_grad():
                net.classify.bias[0] += 1e-6

    return tuned("ft", None, callbacks=[change], epochs=3)


def counted(epochs):
    """Kinds and bytes of a run's exchanges, in order, and the bytes of one gradient."""
    sent = []
    whole, each = torch.distributed.all_reduce, torch.distributed.all_gather

    def all_reduce(tensor, *more, **named):
        sent.append(("sum", tensor.numel() * tensor.element_size()))
        return whole(tensor, *more, **named)

    def all_gather(found, tensor, *more, **named):
        sent.append(("gather", tensor.numel() * tensor.element_size()))
        return each(found, tensor, *more, **named)

    net = model()
    torch.distributed.all_reduce, torch.distributed.all_gather = all_reduce, all_gather
    try:
        quick(net, loader(images=12), method="ft", epochs=epochs)
    finally:
        torch.distributed.all_reduce, torch.distributed.all_gather = whole, each
    return sent, sum(p.numel() * 4 for p in net.parameters())


def draws():
    """A model with dropout: its tensors after a run, and the answers of rows of one batch."""
    net = model(dropout=0.5)
    return tuned("ft", net, epochs=2)


def masks():
    """What each rank's rows of equal images become in a net with dropout."""
    from fst_fast.tuning.distributed import joined
    from fst_fast.tuning.distributed_model import SharedModel

    with joined("test") as ranks:
        shared = SharedModel(ranks, "global", torch.device("cpu"))
        net = nn.Dropout(0.5)
        rows = [shared(net, net, torch.ones(4, 64)) for _ in range(2)]
    return torch.cat(rows), torch.get_rng_state()


def kept_in(folder, epochs):
    """Tune for many epochs, whose state is kept in a folder or nowhere."""
    folder = folder if rank() == 0 or folder is None else f"{folder}-nobody-writes-here"
    return tuned("ft", None, epochs=epochs, resume=folder)


def furthest(one, other):
    """The largest difference of two outcomes' weights and losses, relative to 1 or the value."""
    gaps = [
        ((a - b).abs() / b.abs().clamp(min=1)).max().item()
        for a, b in zip(one["state"].values(), other["state"].values(), strict=True)
        if a.is_floating_point()
    ]
    gaps += [
        abs(a - b) / max(1, abs(b)) for a, b in zip(one["losses"], other["losses"], strict=True)
    ]
    return max(gaps)
