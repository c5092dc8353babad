"""resume=: a run that is ended goes on from its last whole epoch, to the same bits."""

import random
import time

import numpy as np
import pytest
import torch
from purify_cases import equal_states, make_batches, make_model, quick
from torch.utils.data import DataLoader, Dataset

import fst_fast
from fst_fast.tuning import step
from fst_fast.tuning.resume import NAME


class Noisy(Dataset):
    """Every image draws from all three random states."""

    def __init__(self):
        generator = torch.Generator().manual_seed(4)
        self.images = torch.randn(20, 3, 8, 8, generator=generator)
        self.labels = torch.arange(20) % 4

    def __len__(self):
        return 20

    def __getitem__(self, index):
        noise = random.random() + np.random.rand() + torch.rand(()).item()  # noqa: NPY002
        return self.images[index] + noise, self.labels[index]


def shuffled(generator=False):
    chosen = torch.Generator().manual_seed(9) if generator else None
    return DataLoader(Noisy(), batch_size=6, shuffle=True, generator=chosen)


def on_device():
    images = torch.randint(0, 256, (20, 8, 8, 3), generator=torch.Generator().manual_seed(4))
    return fst_fast.DeviceLoader(
        images.to(torch.uint8), torch.arange(20) % 4, 6, augment="cifar", seed=3
    )


LOADERS = {
    "list": make_batches,
    "DataLoader": shuffled,
    "own generator": lambda: shuffled(generator=True),
    "DeviceLoader": on_device,
}
METHODS = {
    "fst": {"alpha": 0.1},
    "auto": {"method": "fst_auto"},
    "ft": {"method": "ft"},
    "lp": {"method": "lp"},
}


class Stopped(Exception):  # noqa: N818
    pass


def stop_after(count):
    def callback(record, model):
        if record.epoch == count:
            raise Stopped

    return callback


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("loader", LOADERS)
def test_the_same_bits_wherever_it_was_ended(tmp_path, loader, method):
    settings = {"epochs": 4 if method != "auto" else 1, **METHODS[method]}
    whole = quick(make_model(), LOADERS[loader](), **settings)
    for ended in (1, 3):
        folder = tmp_path / str(ended)
        with pytest.raises(Stopped):
            quick(
                *(make_model(), LOADERS[loader]()),
                resume=folder,
                callbacks=[stop_after(ended)],
                **settings,
            )
        again = quick(make_model(), LOADERS[loader](), resume=folder, **settings)
        assert equal_states(again.model.state_dict(), whole.model.state_dict())
        mine, theirs = (
            [(r.epoch, r.loss, r.cosine) for r in run.history] for run in (again, whole)
        )
        assert mine == theirs
        assert again.head_shift == whole.head_shift
        assert list(folder.iterdir()) == [folder / NAME]


def test_a_run_that_has_ended_returns_at_once(tmp_path):
    first = quick(make_model(), make_batches(), resume=tmp_path)
    seen = []
    second = quick(
        make_model(), make_batches(), resume=tmp_path, callbacks=[lambda *r: seen.append(r)]
    )
    assert seen == []
    assert second.history == first.history
    assert equal_states(second.model.state_dict(), first.model.state_dict())


def test_keeping_a_run_changes_nothing(tmp_path):
    kept = quick(make_model(), shuffled(), resume=tmp_path / "run")
    plain = quick(make_model(), shuffled())
    assert equal_states(kept.model.state_dict(), plain.model.state_dict())


def test_the_head_that_steps_with_a_deferred_factor(tmp_path, monkeypatch):
    monkeypatch.setattr(step, "DEFERRED_FROM", 1)
    whole = quick(make_model(), make_batches(), alpha=0.1, epochs=3)
    with pytest.raises(Stopped):
        quick(
            *(make_model(), make_batches()),
            alpha=0.1,
            epochs=3,
            resume=tmp_path,
            callbacks=[stop_after(2)],
        )
    again = quick(make_model(), make_batches(), alpha=0.1, epochs=3, resume=tmp_path)
    assert equal_states(again.model.state_dict(), whole.model.state_dict())


