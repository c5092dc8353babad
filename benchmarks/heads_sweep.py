"""Does ``find_head`` name the right layer on every architecture of timm and torchvision?

    python benchmarks/heads_sweep.py                 # sweep; stop and start again at will
    python benchmarks/heads_sweep.py --verify 15     # then check numerically, for 15 minutes
    python benchmarks/heads_sweep.py --table         # print the record again

Every architecture is built with 10 classes on the meta device (on the CPU where that fails, or
where the forward needs values) and judged against a truth that find_head does not use: timm's
``get_classifier()``, a table of attribute paths for torchvision. The numerical check uses random
weights and no autograd: with the head zeroed all logits are zero, and one raised bias moves one
logit. torchvision's quantised builders are left out: their layers are not ``nn.Linear``.
"""

import argparse
import json
import select
import subprocess
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

import torch
from torch import nn

CLASSES = 10
CPU_LIMIT = 400_000_000  # parameters
STATE = Path("out/heads_sweep")
RESULTS = Path(__file__).parent / "results" / "heads"

# torchvision: the longest prefix of the builder's name decides.
TORCHVISION_HEADS = {
    "alexnet": "classifier.6",
    "convnext": "classifier.2",
    "densenet": "classifier",
    "efficientnet": "classifier.1",
    "googlenet": "fc",
    "inception": "fc",
    "maxvit": "classifier.5",
    "mnasnet": "classifier.1",
    "mobilenet_v2": "classifier.1",
    "mobilenet_v3": "classifier.3",
    "regnet": "fc",
    "resnet": "fc",
    "resnext": "fc",
    "shufflenet": "fc",
    "squeezenet": "classifier.1",
    "swin": "head",
    "vgg": "classifier.6",
    "vit": "heads.head",
    "wide_resnet": "fc",
}


def all_architectures():
    import timm
    import torchvision

    names = torchvision.models.list_models(module=torchvision.models)
    return [f"torchvision/{name}" for name in names] + [f"timm/{n}" for n in timm.list_models()]


def build(architecture, device):
    library, name = architecture.split("/")
    with torch.device(device), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if library == "timm":
            import timm

            return timm.create_model(name, num_classes=CLASSES)
        import torchvision

        extra = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        return torchvision.models.get_model(name, weights=None, num_classes=CLASSES, **extra)


def true_heads(architecture, model):
    """All layers that end in the classes, by the library's own word: one, or several."""
    library, name = architecture.split("/")
    if library == "torchvision":
        prefix = max((p for p in TORCHVISION_HEADS if name.startswith(p)), key=len)
        return [model.get_submodule(TORCHVISION_HEADS[prefix])]
    if not hasattr(model, "get_classifier"):
        return []  # an encoder: only a refusal is right
    heads = model.get_classifier()
    heads = heads if isinstance(heads, (tuple, list)) else [heads]
    inside = [module for head in heads for module in head.modules()]
    layers = [m for m in inside if isinstance(m, (nn.Linear, nn.Conv2d))]
    return [m for m in layers if m.weight.shape[0] == CLASSES]


def find(architecture):
    """find_head on meta; with real weights where the forward turns out to need values."""
    from fst_fast.heads.find import find_head

    for device in ("meta", "cpu"):
        try:
            model = build(architecture, device)
        except Exception:
            if device == "cpu":
                raise
            continue
        start = time.perf_counter()
        try:
            return model, find_head(model), "", device, time.perf_counter() - start
        except ValueError as error:
            seconds, reason = time.perf_counter() - start, str(error)
        size = sum(p.numel() for p in model.parameters())
        if "could not run" not in reason or device == "cpu" or size > CPU_LIMIT:
            return model, None, reason, device, seconds
    raise AssertionError("unreachable")


def judge(architecture):
    model, head, reason, device, seconds = find(architecture)
    truth = true_heads(architecture, model)
    names = {id(module): name for name, module in model.named_modules()}
    if head is None:
        verdict = "refused"
    else:
        verdict = "right" if len(truth) == 1 and truth[0] is head else "wrong"
    return {
        "architecture": architecture,
        "verdict": verdict,
        "head": names.get(id(head), ""),
        "truth": [names[id(module)] for module in truth],
        "reason": reason,
        "built_on": device,
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": round(seconds, 3),
    }


@torch.no_grad()
def verify(architecture):
    """Zeroed head -> zero logits; bias (or weight row) of class k raised -> only logit k moves."""
    from fst_fast.heads.find import find_head

    torch.manual_seed(0)
    model = build(architecture, "cpu").eval()
    head = find_head(model)
    size = getattr(model, "default_cfg", {"input_size": (3, 224, 224)})["input_size"]
    images, k = torch.randn(2, *size), 7
    # A raised row of a plain head; every SqueezeNet logit passes a ReLU, so start above zero.
    if head.bias is not None:
        head.bias.fill_(1.0)
    before = model(images)
    # At random weights a few networks give logits of 1e15: a step of 1 would be rounded away.
    (head.weight if head.bias is None else head.bias)[k] += 1 + before.abs().max()
    moved = (model(images) - before).abs().amax(0).flatten()
    head.weight.zero_()
    if head.bias is not None:
        head.bias.zero_()
    silent = bool((model(images) == 0).all())
    others = moved[torch.arange(CLASSES) != k].max().item()
    only_k = moved[k].item() > 1e-3 and others <= 1e-4 * moved[k].item()
    return {"architecture": architecture, "only_k_moves": only_k, "zero_head_silent": silent}


