"""The public verb: take a suspect model and clean images, return the purified model."""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import methods
from ..data.batches import (
    Batches,
    Loader,
    check_batch,
    resolve_device,
    resolve_precision,
)
from ..heads.contexts import (
    deterministic_algorithms,
    evaluating,
    on_device,
    seeded,
    tuning,
)
from ..heads.find import find_head, head_matrix, head_name, unwrap
from ..heads.tap import tap_features
from ..measure.evaluate import measure
from ..methods import Method
from ..ops import backends
from .arguments import (
    check_adapter,
    check_callbacks,
    check_choices,
    check_flags,
    check_head,
    check_model,
    check_one_process,
    check_output,
    check_validation,
    ends_in_softmax,
    frozen_note,
    needs_two_images,
    plain_numbers,
    plain_optional,
)
from .autotune import arrange, threads_of
from .cuda_graphs import MOST_STEPS, Recording, capture_for
from .loop import Callback, Tuner
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
            iterator for each epoch.
        method: a name in fst_fast.methods.METHODS, or a :class:`~fst_fast.methods.Method`.
        alpha: weight of FST's inner product, which runs FST as published (0.2 is the paper's for
            CIFAR-10); what it does grows with lr and steps. "auto" searches triggers on the model
            and unlearns them instead:
            :class:`~fst_fast.methods.trigger_unlearning.TriggerUnlearning`. None takes the
            method's own; so does "auto" where the method is not "fst".
        epochs: passes over the loader; FST with ``alpha="auto"`` makes four times as many.
        lr: learning rate of the first epoch.
        momentum: of SGD, in [0, 1).
        head: the classification layer or its qualified name, where it cannot be found with
            certainty.
        validation: clean batches for the accuracy in the history; None uses the tuning batches.
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
    Returns:
        A :class:`PurifyResult`. After Ctrl-C, or a loss that is not finite, it holds the last
        good weights and says so in ``stopped``.
    Raises:
        ValueError: an argument or a batch is not as described; the message says what to do.
        RuntimeError: ``backend`` is not available here.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
        >>> batches = [(torch.rand(4, 3, 2, 2), torch.tensor([0, 1, 2, 0]))]
        >>> result = fst_fast.purify(model, batches, alpha=0.1, epochs=2, progress=False)
        >>> len(result.history)
        2
    """
    check_one_process()
    check_model(unwrap(model) if isinstance(model, nn.Module) else model)
    check_head(head)
    check_choices(graphs, backend)
    check_flags(progress=progress, inplace=inplace, deterministic=deterministic, compile=compile)
    callbacks = check_callbacks(callbacks)
    epochs, lr, momentum, seed = plain_numbers(epochs, lr, momentum, seed)
    alpha, threads, resume = plain_optional(alpha, threads, resume)
    chosen = _choose_method(method, alpha)
    place = resolve_device(device, model)
    compute = ComputeSettings(place, precision, channels_last, threads, backend, compile)
    backends.choose("head_step_", place, backend)
    resolve_precision(precision, place)
    with on_device(place):
        plan = _Plan(
            method=chosen,
            epochs=epochs * chosen.epochs_factor,
            lr=lr,
            momentum=momentum,
            compute=compute,
            deterministic=deterministic,
            recording=_recording(graphs, place),
            seed=seed,
            resume=resume,
            batches=Batches(loader, epochs * chosen.epochs_factor, "purify: loader"),
            validation=None
            if validation is None
            else Batches(validation, epochs * chosen.epochs_factor, "purify: validation"),
        )
        plain = unwrap(model)
        name = _check_model(plain, plan, head)
        # This runs before anything is changed, perhaps in place.
        asked = {"head": name, "seed": seed}
        if resume is not None:
            asked["model"] = fingerprint(plain)
        tuned = plain if inplace else copy.deepcopy(plain)
        started = time.perf_counter()
        with (
            tuning(tuned, place),
            deterministic_algorithms(deterministic),
            ProgressReport(chosen.name, plan.epochs, progress) as report,
        ):
            _tell(report, plan, tuned)
            tuner = _prepare(tuned, name, plan, report)
            _run(tuner, asked, plan, report, callbacks)
            # Behind this block the model goes back to its own device, and the original head stays.
            shift = _shift(tuner)
        seconds = time.perf_counter() - started
        return _result(model if inplace else tuned, tuner, shift, name, plan, seconds)


@dataclass(frozen=True)
class _Plan:
    """The arguments of a run, checked as far as that goes without the model."""

    method: Method
    epochs: int
    lr: float
    momentum: float
    compute: ComputeSettings
    deterministic: bool
    recording: Recording
    seed: int
    resume: str | Path | None
    batches: Batches
    validation: Batches | None


def _check_model(model: nn.Module, plan: _Plan, head: nn.Module | str | None) -> str:
    """Check that model and batches fit each other; returns the head's qualified name."""
    batches, place = plan.batches, plan.compute.device
    images, _ = check_batch(batches.first, batches.where, place)
    _check_weights(model)
    _check_takes(model, images)
    name, classes = _trained_head(model, head, images)
    check_adapter(model, name)
    check_batch(batches.first, batches.where, place, num_classes=classes)
    check_validation(plan.validation, place, classes)
    sizes = batches.sizes()
    if (sizes is None or 1 in sizes) and needs_two_images(model, images):
        batches.join_singles()
    return name


