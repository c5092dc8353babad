"""Work on trial leaves no trace, neither behind it nor for what is recorded within it."""

import torch
from purify_cases import make_model

from fst_fast.tuning.dry_run import without_trace


def is_kept(parameter):
    """Whether something holds the node in which autograd adds up this parameter's gradient."""

    def accumulator():
        return parameter.view_as(parameter).grad_fn.next_functions[0][0]

    accumulator().metadata["seen"] = True
    return "seen" in accumulator().metadata


def test_autograd_keeps_nothing_meanwhile():
    """An accumulator belongs to the stream that it was made on: a recording may not wait for it."""
    model = make_model()
    parameters = list(model.parameters())
    held = parameters[0].view_as(parameters[0])
    assert is_kept(parameters[0])
    del held
    with without_trace(model, parameters, torch.device("cpu"), True):
        assert not any(is_kept(parameter) for parameter in parameters)


def test_tensors_end_as_they_were():
    model = make_model()
    state = [*model.parameters(), *model.buffers()]
    before = [tensor.detach().clone() for tensor in state]
    with without_trace(model, state, torch.device("cpu"), True), torch.no_grad():
        for tensor in state:
            tensor.add_(1)
    assert all(map(torch.equal, state, before))