def work(task):
    """Worker: one architecture per input line, one JSON line out."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    channel, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        architecture = line.strip()
        try:
            record = {"judge": judge, "verify": verify}[task](architecture)
        except Exception as error:
            words = f"{type(error).__name__}: {error}"[:300]
            record = {"architecture": architecture, "verdict": "error", "reason": words}
        print(json.dumps(record), file=channel, flush=True)


class Worker:
    """A process that is replaced when it crashes or overruns its limit."""

    def __init__(self, task, limit):
        self.task, self.limit, self.process = task, limit, None

    def __call__(self, architecture):
        if self.process is None:
            command = [sys.executable, __file__, "--work", self.task]
            pipe = subprocess.PIPE
            self.process = subprocess.Popen(
                command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True
            )
        self.process.stdin.write(architecture + "\n")
        self.process.stdin.flush()
        ready, _, _ = select.select([self.process.stdout], [], [], self.limit)
        line = self.process.stdout.readline() if ready else ""
        if line:
            return json.loads(line)
        self.process.kill()
        self.process.wait()
        self.process = None
        reason = "the worker died" if ready else f"more than {self.limit} s"
        return {"architecture": architecture, "verdict": "error", "reason": reason}


def load(task):
    path = STATE / f"{task}.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return {record["architecture"]: record for record in map(json.loads, lines)}


def run(task, architectures, limit, minutes=float("inf")):
    """Do what is not done yet, writing each record as it comes."""
    STATE.mkdir(parents=True, exist_ok=True)
    done, worker, end = load(task), Worker(task, limit), time.monotonic() + 60 * minutes
    with (STATE / f"{task}.jsonl").open("a") as log:
        for architecture in architectures:
            if time.monotonic() > end:
                break
            if architecture not in done:
                done[architecture] = worker(architecture)
                log.write(json.dumps(done[architecture]) + "\n")
                log.flush()
    return done


def reason_class(record):
    reason = record["reason"].removeprefix("find_head: ").split("; candidates")[0]
    for words in ("layers share in the output", "could not run", "parameters act on the output"):
        if words in reason:
            return words
    return reason


def table(records):
    lines = [f"{'library':12} {'all':>5} {'right':>6} {'refused':>8} {'wrong':>6} {'error':>6}"]
    for library in ("timm", "torchvision", ""):
        counts = Counter(
            r["verdict"] for r in records if r["architecture"].startswith(library or "t")
        )
        cells = [counts[v] for v in ("right", "refused", "wrong", "error")]
        name = library or "together"
        lines.append("{:12} {:5} {:6} {:8} {:6} {:6}".format(name, sum(cells), *cells))
    return "\n".join(lines)


def report(date):
    import timm
    import torchvision

    records, checks = list(load("judge").values()), list(load("verify").values())
    refused = [r for r in records if r["verdict"] != "right"]
    classes = Counter(reason_class(r) for r in refused)
    passed = [r for r in checks if r.get("only_k_moves") and r.get("zero_head_silent")]
    failed = [r for r in checks if r not in passed]
    print(table(records), *(f"{n:5}  {c}" for c, n in classes.most_common()), sep="\n")
    print(f"verified numerically: {len(passed)} of {len(checks)}")
    versions = {m.__name__: m.__version__ for m in (torch, timm, torchvision)}
    document = {
        "date": date,
        "versions": versions,
        "classes": CLASSES,
        "verdicts": Counter(f"{r['architecture'].split('/')[0]} {r['verdict']}" for r in records),
        "refusal_classes": classes,
        "seconds_total": round(sum(r.get("seconds", 0) for r in records), 1),
        "seconds_median": sorted(r.get("seconds", 0) for r in records)[len(records) // 2],
        "verified_numerically": sorted(r["architecture"] for r in passed),
        "verification_failed": failed,
        "refused": sorted(refused, key=lambda r: r["architecture"]),
        "right": {r["architecture"]: r["head"] for r in records if r["verdict"] == "right"},
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    plain = [versions[name].split("+")[0] for name in ("timm", "torchvision")]
    path = RESULTS / "{}-timm{}-torchvision{}.json".format(date, *plain)
    path.write_text(json.dumps(document, indent=1) + "\n")
    print(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", choices=["judge", "verify"], help=argparse.SUPPRESS)
    parser.add_argument("--verify", type=float, metavar="MINUTES", help="numerical check")
    parser.add_argument("--table", action="store_true", help="only print and write the record")
    parser.add_argument("--only", default="", help="architectures whose name contains this")
    parser.add_argument("--limit", type=float, default=120, help="seconds per architecture")
    parser.add_argument("--date", default=time.strftime("%Y-%m-%d"))
    options = parser.parse_args()
    if options.work:
        return work(options.work)
    if options.verify:
        right = [r for r in load("judge").values() if r["verdict"] == "right"]
        # torchvision up to 100 M parameters, then the rest, smallest first.
        right.sort(key=lambda r: r["parameters"])
        right.sort(key=lambda r: "timm/" in r["architecture"] or r["parameters"] > 100_000_000)
        run("verify", [r["architecture"] for r in right], options.limit, options.verify)
    elif not options.table:
        names = [name for name in all_architectures() if options.only in name]
        run("judge", names, options.limit)
    report(options.date)
    return None


if __name__ == "__main__":
    main()