def _tell(report: ProgressReport, plan: _Plan, model: nn.Module) -> None:
    """Notes of the batches, and of parameters that came frozen, go to the report."""
    plan.batches.note = report.note
    note = frozen_note(model)
    if note is not None and plan.method.trains == "all":
        report.note(f"purify: {note}")


def _prepare(tuned: nn.Module, name: str, plan: _Plan, report: ProgressReport) -> Tuner:
    """Settle how the steps are computed; returns the run, its head re-initialised if so."""
    images, labels = plan.batches.first[:2]
    kept = None if plan.resume is None else arrangement_of(plan.resume)
    if kept is None:
        trains = plan.method.trains != "head"
        # A trial is for runs that are long enough; and what it takes is up to the clock.
        steps = 0 if plan.deterministic else _steps(plan.batches.loader, plan.epochs)
        compute = arrange(tuned, images, labels, plan.compute, steps=steps, trains=trains)
    else:
        compute = plan.compute.arranged(kept)
    compute.lay_out(tuned)
    settings = LoopSettings(plan.epochs, plan.lr, plan.momentum, compute)
    module = tuned.get_submodule(name)
    tap = tap_features(tuned, module, images, train=compute.compile)
    # A softmax may follow the head: the cross-entropy of its output would be another loss.
    probabilities = tap is None and ends_in_softmax(tuned, images)
    if probabilities:
        report.note("purify: the model ends in a softmax; its loss is taken of the logits before")
    tuner = Tuner(tuned, module, plan.method, settings, tap, plan.recording, probabilities)
    if plan.method.reinitializes:
        tuner.head.reinitialize(torch.Generator().manual_seed(plan.seed))
    return tuner


def _run(
    tuner: Tuner,
    asked: Mapping[str, object],
    plan: _Plan,
    report: ProgressReport,
    callbacks: Sequence[Callback],
) -> None:
    compute = tuner.settings.compute
    validate = _validator(plan.validation, compute)
    with seeded(plan.seed, compute.device), threads_of(compute.threads):
        tuner.begin(plan.batches)
        keeper = None
        if plan.resume is not None:
            keeper = follow_in(plan.resume, tuner, asked, plan.batches.loader, report)
        tuner.run(plan.batches, report, validate, callbacks, keeper)
    if tuner.stopped is not None:
        report.note(f"purify: {tuner.stopped}")


def _shift(tuner: Tuner) -> HeadShift:
    cosine, norm = tuner.head.shift().tolist()
    rows = (tuple(values) for values in tuner.head.shift_by_class().tolist())
    return HeadShift(cosine, norm, tuner.head.norm0.item(), *rows)