def test_seconds_go_on(tmp_path):
    def slowly(record, model):
        time.sleep(0.05)
        stop_after(2)(record, model)

    with pytest.raises(Stopped):
        quick(make_model(), make_batches(), epochs=3, resume=tmp_path, callbacks=[slowly])
    again = quick(make_model(), make_batches(), epochs=3, resume=tmp_path)
    times = [record.seconds for record in again.history]
    assert times == sorted(times)
    assert times[-1] > 0.05


# What is refused


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, r"seed \(0 there, 1 here\)"),
        ({"lr": 0.02}, r"lr \(0.01 there, 0.02 here\)"),
        ({"epochs": 3}, r"epochs \(2 there, 3 here\)"),
        ({"alpha": 0.3}, r"alpha \(0.1 there, 0.3 here\)"),
        ({"method": "ft"}, r"alpha .*, method \(fst there, ft here\), project .*"),
    ],
)
def test_another_run_is_refused(tmp_path, change, named):
    settings = {"alpha": 0.1}
    quick(make_model(), make_batches(), resume=tmp_path, **settings)
    before = (tmp_path / NAME).read_bytes()
    changed = settings | change
    if change.get("method"):
        changed.pop("alpha")
    with pytest.raises(
        ValueError, match=rf"the same run, but .* differs in {named}; give this run"
    ):
        quick(make_model(), make_batches(), resume=tmp_path, **changed)
    assert (tmp_path / NAME).read_bytes() == before


def test_another_suspect_is_refused(tmp_path):
    quick(make_model(), make_batches(), resume=tmp_path)
    other = make_model()
    with torch.no_grad():
        other[0].weight[0, 0, 0, 0] += 1e-6
    with pytest.raises(
        ValueError,
        match=r"differs in model \(.{8}\.\.\. there, .* here\); give this run a folder of its own",
    ):
        quick(other, make_batches(), resume=tmp_path)


def test_every_flipped_byte_is_noticed(tmp_path):
    quick(make_model(), make_batches(), epochs=1, resume=tmp_path)
    path = tmp_path / NAME
    data = path.read_bytes()
    places = [*range(0, len(data), max(1, len(data) // 150)), len(data) - 1]
    for place in places:
        broken = bytearray(data)
        broken[place] ^= 0x10
        path.write_bytes(broken)
        with pytest.raises(
            ValueError, match=r"resume found a damaged or foreign|the same run, but"
        ):
            quick(make_model(), make_batches(), epochs=1, resume=tmp_path)
    for cut in (0, 5, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:cut])
        with pytest.raises(ValueError, match=r"damaged or foreign .*remove it to start anew"):
            quick(make_model(), make_batches(), epochs=1, resume=tmp_path)


def test_a_file_is_no_folder(tmp_path):
    path = tmp_path / "run"
    path.write_text("")
    with pytest.raises(ValueError, match=r"resume must be a folder, got the file .*run; name a"):
        quick(make_model(), make_batches(), resume=path)


def test_a_full_disk_leaves_the_last_epoch(tmp_path, monkeypatch):
    def full(path, data):
        if len(epochs) == 2:
            raise OSError(28, "No space left on device")
        epochs.append(1)
        return real(path, data)

    epochs, real = [], fst_fast.tuning.resume.replace_file
    monkeypatch.setattr(fst_fast.tuning.resume, "replace_file", full)
    with pytest.raises(OSError, match="No space left"):
        quick(make_model(), make_batches(), epochs=4, resume=tmp_path)
    monkeypatch.undo()
    again = quick(make_model(), make_batches(), epochs=4, resume=tmp_path)
    whole = quick(make_model(), make_batches(), epochs=4)
    assert equal_states(again.model.state_dict(), whole.model.state_dict())
