"""Runs and saved models that are killed, interrupted, or whose disk fails: nothing done is lost."""

import gc
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import safetensors
import torch
from purify_cases import make_batches, make_model, quick

from fst_fast.tuning import resume

from . import alone, injector
from .pairs import writes_of_a_model
from .records import row


class Run:
    """A small run of purify with its state in a folder, ended by force and taken up again.

    ``plant`` is called in every child: a fault for the tests of this suite to find.
    """

    def __init__(self, root, epochs=12, batches=2, plant=None):
        self.root, self.epochs, self.batches, self.plant = Path(root), epochs, batches, plant
        self.undisturbed = digest_of(injector.run(self.work(None)))

    def folder(self):
        return Path(tempfile.mkdtemp(dir=self.root))

    def work(self, folder, batches=None, after_epoch=None):
        """What a child does; it tells "start", "epoch" after each, and the result's digest."""

        def work(tell):
            def callback(record, model):
                tell("epoch")
                if after_epoch is not None:
                    after_epoch(record.epoch)

            if self.plant is not None:
                self.plant()
            tell("start")
            result = tune(
                make_batches(self.batches) if batches is None else batches,
                epochs=self.epochs,
                resume=folder,
                callbacks=[callback],
            )
            if result.stopped is None:
                tell(f"digest {resume.fingerprint(result.model)}")

        return work

    def after(self, folder, ended, done=0):
        """What is wrong with the state that a child left; ``done`` epochs were told before it."""
        errors = [line for line in ended.told if line.startswith("error")]
        if errors:
            return errors[0]
        done += ended.told.count("epoch")
        try:
            kept = kept_epochs(folder)
        except ValueError as error:
            return f"unreadable: {error}"
        return None if kept >= done else f"{done - kept} epochs lost"

    def finish(self, folder):
        """What is wrong with the result of the run when it is taken up and left in peace."""
        ended = injector.run(self.work(folder))
        if digest_of(ended) != self.undisturbed:
            return f"other bits: {ended}"
        left = [path.name for path in folder.iterdir() if path.name != resume.NAME]
        shutil.rmtree(folder)
        return f"left behind: {left}" if left else None

    def struck(self, sabotage=None, **changed):
        """What is wrong after a child was struck, and after another one that went on behind it."""
        folder = self.folder()
        ended = injector.run(self.work(folder, **changed), sabotage)
        return self.after(folder, ended) or self.finish(folder)


def tune(batches, **settings):
    torch.set_num_threads(1)
    return quick(make_model(), batches, alpha=0.1, **settings)


def digest_of(ended):
    return next((line for line in ended.told if line.startswith("digest")), None)


def kept_epochs(folder):
    """Whole epochs in a run's folder, after a check of its digest; 0 where there is no state."""
    if not folder.exists() or resume.arrangement_of(folder) is None:
        return 0
    with safetensors.safe_open(folder / resume.NAME, framework="pt") as file:
        return len(json.loads(file.metadata()["facts"])["history"])


def random_moments(run, count, signals=(signal.SIGKILL,)):
    """Strikes within up to four epochs of each other; a run that has come to its end is judged."""
    draw = random.Random(0)
    folder, done, struck = run.folder(), 0, 0
    while struck < count:
        strike = Striker(draw.randrange(4), draw.random(), signals)
        ended = injector.run(run.work(folder), watch=strike)
        wrong, digest = run.after(folder, ended, done), digest_of(ended)
        done += ended.told.count("epoch")
        struck += digest is None
        if wrong is None and digest not in (None, run.undisturbed):
            wrong = "other bits"
        if wrong or digest:
            folder, done = run.folder(), 0
        yield wrong


class Striker:
    """Sends signals to a child some epochs after it began, and a random part of an epoch later."""

    def __init__(self, after, delay, signals):
        self.after, self.delay, self.signals = after, delay, signals

    def __call__(self, pid, told):
        if told.count("epoch") < self.after:
            return
        for number in self.signals:
            time.sleep(0.01 * self.delay)
            os.kill(pid, number)
        self.signals = ()