def _result(
    model: nn.Module, tuner: Tuner, shift: HeadShift, name: str, plan: _Plan, seconds: float
) -> PurifyResult:
    return PurifyResult(
        model=model,
        history=tuple(tuner.history),
        seconds=seconds,
        settings={
            **plan.method.settings(),
            **tuner.settings.plain(),
            "deterministic": plan.deterministic,
            "graphs": tuner.longest_graph or False,
            "head": name,
            "seed": plan.seed,
            "validation": plan.validation is not None,
        },
        head_shift=shift,
        findings=tuple(tuner.findings),
        stopped=tuner.stopped,
    )


def _recording(graphs: bool | int | str, place: torch.device) -> Recording:
    # True is 1 to Python, but no number of steps.
    most = graphs if isinstance(graphs, int) and not isinstance(graphs, bool) else None
    if not (graphs in ("auto", True, False) if most is None else 1 <= most <= MOST_STEPS):
        raise ValueError(
            f'purify: graphs must be "auto", True, False or a number of steps in 1..{MOST_STEPS}, '
            f"got {graphs!r}"
        )
    recording = Recording(
        capture_for(place) if graphs else None, graphs not in ("auto", False), most
    )
    if recording.required and recording.capture is None:
        raise ValueError(
            f"purify: graphs={graphs} needs a GPU, got the device {place}; leave graphs out"
        )
    return recording


def _choose_method(method: str | Method, alpha: float | str | None) -> Method:
    if isinstance(alpha, str) and alpha != "auto":
        raise ValueError(f'purify: alpha must be a number, "auto" or None, got {alpha!r}')
    if isinstance(method, str):
        return methods.get(method, **({} if alpha is None else {"alpha": alpha}))
    if not isinstance(method, Method):
        raise ValueError(
            f"purify: method must be a name in {list(methods.available())} or a Method, got "
            f"{method!r}"
        )
    if alpha not in ("auto", None):
        raise ValueError(
            f"purify: alpha must be left out where method is an object, got {alpha}; set it there"
        )
    return method


def _validator(
    judged: Batches | None, compute: ComputeSettings
) -> Callable[[nn.Module], float] | None:
    if judged is None:
        return None

    def validate(model: nn.Module) -> float:
        return measure(model, judged, compute.device, compute.precision)[""].clean_accuracy

    return validate


def _steps(loader: Loader, epochs: int) -> int | None:
    """Return the steps of the whole run; None where the loader does not tell its length."""
    try:
        return epochs * len(loader)  # type: ignore[arg-type]
    except TypeError:
        return None


def _check_weights(model: nn.Module) -> None:
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if tensor.is_meta or tensor.dtype in (torch.float16, torch.bfloat16):
            raise ValueError(
                f"purify: model must hold float32 weights, got {name} as {tensor.dtype} on "
                f"{tensor.device}; use model.float(), and precision= for half-precision arithmetic"
            )
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ValueError(
                f"purify: model must have finite weights, got NaN or Inf in {name}; the file is "
                "damaged or the training diverged"
            )


def _check_takes(model: nn.Module, images: Tensor) -> None:
    """Run two images through the model, where it is, so that a misfit is told as one."""
    own = next(model.parameters())
    with evaluating(model, own.device), torch.no_grad():
        try:
            output = model(images[:2].to(own.device, own.dtype).contiguous())
        except Exception as error:
            raise ValueError(
                f"purify: model must take the loader's images {list(images.shape)}, got "
                f"{type(error).__name__}: {error}; check their channels and size"
            ) from error
    check_output(output)


def _trained_head(
    model: nn.Module, head: nn.Module | str | None, images: Tensor
) -> tuple[str, int]:
    """The head's qualified name, and its number of classes."""
    found = find_head(model, head=head, example=images)
    name, weight = head_name(model, found), head_matrix(found)
    if weight.norm().item() == 0:
        raise ValueError(
            f"purify: model must have a trained head, got {name} with a weight of zeros (norm 0); "
            "load the checkpoint, or name the right layer with head="
        )
    return name, len(weight)
