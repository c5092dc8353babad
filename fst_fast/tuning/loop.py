"""The tuning loop: epochs, learning rates, records, and the ends that a run may come to."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import nn

from ..data.batches import Batches, check_batch
from ..heads.tap import FeatureTap
from ..methods import Method, Run
from .averaging import WeightAverage, fresh_statistics
from .batch_source import Feed, cache_features, open_feed
from .cuda_graphs import Recording, Replays
from .distributed_check import check_in_step, check_staged
from .distributed_model import SharedModel
from .epoch_log import Ledger
from .interrupts import Interrupts
from .method_run import MethodRun, Position
from .progress import EpochRecord, ProgressReport
from .run_state import RunState
from .settings import LoopSettings
from .step import Step, is_out_of_memory

Callback = Callable[[EpochRecord, nn.Module], bool | None]


class Keeper(Protocol):
    """Keeps a run where a later process finds it."""

    def begin_epoch(self) -> None:
        """Note the random states from which the loader makes the epoch's batches."""

    def caught_up(self) -> None:
        """Put the random states where the run left them: the batches before it were skipped."""

    def keep(self, tuner: Tuner) -> None:
        """Write down where the run stands."""


class Tuner(MethodRun):
    """One run of one method on one model; the :class:`~fst_fast.methods.Run` of the method.

    The model is changed in place. After :meth:`run`, ``history`` holds what was done and
    ``stopped`` says why it ended early, or is None.

    Args:
        recording: whether and how steps are recorded, to be replayed.
        ending: the name in ENDINGS of what follows the head, whose loss would be another one.
        shared: runs the model on this rank's rows in a data parallel run; else None.
    Attributes:
        state: all tensors of the run.
        position: where the run stands.
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
        ending: str | None = None,
        shared: SharedModel | None = None,
    ) -> None:
        self.model, self.method, self.settings = model, method, settings
        self._shared, self._interrupted = shared, False
        self.epochs, self.head_lr, self.head_only_until = settings.epochs, 1.0, 0
        self.state = RunState()
        # Without a circle, the memory of a run is free as soon as nobody holds its Tuner.
        view: Run = weakref.proxy(self)
        self._view = view
        self.step = Step(
            *(model, head, method, settings, tap, self.state),
            gradients=lambda batch, closure: method.gradients(view, batch, closure),
            after=lambda: method.after_step(view),
            ending=ending,
            shared=shared,
        )
        self.head, self.guard = self.step.head, self.step.guard
        self.average: WeightAverage | None = None
        self.classes = len(self.head.weight0)
        self.memo: dict[str, Any] = {}
        self.findings: list[Mapping[str, Any]] = []
        self.history: list[EpochRecord] = []
        self.stopped: str | None = None
        self.position = Position()
        self._recording, self.longest_graph = recording, 0
        # This call of run() notes where each epoch began, and how many of its steps it queued.
        self._queued: list[tuple[Position, int]] = []
        self._replays: Replays | None = None
        self._batches: Batches | None = None
        self._validate: Callable[[nn.Module], float] | None = None

    def begin(self, batches: Batches) -> None:
        """Let the method prepare; its tensors are registered then."""
        self._batches = batches
        self.method.begin(self._view)
        self.settings = replace(self.settings, epochs=self.epochs)

    def run(
        self,
        batches: Batches,
        report: ProgressReport,
        validate: Callable[[nn.Module], float] | None = None,
        callbacks: Sequence[Callback] = (),
        keeper: Keeper | None = None,
    ) -> None:
        """Tune for all epochs, or until a callback, Ctrl-C or a loss that is not finite.

        A run goes on from its position. ``keeper`` keeps it after every epoch, before the
        callbacks, and where it is interrupted. Unless somebody looks in between (``validate``,
        ``callbacks``, ``keeper``), the host queues one epoch after the other without waiting for
        the device.
        """
        self._validate = validate
        looks = validate is not None or bool(callbacks) or keeper is not None
        device = self.settings.compute.device
        feed = self._open(batches)
        feed.register(self.state)
        feed.watched = self._shared is not None
        report.expect(self.epochs)
        replays = self._replays = self._make_replays(batches, report)
        ledger = Ledger(device, self.history[-1].seconds if self.history else 0.0)
        with Interrupts(terminate=keeper is not None) as interrupts:
            for epoch in range(self.position.epoch, self.epochs):
                last = epoch + 1 == self.epochs
                lr = self._begin(epoch)
                images = self._epoch(feed, replays, interrupts, keeper)
                if self._shared is not None:
                    self._shared.average_buffers(self.model)
                if images is None or ((last or looks) and self._has_failed()):
                    self._take(ledger.ready(wait=True), report)
                    if keeper is not None and self.position.within:
                        keeper.keep(self)
                    return
                self.position = Position(epoch + 1)
                self._end(epoch, batches)
                if self._shared is not None:
                    check_in_step(self._shared.ranks, self.state, device, epoch)
                accuracy = None if validate is None else validate(self.model)
                values = torch.cat([self.step.totals, self.head.shift().double()])
                values = torch.cat([values, self.guard.good_steps.double()[None]])
                steps = sum(count for _, count in self._queued)
                ledger.put(epoch, lr, images, steps, values, accuracy)
                records = ledger.ready(wait=last or looks)
                self._take(records, report)
                if keeper is not None:
                    keeper.keep(self)
                answers = [callback(records[-1], self.model) for callback in callbacks]
                requested, asked = interrupts.requested, any(answers)
                if self._shared is not None:
                    requested, asked = self._shared.ranks.any(requested, asked)
                if last or self._is_to_stop(requested, asked):
                    return

    def _take(self, records: list[EpochRecord], report: ProgressReport) -> None:
        for record in records:
            self.history.append(record)
            report.epoch(record)

    def _is_to_stop(self, interrupted: bool, asked: bool) -> bool:
        epoch = self.position.epoch
        if interrupted:
            self.stopped = f"interrupted after epoch {epoch}"
        elif asked:
            self.stopped = f"a callback asked to stop after epoch {epoch}"
        return self.stopped is not None

    def _open(self, batches: Batches) -> Feed:
        """Return the source of batches; the head alone is trained on features computed once."""
        step = self.step
        classes = len(self.head.weight0)
        keeps = self._recording.capture is not None
        feed = open_feed(batches, step.place, self.settings.compute.device, classes, keeps)
        if self.method.trains == "head" and step.tap is not None:
            self.model.eval()
            with torch.no_grad():
                return cache_features(batches, step.features, feed)
        return feed

    def _make_replays(self, batches: Batches, report: ProgressReport) -> Replays:
        required = self._recording.required

        def refused(reason: str, steps: int) -> None:
            if steps > 1:
                report.note(f"purify: replays one step at a time: {reason}")
                return
            if required:
                raise RuntimeError(
                    f"purify: graphs=True needs a step that can be recorded, but {reason}; leave "
                    "graphs out to run without"
                )
            report.note(f"purify: runs without CUDA graphs: {reason}")

        return Replays(
            self.model,
            self._recording,
            self.state.stepped,
            self.settings.compute.device,
            refused,
            # A thread of its own goes on drawing crops and orders.
            watches_draws=not batches.adapter.draws_ahead,
        )

    def _begin(self, epoch: int) -> float:
        """Set the learning rates of an epoch and what is trained in it; returns the former."""
        step = self.step
        self.method.begin_epoch(self._view, epoch)
        lr = self.settings.lr * (1 + math.cos(math.pi * epoch / self.epochs)) / 2
        step.lr.fill_(lr)
        step.head_lr.fill_(lr * self.head_lr)
        if not self.position.within:
            step.totals.zero_()
        # A callback may have changed the model since.
        self.guard.keep()
        self.model.train(bool(step.backbone) and not step.head_only)
        return lr

    def _epoch(
        self, feed: Feed, replays: Replays, interrupts: Interrupts, keeper: Keeper | None
    ) -> int | None:
        """Queue an epoch's steps; how many images were in it, or None where it was stopped."""
        failed = False
        start = self.position
        steps, count = start.step, start.images
        self._queued.append((start, 0))
        if keeper is not None:
            keeper.begin_epoch()
        try:
            for done, images in self._work(feed, replays, interrupts, keeper):
                steps += done
                count += images
                self._queued[-1] = (start, steps - start.step)
                failed = self.guard.after_step(done)
                if failed or self._is_interrupted(interrupts):
                    break
        except RuntimeError:
            # Workers of a DataLoader end on the same Ctrl-C, which the loader reports as an error.
            if self._shared is not None or not interrupts.requested:
                raise
        finally:
            self.head.materialize()
            self.longest_graph = replays.longest
        interrupted = self._is_interrupted(interrupts)
        if (failed or interrupted) and self._has_failed():
            return None
        if interrupted:
            self.position = Position(start.epoch, steps, count)
            self.stopped = f"interrupted at epoch {start.epoch + 1}, step {steps}"
            return None
        if count == 0:
            raise ValueError(
                "purify: loader must yield batches in every epoch, got none in epoch "
                f"{start.epoch + 1}; return a fresh iterator each time"
            )
        return count

    def _is_interrupted(self, interrupts: Interrupts) -> bool:
        """Return whether the epoch is to end here; ranks have agreed on it before the step."""
        return interrupts.requested if self._shared is None else self._interrupted

    def _work(
        self, feed: Feed, replays: Replays, interrupts: Interrupts, keeper: Keeper | None
    ) -> Iterator[tuple[int, int]]:
        """Queue the steps of an epoch that are not done yet.

        Yields, each time that the host may look up, the steps and images since the last time.
        """
        position, before = self.position, self.position.step
        for kind, size, staged in feed.epoch(position.epoch):
            skipped = min(before, staged)
            for _ in range(skipped):
                feed.advance(kind)
            before -= skipped
            if skipped and not before and keeper is not None:
                keeper.caught_up()
            ready = staged - skipped
            while ready:
                if self._shared is not None:
                    self._interrupted = check_staged(
                        self._shared.ranks, (size, feed.digest), interrupts.requested
                    )
                    if self._interrupted:
                        return
                # A whole epoch settles how many steps go together.
                done = self._do(feed, replays, kind, 1 if position.within else ready, staged)
                ready -= done
                yield done, done * size
        if self._shared is not None:
            # The loaders of all ranks end here.
            check_staged(self._shared.ranks, (0, 0), False)

    def _do(self, feed: Feed, replays: Replays, kind: Hashable, ready: int, staged: int) -> int:
        """Do one step, or, where they are one graph, some of those ready; returns how many.

        A step is done in parts where a whole batch takes too much memory.
        """
        step = self.step
        # So many epochs are left until another part of the model is trained, or the run ends.
        alike = (self.head_only_until if step.head_only else self.epochs) - self.position.epoch
        in_a_row = staged if ready > 1 or not self.position.within else 1
        while True:
            try:
                key = (kind, step.head_only, step.parts)
                work = lambda: step(feed, kind)  # noqa: E731
                return replays.run(key, work, ready, in_a_row, staged * alike)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                step.make_room(feed, kind, error)

    def _end(self, epoch: int, batches: Batches) -> None:
        """Count the weights where they are averaged; at the end, put the average in."""
        last = epoch + 1 == self.epochs
        average = self.average
        if average is not None and epoch >= average.first:
            average.add()
            if last:
                average.put_in()
                if self.method.project:
                    with torch.no_grad():
                        self.head.weight.mul_(self.head.norm0 / self.head.weight.norm())
                self._measure_statistics(batches, epoch)
        if last:
            self.method.finish(self._view)

    def _measure_statistics(self, batches: Batches, epoch: int) -> None:
        """Measure the statistics of batch norm anew, on the images of an epoch."""
        compute = self.settings.compute
        with torch.no_grad(), fresh_statistics(self.model) as weigh:
            if weigh is None:
                return
            for count, batch in enumerate(batches.epoch(epoch), start=1):
                images, _ = check_batch(batch, batches.where, compute.device, values=False)
                weigh(count)
                with compute.autocast():
                    self.model(self.step.place(images))

    def _has_failed(self) -> bool:
        """Wait for the device; whether a step went wrong, which is then told."""
        fault = self.guard.finish()
        if fault is None:
            return False
        left = fault.good_steps
        for start, steps in self._queued:  # noqa: B007
            if left < steps:
                break
            left -= steps
        # The state that was kept is that of an epoch's end.
        self.position = Position(self.position.epoch)
        where = f"epoch {start.epoch + 1}, step {start.step + left + 1}"
        self.stopped = fault.told(where, len(self.head.weight0))
        return True
