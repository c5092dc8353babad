"""The tuning loop: epochs, learning rates, records, and the ends that a run may come to."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence

import torch
from torch import nn

from ..data.batches import Batches, autocast, check_batch
from ..data.prefetch import HostLoader
from ..heads.contexts import Interrupts
from ..heads.tap import FeatureTap
from ..methods import Method
from .averaging import WeightAverage, fresh_statistics
from .batch_source import Feed, cache_features, open_feed
from .cuda_graphs import Recording, Replays
from .epoch_log import Ledger
from .memory import is_out_of_memory
from .progress import EpochRecord, ProgressReport
from .step import LoopSettings, Step

Callback = Callable[[EpochRecord, nn.Module], bool | None]


def _nothing() -> None:
    pass


class Tuner:
    """One run of one method on one model.

    The model is changed in place. After :meth:`run`, ``history`` holds what was done and
    ``stopped`` says why it ended early, or is None.

    Args:
        recording: whether and how steps are recorded, to be replayed.
    Attributes:
        longest_graph: steps in the graph that holds most; 0 without graphs.
    """

    def __init__(
        self,
        model: nn.Module,
        head: nn.Module,
        method: Method,
        settings: LoopSettings,
        tap: FeatureTap | None,
        recording: Recording,
    ) -> None:
        self.model, self.method, self.settings = model, method, settings
        self.step = Step(model, head, method, settings, tap)
        self.head, self.guard = self.step.head, self.step.guard
        self.backbone, self.optimizer = self.step.backbone, self.step.optimizer
        share = method.course.average
        self.average = WeightAverage(model, share, settings.epochs) if share else None
        self.history: list[EpochRecord] = []
        self.stopped: str | None = None
        # Steps and images of the epoch that are done, where a run was interrupted within it; and
        # what is called before each epoch, and where those steps end when the run goes on.
        self.within = (0, 0)
        self.at_start: Callable[[], None] = _nothing
        self.where_left_off: Callable[[], None] = _nothing
        self._recording, self.longest_graph = recording, 0
        # Epochs until another part of the model is trained, or the run ends.
        self._alike = settings.epochs
        # [epoch, steps in it, steps before those], of this call of run().
        self._steps: list[list[int]] = []

    def run(
        self,
        batches: Batches,
        report: ProgressReport,
        validate: Callable[[nn.Module], float] | None = None,
        callbacks: Sequence[Callback] = (),
        keep: Callable[[Tuner], None] | None = None,
    ) -> None:
        """Tune for all epochs, or until a callback, Ctrl-C or a loss that is not finite.

        Goes on behind the history, where there is one, and ``within`` the epoch. ``keep`` is called
        after every epoch, before the callbacks, and where the run is interrupted. Unless somebody
        looks in between (``validate``, ``callbacks``, ``keep``), the host queues one epoch after
        the other without waiting for the device.
        """
        looks = validate is not None or bool(callbacks) or keep is not None
        feed = self._open(batches)
        replays = self._replays(batches, feed, report)
        ledger = Ledger(self.settings.device, self.history[-1].seconds if self.history else 0.0)
        with Interrupts(terminate=keep is not None) as interrupts:
            for epoch in range(len(self.history), self.settings.epochs):
                last = epoch + 1 == self.settings.epochs
                lr = self._begin(epoch)
                images = self._epoch(feed, replays, epoch, interrupts)
                if images is None or ((last or looks) and self._has_failed()):
                    self._take(ledger.ready(wait=True), report)
                    if keep is not None and self.within != (0, 0):
                        keep(self)
                    return
                self.within = (0, 0)
                self._after(epoch, batches)
                accuracy = None if validate is None else validate(self.model)
                values = torch.cat([self.step.totals, self.head.shift().double()])
                values = torch.cat([values, self.guard.good_steps.double()[None]])
                steps = sum(count for _, count, _ in self._steps)
                ledger.put(epoch, lr, images, steps, values, accuracy)
                records = ledger.ready(wait=last or looks)
                self._take(records, report)
                if keep is not None:
                    keep(self)
                answers = [callback(records[-1], self.model) for callback in callbacks]
                if last or self._is_to_stop(epoch, interrupts.requested, any(answers)):
                    return

    def _take(self, records: list[EpochRecord], report: ProgressReport) -> None:
        for record in records:
            self.history.append(record)
            report.epoch(record)

    def _is_to_stop(self, epoch: int, interrupted: bool, asked: bool) -> bool:
        if interrupted:
            self.stopped = f"interrupted after epoch {epoch + 1}"
        elif asked:
            self.stopped = f"a callback asked to stop after epoch {epoch + 1}"
        return self.stopped is not None

    def _open(self, batches: Batches) -> Feed:
        """Where batches come from; the head alone is trained on features computed once."""
        step, device = self.step, self.settings.device
        classes = len(self.head.weight0)
        keeps = self._recording.capture is not None
        feed = open_feed(batches, step.place, device, classes, keeps)
        if self.method.trains == "head" and step.tap is not None:
            self.model.eval()
            with torch.no_grad():
                return cache_features(batches, step.features, feed)
        return feed

    def _replays(self, batches: Batches, feed: Feed, report: ProgressReport) -> Replays:
        def refused(reason: str, steps: int) -> None:
            if steps > 1:
                report.note(f"purify: replays one step at a time: {reason}")
                return
            if self._recording.required:
                raise RuntimeError(
                    f"purify: graphs=True needs a step that can be recorded, but {reason}; leave "
                    "graphs out to run without"
                )
            report.note(f"purify: runs without CUDA graphs: {reason}")

        return Replays(
            self.model,
            self._recording,
            lambda: [*self.step.state(), *feed.state()],
            self.settings.device,
            refused,
            # A thread of its own goes on drawing crops and orders.
            watches_draws=not isinstance(batches.loader, HostLoader),
        )

    def _begin(self, epoch: int) -> float:
        """Set the learning rates of an epoch and what is trained in it; returns the former."""
        course, epochs, step = self.method.course, self.settings.epochs, self.step
        lr = self.settings.lr * (1 + math.cos(math.pi * epoch / epochs)) / 2
        step.lr.fill_(lr)
        step.head_lr.fill_(lr * course.head_lr)
        if self.within == (0, 0):
            step.totals.zero_()
        head_epochs = round(course.head_epochs * epochs)
        head_only = epoch < head_epochs
        self._alike = (head_epochs if head_only else epochs) - epoch
        if head_only != step.head_only:
            step.head_only = head_only
            for parameter in self.backbone:
                parameter.requires_grad_(not head_only)
        # Whoever looked at the model may have changed it.
        self.guard.keep()
        self.model.train(bool(self.backbone) and not head_only)
        return lr

    def _epoch(
        self, feed: Feed, replays: Replays, epoch: int, interrupts: Interrupts
    ) -> int | None:
        """Queue an epoch's steps; how many images were in it, or None where it was stopped."""
        failed = False
        steps, count = self.within
        self._steps.append([epoch, 0, steps])
        self.at_start()
        try:
            for done, images in self._work(feed, replays, epoch):
                self._steps[-1][1] += done
                steps += done
                count += images
                failed = self.guard.after_step(done)
                if failed or interrupts.requested:
                    break
        except RuntimeError:
            # Workers of a DataLoader end on the same Ctrl-C, which the loader reports as an error.
            if not interrupts.requested:
                raise
        finally:
            self.head.materialize()
            self.longest_graph = replays.longest
        if (failed or interrupts.requested) and self._has_failed():
            return None
        if interrupts.requested:
            self.within = (steps, count)
            self.stopped = f"interrupted at epoch {epoch + 1}, step {steps}"
            return None
        if count == 0:
            raise ValueError(
                "purify: loader must yield batches in every epoch, got none in epoch "
                f"{epoch + 1}; return a fresh iterator each time"
            )
        return count

    def _work(self, feed: Feed, replays: Replays, epoch: int) -> Iterator[tuple[int, int]]:
        """Queue the steps of an epoch that are not done yet.

        Yields, each time that the host may look up, the steps and images since the last time.
        """
        before = self.within[0]
        for kind, size, staged in feed.epoch(epoch):
            skipped = min(before, staged)
            for _ in range(skipped):
                feed.advance(kind)
            before -= skipped
            if skipped and not before:
                self.where_left_off()
            left = staged - skipped
            while left:
                # How many go together is settled by a whole epoch.
                done = self._do(feed, replays, kind, left if self.within == (0, 0) else 1)
                left -= done
                yield done, done * size

    def _do(self, feed: Feed, replays: Replays, kind: Hashable, staged: int) -> int:
        """One step, or, where they are one graph, some of those staged; returns how many.

        In parts, where a whole batch takes too much memory.
        """
        step = self.step
        while True:
            try:
                key = (kind, step.head_only, step.parts)
                left = staged * self._alike
                return replays.run(key, lambda: step(feed, kind), staged, left)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                step.make_room(feed, kind, error)

    def _after(self, epoch: int, batches: Batches) -> None:
        """Count the weights where they are averaged; at the end, put the average in."""
        average = self.average
        if average is None or epoch < average.first:
            return
        average.add()
        if epoch + 1 < self.settings.epochs:
            return
        average.put_in()
        if self.method.project:
            with torch.no_grad():
                self.head.weight.mul_(self.head.norm0 / self.head.weight.norm())
        with torch.no_grad(), fresh_statistics(self.model) as weigh:
            if weigh is not None:
                self._measure(batches, epoch, weigh)

    def _measure(self, batches: Batches, epoch: int, weigh: Callable[[int], None]) -> None:
        settings = self.settings
        for count, batch in enumerate(batches.epoch(epoch), start=1):
            images, _ = check_batch(batch, batches.where, settings.device, values=False)
            weigh(count)
            with autocast(settings.device, settings.precision):
                self.model(self.step.place(images))

    def _has_failed(self) -> bool:
        """Wait for the device; whether a step went wrong, which is then told."""
        fault = self.guard.finish()
        if fault is None:
            return False
        # What is kept is an epoch's end.
        self.within = (0, 0)
        left = fault.good_steps
        for epoch, steps, before in self._steps:  # noqa: B007
            if left < steps:
                break
            left -= steps
        where = f"epoch {epoch + 1}, step {before + left + 1}"
        self.stopped = fault.told(where, len(self.head.weight0))
        return True