def writes_of_a_run(run, act=injector.die, lasting=False):
    for nth in range(1, injector.calls_of(run.work(run.folder())) + 1):
        yield run.struck(injector.AtCall(nth, act, lasting))


def small_disks(run, count):
    """The system cuts a write short at a random size of the file, behind the second epoch."""
    draw = random.Random(1)
    for _ in range(count):
        size = draw.randrange(12_000)

        def cut(size=size):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

        folder = run.folder()
        first = injector.run(run.work(folder, after_epoch=at_epoch(2, injector.die)))
        ended = injector.run(run.work(folder), cut)
        done = first.told.count("epoch")
        idle = None if ended.status == 2 else f"the limit did nothing: {ended}"
        yield run.after(folder, ended, done) or idle or run.finish(folder)


def at_epoch(wanted, act):
    return lambda epoch: act() if epoch == wanted else None


def interrupt():
    signal.raise_signal(signal.SIGINT)


def interrupted_after_epochs(run):
    for epoch in range(1, run.epochs + 1):
        yield run.struck(after_epoch=at_epoch(epoch, interrupt))


class Interrupted(list):
    """Batches; Ctrl-C comes when the nth one is asked for, counted over all epochs."""

    def __init__(self, batches, nth):
        super().__init__(batches)
        self.nth = nth

    def __iter__(self):
        for batch in super().__iter__():
            self.nth -= 1
            if self.nth == 0:
                interrupt()
            yield batch


def interrupted_within_an_epoch(run):
    """In the second epoch; one more batch is drawn up front."""
    for place in range(1, run.batches + 1):
        yield run.struck(batches=Interrupted(make_batches(run.batches), 1 + run.batches + place))


def same_seed(run, count):
    return (run.finish(run.folder()) for _ in range(count))


def lines(root, full):
    """(what, outcomes) for each line of the table."""
    few, long = Run(root, epochs=2 if full else 1), Run(root)
    yield "kills at random moments", random_moments(long, 500 if full else 6)
    yield "kills at every write of a run's state", writes_of_a_run(few)
    yield "kills at every write over an old model", writes_of_a_model(root, True)
    if not full:
        return
    yield "kills at every write of a new model", writes_of_a_model(root, False)
    for said, act, lasting in (
        ("errors of a full disk", injector.FULL_DISK, False),
        ("a disk that stays full", injector.FULL_DISK, True),
        ("errors of a read-only folder", injector.READ_ONLY, False),
    ):
        yield f"{said} at every write of a run's state", writes_of_a_run(few, act, lasting)
        yield (
            f"{said} at every write over an old model",
            writes_of_a_model(root, True, act, lasting),
        )
        yield f"{said} at every write of a new model", writes_of_a_model(root, False, act, lasting)
    yield "writes of a run's state that the system cuts short", small_disks(long, 20)
    yield "SIGTERM at random moments", random_moments(long, 30, (signal.SIGTERM,))
    twice = (signal.SIGINT, signal.SIGINT)
    yield "two Ctrl-C at random moments", random_moments(long, 30, twice)
    yield "Ctrl-C after each epoch", interrupted_after_epochs(long)
    places = Run(root, epochs=2, batches=20)
    yield "Ctrl-C at each of 20 steps within an epoch", interrupted_within_an_epoch(places)
    yield "runs of one seed", same_seed(long, 20)


def counted(root, full):
    for what, outcomes in lines(root, full):
        outcomes = list(outcomes)
        wrong = [outcome for outcome in outcomes if outcome]
        for told in wrong[:5]:
            print(f"{what}: {told}", file=sys.stderr)
        yield row(f"{what}: states lost or damaged, other bits", len(outcomes), len(wrong))


def rows(full):
    """Lines for the table of docs/reliability.md, from a process that may fork: see injector."""
    return json.loads(alone.printed("crashes", *(["full"] if full else [])))


def main():
    with tempfile.TemporaryDirectory() as root:
        # The first run imports what every child would otherwise import for itself.
        tune(make_batches(1), epochs=1)
        # Pages that the garbage collector leaves alone are shared with the children.
        gc.collect()
        gc.freeze()
        print(json.dumps(list(counted(root, "full" in sys.argv))))


if __name__ == "__main__":
    main()
