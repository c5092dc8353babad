"""Data parallel purify over gloo: several ranks give what one process gives on the same batches.

``FST_FAST_RANKS=4`` runs everything on as many ranks.
"""

import os
import re
from collections import Counter

import pytest
import rank_cases
import torch
from rank_pool import RankPool

from fst_fast import methods
from fst_fast.tuning.distributed import alone_note

RANKS = int(os.environ.get("FST_FAST_RANKS", "2"))
CLOSE = 1e-5
ALONE = {"Net", "Conv2d", "BatchNorm2d", "Dropout", "Linear"}


@pytest.fixture(scope="module")
def pool():
    found = RankPool(RANKS)
    yield found
    found.close()


def together(pool, function, *arguments):
    """The outcome of one process, and those of the ranks for the same call, done meanwhile."""
    pool.begin(function, *arguments)
    try:
        alone = function(*arguments)
    finally:
        # An answer that is left would be taken for that of the next call.
        answers = [pool.answer(rank) for rank in range(RANKS)]
    assert all(why is None for _, why in answers), [why for _, why in answers]
    return alone, [result for result, _ in answers]


def assert_alike(alone, shared, close=CLOSE):
    for one in shared:
        assert rank_cases.furthest(one, alone) <= close
        assert one["accuracies"] == alone["accuracies"]
        assert one["before"] == alone["before"]
        assert one["state"].keys() == alone["state"].keys()
    for name, value in shared[0]["state"].items():
        assert all(torch.equal(value, other["state"][name]) for other in shared), name


def refused(pool, function, *arguments):
    """The ranks' errors, each (name, words)."""
    answers = pool(function, *arguments)
    assert all(why is not None for _, why in answers), answers
    return [why for _, why in answers]


@pytest.mark.parametrize(
    "name", sorted(name for name, method in methods.METHODS.items() if method.data_parallel)
)
def test_every_method_ends_where_one_process_does(pool, name):
    alone, shared = together(pool, rank_cases.forty_steps, name)
    assert_alike(alone, shared)
    assert shared[0]["settings"]["ranks"] == RANKS
    before, after = ([f["before"] for f in run["findings"]] for run in (alone, shared[0]))
    assert before == pytest.approx(after, abs=0.02)


@pytest.mark.parametrize(
    ("case", "arguments"),
    [
        # The second batch has fewer images than there are ranks; the net has no batch norm.
        ("on_batches", ({"epochs": 2}, (5, 1, 3), {"norm": torch.nn.Identity})),
        # Here its single image is joined to the batch before.
        ("on_batches", ({"epochs": 2}, (5, 4, 1), {})),
        ("on_batches", ({"epochs": 2}, (5, 4), {"norm": rank_cases.NormAndSilu})),
        ("on_dataset", ({"epochs": 2, "validation": rank_cases.make_batches(2, 5)},)),
    ],
    ids=["fewer than ranks", "joined", "own forward", "DataLoader"],
)
def test_any_loader_and_batch_norm(pool, case, arguments):
    assert_alike(*together(pool, getattr(rank_cases, case), *arguments))


def test_a_wrapped_model_is_tuned_in_place_and_stays_as_it_was(pool):
    alone = rank_cases.tuned("fst")
    shared = pool.results(rank_cases.wrapped)
    assert_alike(alone, [out for out, _ in shared])
    assert all(kinds == {"DistributedDataParallel", *ALONE} for _, kinds in shared)


def test_statistics_of_the_ranks_own_rows_by_choice(pool):
    """One step with a learning rate of almost nothing: the statistics can be told beforehand."""
    case = {"lr": 1e-30, "epochs": 1, "batch_norm": "rank"}
    size = 4 * RANKS
    shared = pool.results(rank_cases.on_batches, case, (size,), {})
    net, images = rank_cases.model(), rank_cases.make_batches(1, size, seed=0)[0][0]
    parts = net.conv1(images).transpose(0, 1).split(4, dim=1)
    mean = torch.stack([part.flatten(1).mean(1) for part in parts]).mean(0)
    var = torch.stack([part.flatten(1).var(1) for part in parts]).mean(0)
    for one in shared:
        assert torch.allclose(one["state"]["bn1.running_mean"], 0.1 * mean, atol=1e-6)
        assert torch.allclose(one["state"]["bn1.running_var"], 0.9 + 0.1 * var, atol=1e-6)
    whole = parts[0].new_tensor([0.9]) + 0.1 * net.conv1(images).var((0, 2, 3))
    assert not torch.allclose(shared[0]["state"]["bn1.running_var"], whole, atol=1e-6)


def test_a_run_goes_on_with_another_number_of_ranks(pool, tmp_path):
    whole = rank_cases.tuned(epochs=5)
    folder = str(tmp_path / "run")
    first = pool.results(rank_cases.until, 2, folder)
    alone = rank_cases.until(3, folder)
    last = pool.results(rank_cases.until, 9, folder)
    assert [len(run["losses"]) for run in (first[0], alone, last[0])] == [2, 3, 5]
    assert_alike(whole, last)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("at", [2, 5])
def test_one_rank_hears_ctrl_c_and_all_stop_at_the_same_step(pool, tmp_path, at):
    folder = str(tmp_path / "run")
    whole = rank_cases.tuned("ft", None, rank_cases.Asking(0, None), epochs=4)
    stopped = pool.results(rank_cases.interrupted, folder, at)
    assert len({run["stopped"] for run in stopped}) == 1
    assert stopped[0]["stopped"].startswith("interrupted at epoch")
    assert_alike(whole, pool.results(rank_cases.interrupted, folder, 0))


