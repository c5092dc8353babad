"""The public verb: take a suspect model and clean images, return the purified model."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from ..data.batches import Batches, Loader, resolve_precision
from ..heads.contexts import deterministic_algorithms, on_device, seeded, tuning
from ..heads.find import head_matrix, unwrap
from ..heads.tap import tap_features
from ..methods import Method
from ..ops import backends
from .arguments import (
    check_batch_norm,
    check_callbacks,
    check_choices,
    check_flags,
    check_head,
    check_model,
    ending_of,
    frozen_note,
    plain_numbers,
    plain_optional,
)
from .autotune import arrange, threads_of
from .clean_accuracy import CleanAccuracy, Judge
from .distributed import alone_note, joined
from .distributed_looks import accuracy_of
from .distributed_run import (
    arranged_alike,
    device_of_rank,
    in_step,
    note_of_ranks,
    recording_of_ranks,
    settings_of_ranks,
    shared_model,
)
from .loop import Callback, Tuner
from .plan import Plan, check_fit, check_resumable, choose_method, recording_for
from .progress import ProgressReport
from .result import HeadShift, PurifyResult
from .resume import arrangement_of, fingerprint, follow_in
from .settings import ComputeSettings, LoopSettings


def purify(
    model: nn.Module,
    loader: Loader,
    *,
    method: str | Method = "fst",
    alpha: float | str | None = "auto",
    epochs: int = 10,
    steps_per_epoch: int | None = None,
    lr: float = 0.01,
    momentum: float = 0.9,
    head: nn.Module | str | None = None,
    validation: Loader | None = None,
    device: torch.device | str | None = None,
    precision: str = "auto",
    channels_last: bool | None = None,
    threads: int | None = None,
    graphs: bool | int | str = "auto",
    compile: bool = False,
    deterministic: bool = False,
    backend: str | None = None,
    seed: int = 0,
    resume: str | Path | None = None,
    progress: bool = True,
    callbacks: Sequence[Callback] = (),
    inplace: bool = False,
    check: bool = True,
    batch_norm: str = "global",
) -> PurifyResult:
    """Tune a suspect classifier on clean images so that its backdoor goes.

    By default small universal triggers are searched on the model and shown to it with the images'
    true labels (:class:`~fst_fast.methods.trigger_unlearning.TriggerUnlearning`). With a number as
    ``alpha``, Feature Shift Tuning (Min et al., NeurIPS 2023, arXiv 2310.01875, section 4):
    re-initialise the head, minimise ``cross-entropy + alpha * <W, W0>`` over all parameters by SGD
    under a cosine learning rate stepped per epoch, and after every step scale the head's weight W
    back to the norm of the original weight W0. Attack success is not measured here: that takes the
    trigger (:func:`fst_fast.evaluate`).

    Args:
        model: any image classifier; DataParallel, DDP and torch.compile wrappers are looked
            through.
        loader: clean (images [B, C, H, W] float, labels [B] integer), normalised as in training:
            a DataLoader, a list of batches, a DeviceLoader, or a function that returns a fresh
            iterator for each epoch. The suspect and the tuned model are measured on it as well
            (see ``validation``): on a DeviceLoader's images without augmentation, and on the first
            batch alone of what tells no length.
        method: a name in fst_fast.methods.METHODS, or a :class:`~fst_fast.methods.Method`.
        alpha: weight of FST's inner product, which runs FST as published (0.2 is the paper's for
            CIFAR-10); what it does grows with lr and steps. "auto" searches triggers on the model
            and unlearns them instead:
            :class:`~fst_fast.methods.trigger_unlearning.TriggerUnlearning`. None takes the
            method's own; so does "auto" where the method is not "fst".
        epochs: passes over the loader; FST with ``alpha="auto"`` makes four times as many.
        steps_per_epoch: batches of an epoch, for a loader without an end: of an iterator the next
            ones, else the first ones. None takes all.
        lr: learning rate of the first epoch.
        momentum: of SGD, in [0, 1).
        head: the classification layer or its qualified name, where it cannot be found with
            certainty.
        validation: clean batches for the accuracy in the history, and before and after the run;
            None uses the tuning batches, which flatters the tuned model.
        device: None takes the model's GPU, else any GPU, else the CPU.
        precision: "fp32", "bf16", "fp16", or "auto": bf16 where the device has instructions for
            it, else fp16 on a GPU and fp32 on a CPU. On a CPU a run of 40 steps or more begins with
            a trial of a few steps, which takes fp32, another layout or fewer threads where that is
            1.2 times as fast. What was taken is in the result's settings, and may be given here to
            have the same bits on a busier machine.
        channels_last: memory layout of weights and images; None takes the faster one.
        threads: of PyTorch during the run, on a CPU; None takes as many as it has, or fewer.
        graphs: on a GPU, record the steps as CUDA graphs and replay them: "auto" where the model
            allows it (a note says why not), True or an error, False never. One graph holds several
            steps where they are short, and their batches on the device beforehand; a number is
            True with at most so many in one, 1 to 16. The weights are the same.
        compile: run the model up to its head through ``torch.compile``, which takes its time
            first.
        deterministic: the same bits every time on this machine: no trial on a CPU, and on a GPU
            only algorithms that promise it (which needs ``CUBLAS_WORKSPACE_CONFIG=:4096:8`` in the
            environment; an operation without one is a RuntimeError).
        backend: of the fused ops: None (the fastest), "reference", "cpu", "triton" or "cuda".
        seed: of the new head and of every random draw during the run. The global random state is
            put back afterwards.
        resume: a folder for this run's state, written after every epoch and on Ctrl-C or SIGTERM
            (which then ends the process, once the state is on the disk). Called again with the
            same arguments, purify goes on there, and on the CPU ends in the same bits as without an
            interruption.
        progress: show a bar on a terminal, plain lines elsewhere.
        callbacks: each is called as ``callback(record, model)`` after every epoch; one that
            returns True ends the run.
        inplace: tune the given model instead of a copy.
        check: refuse, before the first step, tuning labels that the suspect's answers show not to
            be its own; False goes on, and the result's warnings say so.
        batch_norm: in a data parallel run, "global" takes batch norm's statistics over the whole
            batch, "rank" over each rank's rows of it, and averages the running ones every epoch.
    Returns:
        A :class:`PurifyResult`, with the clean accuracy before and after, and a warning where more
        than three points of it were lost. After Ctrl-C, or a loss that is not finite, it holds the
        last good weights and says so in ``stopped``.
    Raises:
        ValueError: an argument or a batch is not as described; the message says what to do.
        RuntimeError: ``backend`` is not available here.
        LostRankError: another rank of a data parallel run has ended.

    Within a process group of several ranks (``torch.distributed``), all ranks must call this with
    the same arguments, and loaders that yield the same batches. They tune one model together, each
    on its rows of every batch: the result is that of one process, but for the rounding of sums.
    Rank 0 reports, and keeps the run that ``resume`` names.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
        >>> images = torch.rand(4, 3, 2, 2)
        >>> batches = [(images, model(images).argmax(1))]
        >>> result = fst_fast.purify(model, batches, alpha=0.1, epochs=2, progress=False)
        >>> len(result.history), result.before
        (2, 1.0)
    """
    with joined("purify") as ranks:
        check_model(unwrap(model) if isinstance(model, nn.Module) else model)
        check_head(head)
        check_choices(graphs, backend)
        check_flags(progress=progress, inplace=inplace, deterministic=deterministic)
        check_flags(compile=compile, check=check)
        check_batch_norm(batch_norm)
        callbacks = check_callbacks(callbacks)
        epochs, lr, momentum, seed = plain_numbers(epochs, lr, momentum, seed)
        alpha, threads, resume, steps = plain_optional(alpha, threads, resume, steps_per_epoch)
        chosen = choose_method(method, alpha)
        place = device_of_rank(device, model, ranks)
        compute = ComputeSettings(place, precision, channels_last, threads, backend, compile)
        backends.choose("head_step_", place, backend)
        resolve_precision(precision, place)
        with on_device(place):
            epochs *= chosen.epochs_factor
            plan = Plan(
                method=chosen,
                epochs=epochs,
                lr=lr,
                momentum=momentum,
                compute=compute,
                deterministic=deterministic,
                recording=recording_of_ranks(graphs, ranks) or recording_for(graphs, place),
                seed=seed,
                resume=resume,
                batches=Batches(loader, epochs, "purify: loader", steps=steps),
                validation=None
                if validation is None
                # It is gone through before and after the run as well.
                else Batches(validation, epochs + 2, "purify: validation"),
                check=check,
                ranks=ranks,
                batch_norm=batch_norm,
            )
            check_resumable(plan)
            plain = unwrap(model)
            name = check_fit(plain, plan, head)
            tuned = plain if inplace else copy.deepcopy(plain)
            shown = progress and (ranks is None or ranks.first)
            with (
                in_step(plan, tuned, name, len(callbacks)) as plan,
                ProgressReport(chosen.name, epochs, shown) as report,
            ):
                result = _purified(tuned, name, plan, report, callbacks)
        return replace(result, model=model) if inplace else result


def _purified(
    tuned: nn.Module,
    name: str,
    plan: Plan,
    report: ProgressReport,
    callbacks: Sequence[Callback],
) -> PurifyResult:
    """Tune the model in place, between two looks at what it is right on."""
    started = time.perf_counter()
    with tuning(tuned, plan.compute.device), deterministic_algorithms(plan.deterministic):
        _tell(report, plan, tuned)
        asked = _asked(tuned, name, plan)
        compute = _arranged(tuned, plan)
        with threads_of(compute.threads):
            judge = Judge(plan.batches, plan.validation, compute, plan.seed, plan.ranks)
            classes = len(head_matrix(tuned.get_submodule(name)))
            report.note(f"purify: {judge.look_at(tuned, classes, plan.check)}")
            tuner = _prepare(tuned, name, plan, compute, report)
            _run(tuner, asked, plan, report, callbacks)
            accuracy = judge.compare(tuned)
        # Behind this block the model goes back to its own device, and the original head stays.
        shift = _shift(tuner)
    for warning in accuracy.warnings:
        report.note(f"purify: warning: {warning}")
    seconds = time.perf_counter() - started
    return _result(tuned, tuner, shift, accuracy, name, plan, seconds)


def _asked(model: nn.Module, name: str, plan: Plan) -> dict[str, object]:
    """Return what two runs must agree in for one to go on with the other, beside settings."""
    if plan.resume is None:
        return {}
    batches = {"batches": plan.batches.length(), "images": plan.batches.images()}
    return {"head": name, "seed": plan.seed, "model": fingerprint(model), **batches}


def _tell(report: ProgressReport, plan: Plan, model: nn.Module) -> None:
    """Notes of the batches, and of parameters that came frozen, go to the report."""
    plan.batches.note = report.note
    note_of_ranks(plan, report)
    alone = alone_note("purify")
    if alone is not None:
        report.note(alone)
    note = frozen_note(model)
    if note is not None and plan.method.trains == "all":
        report.note(f"purify: {note}")


def _arranged(tuned: nn.Module, plan: Plan) -> ComputeSettings:
    """Settle how the steps are computed, and lay the model out for it."""
    images, labels = plan.batches.first[:2]
    kept = None if plan.resume is None else arrangement_of(plan.resume)
    if kept is None:
        trains = plan.method.trains != "head"
        # A trial is for runs that are long enough; and what it takes is up to the clock.
        length = plan.batches.length()
        steps = None if length is None else plan.epochs * length
        steps = 0 if plan.deterministic else steps
        compute = arranged_alike(
            plan.ranks,
            plan.compute,
            lambda: arrange(tuned, images, labels, plan.compute, steps=steps, trains=trains),
        )
    else:
        compute = plan.compute.arranged(kept)
    compute.lay_out(tuned)
    return compute


def _prepare(
    tuned: nn.Module, name: str, plan: Plan, compute: ComputeSettings, report: ProgressReport
) -> Tuner:
    """Return the run, its head re-initialised if the method says so."""
    images = plan.batches.first[0]
    settings = LoopSettings(plan.epochs, plan.lr, plan.momentum, compute)
    module = tuned.get_submodule(name)
    tap = tap_features(tuned, module, images, train=compute.compile)
    ending = ending_of(tuned, module, images) if tap is None else None
    if ending is not None:
        report.note(f"purify: the model ends in a {ending}; its loss is taken of the logits before")
    shared = shared_model(plan, compute)
    tuner = Tuner(tuned, module, plan.method, settings, tap, plan.recording, ending, shared)
    if plan.method.reinitializes:
        tuner.head.reinitialize(torch.Generator().manual_seed(plan.seed))
    return tuner


def _run(
    tuner: Tuner,
    asked: Mapping[str, object],
    plan: Plan,
    report: ProgressReport,
    callbacks: Sequence[Callback],
) -> None:
    compute = tuner.settings.compute
    validate = _validator(plan, compute)
    with seeded(plan.seed, compute.device):
        tuner.begin(plan.batches)
        keeper = None
        if plan.resume is not None:
            keeper = follow_in(plan.resume, tuner, asked, plan.batches, report)
            keeper.writes = plan.ranks is None or plan.ranks.first
        tuner.run(plan.batches, report, validate, callbacks, keeper)
    if tuner.stopped is not None:
        report.note(f"purify: {tuner.stopped}")


def _shift(tuner: Tuner) -> HeadShift:
    cosine, norm = tuner.head.shift().tolist()
    rows = (tuple(values) for values in tuner.head.shift_by_class().tolist())
    return HeadShift(cosine, norm, tuner.head.norm0.item(), *rows)


def _result(
    model: nn.Module,
    tuner: Tuner,
    shift: HeadShift,
    accuracy: CleanAccuracy,
    name: str,
    plan: Plan,
    seconds: float,
) -> PurifyResult:
    return PurifyResult(
        model=model,
        history=tuple(tuner.history),
        seconds=seconds,
        settings={
            **plan.method.settings(),
            **tuner.settings.plain(),
            **settings_of_ranks(plan),
            "deterministic": plan.deterministic,
            "graphs": tuner.longest_graph or False,
            "head": name,
            "seed": plan.seed,
            "steps_per_epoch": plan.batches.steps,
            "validation": plan.validation is not None,
        },
        head_shift=shift,
        findings=tuple(tuner.findings),
        stopped=tuner.stopped,
        before=accuracy.before,
        after=accuracy.after,
        measured_on=accuracy.measured_on,
        warnings=accuracy.warnings,
    )


def _validator(plan: Plan, compute: ComputeSettings) -> Callable[[nn.Module], float] | None:
    judged = plan.validation
    if judged is None:
        return None

    def validate(model: nn.Module) -> float:
        return accuracy_of(model, judged, compute, plan.ranks)

    return validate
