"""Write the tables of docs/scale.md: python benchmarks/scale.py [--check]

Parameters, FLOPs and activations are counted on the architectures, which are built without memory.
Rates are those of the newest record of the loop on a GPU; links and storage are nominal, and named.
"""

import json
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fst_fast.bench.table import markdown

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "scale.md"
ARCHITECTURES = {
    "ResNet-50": "resnet50",
    "ViT-L/16": "vit_large_patch16_224",
    "ConvNeXt-XL": "convnext_xlarge",
}
CLASSES, SIDE = 1000, 224
IMAGES, EPOCHS, BATCH = 5000, 10, 256
GPUS = (1, 8, 64)
CHECKPOINTS = (1_000, 10_000, 100_000, 1_000_000)
# A machine has so many GPUs, which NVLink 4 joins at 450 GB/s in each direction; machines are
# joined by one port of 400 Gb/s for each GPU. A shared file system gives 20 GB/s to all together.
NODE, NVLINK, PORT, STORAGE = 8, 450e9, 50e9, 20e9
# An exchange takes so long however small it is, within a machine and between machines.
LATENCY = {1: 0.0, 8: 20e-6, 64: 40e-6}
# A step exchanges the gradient, the loss and the flags, and for each batch norm twice.
EXCHANGES = 3
# SGD reads weight, momentum and gradient and writes two of them; the gradient is packed before.
STEP_BYTES = 28


@dataclass(frozen=True)
class Costs:
    """One architecture: what is counted on it.

    Attributes:
        parameters: of the whole model.
        forward: FLOPs of an image.
        held: bytes of an image's activations that wait for the backward pass, in bfloat16.
        norms: batch norms.
    """

    parameters: int
    forward: float
    held: float
    norms: int


@dataclass(frozen=True)
class Rates:
    """This is what one GPU was measured to do.

    Attributes:
        matrix: FLOPs per second of a large bfloat16 product.
        copy: bytes per second.
        share: of ``matrix``, in forward and backward of the recorded loop.
        words: where that is from.
    """

    matrix: float
    copy: float
    share: float
    words: str


def costs_of(name):
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=CLASSES)
        images = torch.zeros(2, 3, SIDE, SIDE)
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    held = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        held[storage._cdata] = storage.nbytes() // tensor.element_size() * 2
        return tensor

    counter = FlopCounterMode(display=False)
    with counter, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(images)
    return Costs(
        sum(p.numel() for p in model.parameters()),
        counter.get_total_flops() / len(images),
        sum(size for key, size in held.items() if key not in weights) / len(images),
        sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()),
    )


def rates():
    path = max((ROOT / "benchmarks" / "results" / "cuda").glob("*-loop.json"))
    record = json.loads(path.read_text())
    case, machine = record["cases"][0], record["machine"][0]
    _, images, epochs = case["shape"]
    # The bench's batches have 128 images.
    steps = epochs * math.ceil(images / 128)
    matrix = machine["bf16_gflop_per_s"] * 1e9
    seconds = case["overhead"]["forward_backward_us"] * 1e-6 * steps
    share = case["floor"]["flops"] / seconds / matrix
    device = record["device"]["name"]
    words = (
        f"{device}, {record['date']}, {record['commit'][:7]}: {matrix / 1e12:.0f} TFLOP/s in "
        f"bfloat16 products, copy {machine['copy_gb_per_s']:.0f} GB/s; forward and backward of "
        f"ResNet-18 in the loop run at {100 * share:.0f} % of the former"
    )
    return Rates(matrix, machine["copy_gb_per_s"] * 1e9, share, words)


def exchange_seconds(size, gpus):
    """A ring over each machine's GPUs, and one over the machines for each GPU's part."""
    if gpus == 1:
        return 0.0
    inner, outer = min(gpus, NODE), math.ceil(gpus / NODE)
    within = 2 * (inner - 1) / inner * size / NVLINK
    between = 2 * (outer - 1) / outer * size / inner / PORT
    return within + between


def step_parts(costs, rate, gpus):
    """Seconds of a step: forward and backward, update, gradient, batch norm and small exchanges."""
    images = BATCH / gpus
    compute = 3 * costs.forward * images / (rate.matrix * rate.share)
    update = STEP_BYTES * costs.parameters / rate.copy
    gradient = exchange_seconds(4 * costs.parameters, gpus)
    waits = (EXCHANGES + 2 * costs.norms) * LATENCY[gpus]
    return compute, update, gradient, waits


def run_seconds(costs, rate, gpus):
    """A run: its steps, and a look at all images before and after, which the ranks share."""
    steps = EPOCHS * math.ceil(IMAGES / BATCH)
    looks = 2 * IMAGES * costs.forward / (rate.matrix * rate.share) / gpus
    return steps * sum(step_parts(costs, rate, gpus)) + looks