def test_a_callback_of_one_rank_stops_all(pool):
    for run in pool.results(rank_cases.one_stops):
        assert run["stopped"] == "a callback asked to stop after epoch 1"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"seed": (0, 3)}, r"another seed \(0 on rank 0, 3 on rank 1\)"),
        ({"weights": (1, 2)}, r"another weights \("),
        ({"lr": (0.01, 0.02)}, r"another lr \(0.01 on rank 0"),
        ({"images": (14, 15)}, r"another loader's images \(14 on rank 0, 15 on rank 1\)"),
        ({"callbacks": (0, 1)}, "another number of callbacks"),
        ({"method": (methods.get("ft"), methods.get("fe"))}, r"another method \(ft on rank 0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_ranks_that_disagree_are_refused(pool, given, told):
    given = {name: (values[0], *values[1:] * (RANKS - 1)) for name, values in given.items()}
    for name, words in refused(pool, rank_cases.differing, given):
        assert name == "ValueError"
        assert words.startswith("purify: all ranks must be given the same run, got ")
        assert re.search(told, words)


def test_unequal_batches_are_refused(pool):
    pixels = {"pixels": (2, *[3] * (RANKS - 1))}
    cases = [
        refused(pool, rank_cases.differing, pixels),
        refused(pool, rank_cases.on_iterators, [3, *[2] * (RANKS - 1)]),
        refused(pool, rank_cases.on_dataset, {}, [0, *[1] * (RANKS - 1)]),
    ]
    for case in cases:
        for name, words in case:
            assert name == "ValueError"
            assert words.startswith("purify: loader must yield the same global batches on every")
    assert "checksum" in cases[0][0][1]
    assert "got a batch of 4 (checksum" in cases[1][0][1]
    assert "none on rank 1" in cases[1][0][1]


@pytest.mark.parametrize("at", [2, 5])
def test_a_rank_that_fails_ends_the_others_at_once(pool, at):
    (first, told), *others = refused(pool, rank_cases.one_fails, at)
    assert others[0] == ("OSError", "the disk is gone")
    assert first == "LostRankError"
    assert "rank 1 ended with OSError: the disk is gone; rank 0 of" in told
    # The processes are as good as before.
    assert not pool.results(rank_cases.one_stops)[0]["state"]["bn1.weight"].isnan().any()


def test_ranks_that_come_apart_end(pool):
    for name, words in refused(pool, rank_cases.one_changes):
        assert name == "RuntimeError"
        assert "in epoch 2 they came apart in " in words


def test_a_loss_that_is_not_finite_stops_all(pool):
    stops = [run["stopped"] for run in pool.results(rank_cases.tuned, "ft", None, None, 1e20)]
    assert len(set(stops)) == 1
    assert "not finite at epoch" in stops[0]


def test_bytes_of_a_step(pool):
    """One gradient, once; and what batch norm, loss and flags need. An epoch has two steps."""
    runs = zip(*(pool.results(rank_cases.counted, epochs) for epochs in (1, 2)), strict=True)
    for (short, gradient), (long, _) in runs:
        of_an_epoch = Counter(long) - Counter(short)
        channels = 6
        assert of_an_epoch.pop(("sum", gradient)) == 2
        assert of_an_epoch.pop(("gather", 8 * (2 * channels + 1))) == 2
        assert of_an_epoch.pop(("sum", 4 * 2 * channels)) == 2
        assert of_an_epoch.pop(("sum", 16)) == 2  # loss and right answers
        assert of_an_epoch.pop(("sum", 8)) == 2  # flags
        assert of_an_epoch.pop(("gather", 24)) == 3  # what is staged, and that nothing more is
        # At the epoch's end: checksums of all tensors, and whether somebody asks to stop.
        assert of_an_epoch.total() == 2
        assert all(kind == "gather" and size < gradient for kind, size in of_an_epoch)


def test_dropout_draws_anew_on_every_rank_and_leaves_them_in_step(pool):
    states = [run["state"] for run in pool.results(rank_cases.draws)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    (rows, state), (others, same) = pool.results(rank_cases.masks)[:2]
    assert torch.equal(rows, others)
    assert torch.equal(state, same)
    assert len(rows.unique(dim=0)) == len(rows)


def test_what_cannot_run_data_parallel_is_refused_by_name(pool):
    for options, told in (
        (
            ("ft", None, None, 0.01, {"method": rank_cases.Alone()}),
            "method must be one that runs data parallel, got 'alone'",
        ),
        (("ft", None, None, 0.01, {"compile": True}), "compile must be False in a data parallel"),
        (("ft", None, None, 0.01, {"graphs": 4}), 'graphs must be "auto" or False'),
        (("ft", None, None, 0.01, {"batch_norm": "none"}), 'batch_norm must be "global"'),
    ):
        for name, words in refused(pool, rank_cases.tuned, *options):
            assert name == "ValueError"
            assert told in words


def test_a_launcher_without_a_group_is_noted(monkeypatch):
    assert alone_note("purify") is None
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "WORLD_SIZE is 3, but this process has no process group" in alone_note("purify")