def seconds(value):
    if value < 1:
        return f"{1000 * value:.3g} ms"
    for limit, unit, size in ((120, "s", 1), (7200, "min", 60), (172800, "h", 3600)):
        if value < limit:
            return f"{value / size:.3g} {unit}"
    return f"{value / 86400:.3g} days"


def size(value):
    for unit, one in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if value >= one:
            return f"{value / one:.3g} {unit}"
    return f"{value / 1e3:.3g} kB"


def models(found, rate):
    """Counted for each architecture, and what a run holds on one GPU."""
    header = ["model", "parameters", "gradient", "forward of an image", "held for an image"]
    header += ["weights, momentum, gradient twice", f"with {BATCH} images"]
    rows = []
    for name, costs in found.items():
        # The gradient is there as it was computed, and packed for the exchange.
        state = 4 * 4 * costs.parameters
        rows.append([
            name,
            f"{costs.parameters / 1e6:.1f} M",
            size(4 * costs.parameters),
            f"{costs.forward / 1e9:.1f} GFLOP",
            size(costs.held),
            size(state),
            size(state + BATCH * costs.held),
        ])  # fmt: skip
    return markdown(header, rows)


def one_model(found, rate):
    """One model on several GPUs, data parallel."""
    header = ["model", "GPUs", "a step", "forward, backward", "update", "gradient", "waits"]
    header += ["a run", "x one GPU", "floor of the run"]
    rows = []
    for name, costs in found.items():
        for gpus in GPUS:
            parts = step_parts(costs, rate, gpus)
            run = run_seconds(costs, rate, gpus)
            flops = IMAGES * costs.forward * (3 * EPOCHS + 2)
            rows.append([
                name,
                gpus,
                *map(seconds, (sum(parts), *parts, run)),
                f"{run_seconds(costs, rate, 1) / run:.1f}",
                seconds(flops / rate.matrix / gpus),
            ])  # fmt: skip
    return markdown(header, rows)


def many_models(found, rate):
    """Many checkpoints, each on one GPU; and what is read of them."""
    header = ["model", "checkpoints", "to read", "reading"]
    header += [f"{gpus} GPU{'s' * (gpus > 1)}" for gpus in GPUS]
    rows = []
    for name, costs in found.items():
        for count in CHECKPOINTS:
            read = 4 * costs.parameters * count
            whole = run_seconds(costs, rate, 1) * count
            times = [max(whole / gpus, read / STORAGE) for gpus in GPUS]
            rows.append([name, f"{count:,}", size(read), *map(seconds, (read / STORAGE, *times))])
    return markdown(header, rows)


def heads(found, rate):
    """A head of many classes: a copy on each GPU, or each GPU with its share of the classes."""
    header = ["classes x features", "GPUs", "held, copied", "held, sharded", "exchanged, copied"]
    header += ["exchanged, sharded", "a step's exchange, copied", "sharded"]
    rows = []
    for classes, width in ((21_841, 1024), (100_000, 1024), (1_000_000, 1024)):
        for gpus in GPUS[1:]:
            weights = 4 * classes * width
            # Weight, original, momentum, and the gradient as computed and packed.
            held = 5 * weights
            # All images' features go to all; a row's greatest logit and sum, and its gradient,
            # come back.
            features = BATCH * width
            sharded = 2 * features + 2 * 4 * BATCH + 4 * features
            rows.append([
                f"{classes:,} x {width}",
                gpus,
                *map(size, (held, held / gpus, weights, sharded)),
                seconds(exchange_seconds(weights, gpus) + LATENCY[gpus]),
                seconds(exchange_seconds(sharded, gpus) + 4 * LATENCY[gpus]),
            ])  # fmt: skip
    return markdown(header, rows)


TABLES = {"models": models, "one model": one_model, "many models": many_models, "heads": heads}


def fill(text):
    rate = rates()
    found = {name: costs_of(built) for name, built in ARCHITECTURES.items()}
    parts = {name: table(found, rate) for name, table in TABLES.items()}
    parts["rates"] = rate.words + "."
    for name, part in parts.items():
        pattern = re.compile(rf"(<!-- scale: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text, count = pattern.subn(lambda m, part=part: f"{m[1]}{part}\n{m[2]}", text)
        assert count == 1, f"docs/scale.md has no place for {name!r}"
    return text


def main():
    before = DOCUMENT.read_text()
    after = fill(before)
    if "--check" in sys.argv and before != after:
        return "docs/scale.md is not what the script computes; run python benchmarks/scale.py"
    if before != after:
        DOCUMENT.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
