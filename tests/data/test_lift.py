"""DataLoaders taken apart: the bytes and settings found must make the loader's own batches."""

import itertools
import pickle
import re
import warnings

import numpy as np
import pytest
import torch
from check import assert_same_bits
from PIL import Image
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)
from torchvision import datasets
from torchvision import transforms as v1
from torchvision.transforms import v2

from fst_fast.data.torch_pipeline import datasets as lifted_datasets
from fst_fast.data.torch_pipeline.lift import Lifted, lift

CIFAR = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
V1 = v1.Compose([v1.ToTensor(), v1.Normalize(*CIFAR)])
V2 = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(*IMAGENET)])


def noise(*shape):
    return np.random.default_rng(sum(shape)).integers(0, 256, shape, dtype=np.uint8)


def make_cifar(root, monkeypatch, kind=datasets.CIFAR10, transform=V1, per_file=5):
    """The dataset's own class on files in its own format."""
    folder = root / kind.base_folder
    folder.mkdir(parents=True, exist_ok=True)
    key = "labels" if kind is datasets.CIFAR10 else "fine_labels"
    for i, (name, _) in enumerate(kind.train_list):
        entry = {"data": noise(per_file, 3072 + i)[:, :3072], key: [i, 1, 2, 3, 9][:per_file]}
        (folder / name).write_bytes(pickle.dumps(entry))
    monkeypatch.setattr(kind, "_check_integrity", lambda self: True)
    monkeypatch.setattr(kind, "_load_meta", lambda self: None)
    return kind(root, transform=transform)


def make_gtsrb(root, transform):
    for label, size in [(0, (15, 20)), (1, (33, 27)), (7, (32, 32))]:
        folder = root / "gtsrb" / "GTSRB" / "Training" / f"{label:05d}"
        folder.mkdir(parents=True)
        for i in range(2):
            Image.fromarray(noise(*size, 3)).rotate(i).save(folder / f"{i}.ppm")
    return datasets.GTSRB(root, transform=transform)


def make_folder(root, transform, **options):
    sizes = {"cat": [(40, 30), (31, 64)], "dog": [(50, 50), (37, 41), (30, 30)]}
    for name, shapes in sizes.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for i, shape in enumerate(shapes):
            Image.fromarray(noise(*shape, 3)).save(root / name / f"{i}.{'png' if i else 'jpg'}")
    Image.fromarray(noise(40, 40)).save(root / "dog" / "grey.png")
    Image.fromarray(noise(40, 44, 4)).save(root / "dog" / "rgba.png")
    return datasets.ImageFolder(root, transform=transform, **options)


def make_tensors(count=9, channels=3, size=6):
    images = torch.from_numpy(noise(count, channels, size, size)).float().div(255)
    return TensorDataset(images, torch.arange(count))


def assert_same_batches(loader, **options):
    """The loader's batches are the lifted bytes looked up in the lifted table."""
    lifted = lift(loader, **options)
    assert isinstance(lifted, Lifted), lifted
    assert lifted.images.dtype == torch.uint8
    assert lifted.labels.dtype == torch.int64
    start = 0
    for images, labels in loader:
        rows = slice(start, start + len(labels))
        stored = lifted.images[rows].permute(0, 3, 1, 2).long()
        got = torch.stack([table[stored[:, c]] for c, table in enumerate(lifted.lut)], dim=1)
        assert_same_bits(got, images.as_subclass(torch.Tensor), name="batch")
        assert_same_bits(lifted.labels[rows], labels.long(), name="labels")
        start += lifted.batch_size
    assert len(lifted.images) == len(lifted.labels) == len(loader.dataset)
    return lifted


def cifar10_v1(root, monkeypatch):
    return make_cifar(root, monkeypatch)


def cifar100_v2(root, monkeypatch):
    return make_cifar(root, monkeypatch, datasets.CIFAR100, V2)


def gtsrb_resized(root, monkeypatch):
    return make_gtsrb(root, v1.Compose([v1.Resize((32, 32)), *V1.transforms]))


def folder_cropped(root, monkeypatch):
    steps = [v2.Resize(32), v2.CenterCrop(28), *V2.transforms]
    return make_folder(root, v2.Compose(steps))


def folder_resized_as_tensor(root, monkeypatch):
    image, *values = V2.transforms
    return make_folder(root, v2.Compose([image, v2.Resize((24, 20), antialias=True), *values]))


def tensor_subset(root, monkeypatch):
    return Subset(Subset(make_tensors(), [8, 2, 5, 0, -2, 2]), range(1, 6))


def tensors_scaled_by_v2(root, monkeypatch):
    stored = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    return TensorDataset(v2.ToDtype(torch.float32, scale=True)(stored), torch.zeros(1).int())


def pil_to_tensor(root, monkeypatch):
    steps = [v1.PILToTensor(), v1.ConvertImageDtype(torch.float32), v1.Normalize(0.5, 0.25)]
    return make_cifar(root, monkeypatch, transform=v1.Compose(steps))


def grey_cifar(root, monkeypatch):
    return make_cifar(root, monkeypatch, transform=v1.Compose([v1.Grayscale(), v1.ToTensor()]))


def joined(root, monkeypatch):
    cifar = make_cifar(root / "c", monkeypatch)
    signs = make_gtsrb(root, v1.Compose([v1.Resize((32, 32)), V1]))
    return Subset(ConcatDataset([cifar, signs, cifar]), [30, 3, 26, 55, 25, 0])


def mnist(root, monkeypatch):
    monkeypatch.setattr(datasets.FashionMNIST, "_check_exists", lambda self: True)
    images = torch.from_numpy(noise(4, 28, 28))
    monkeypatch.setattr(datasets.MNIST, "_load_data", lambda self: (images, torch.arange(4)))
    return datasets.FashionMNIST(root, transform=v1.Compose([v1.ToTensor()]))


PIPELINES = [
    cifar10_v1,
    cifar100_v2,
    gtsrb_resized,
    folder_cropped,
    folder_resized_as_tensor,
    tensor_subset,
    tensors_scaled_by_v2,
    pil_to_tensor,
    grey_cifar,
    joined,
    mnist,
]


@pytest.mark.parametrize("make", PIPELINES, ids=lambda make: make.__name__)
def test_the_loaders_batches_to_the_last_bit(make, tmp_path, monkeypatch):
    dataset = make(tmp_path, monkeypatch)
    before = dict(vars(dataset))
    lifted = assert_same_batches(DataLoader(dataset, batch_size=4))
    assert (lifted.pad, lifted.flip, lifted.shuffle, lifted.drop_last) == (0, False, False, False)
    assert all(vars(dataset)[name] is value for name, value in before.items())


def test_bytes_in_tensors_stand_for_0_to_1():
    stored = torch.from_numpy(noise(5, 1, 4, 4))
    lifted = lift(DataLoader(TensorDataset(stored, torch.arange(5).short()), batch_size=2))
    assert torch.equal(lifted.images, stored.permute(0, 2, 3, 1))
    assert_same_bits(lifted.lut, torch.arange(256)[None] / 255, name="lut")
    assert lifted.labels.tolist() == [0, 1, 2, 3, 4]


def test_lifting_copies_so_that_later_changes_do_not_leak(tmp_path, monkeypatch):
    dataset = make_cifar(tmp_path, monkeypatch)
    lifted = lift(DataLoader(dataset))
    before = dataset.data.copy()
    lifted.images.zero_()
    assert np.array_equal(dataset.data, before)


@pytest.mark.parametrize("normalize", [CIFAR, (0.5, 0.25), None], ids=["three", "one", "none"])
def test_normalize_is_told_per_channel(normalize, tmp_path, monkeypatch):
    steps = [v1.ToTensor()] + ([v1.Normalize(*normalize)] if normalize else [])
    dataset = make_cifar(tmp_path, monkeypatch, transform=v1.Compose(steps))
    got = assert_same_batches(DataLoader(dataset)).normalize
    if normalize is None:
        assert got is None
    else:
        for values, expected in zip(got, normalize, strict=True):
            assert values == pytest.approx(np.broadcast_to(expected, 3).tolist())


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("drop_last", [True, False])
def test_the_loaders_settings_are_found(shuffle, drop_last):
    loader = DataLoader(make_tensors(), 5, shuffle=shuffle, drop_last=drop_last)
    lifted = lift(loader)
    assert (lifted.batch_size, lifted.shuffle, lifted.drop_last) == (5, shuffle, drop_last)


def augmented(*random, version=v1):
    return version.Compose([*random, *(V1 if version is v1 else V2).transforms])


AUGMENTED = {
    "v1": (augmented(v1.RandomCrop(32, 4), v1.RandomHorizontalFlip()), 4, True),
    "v2": (augmented(v2.RandomCrop(32, 4), v2.RandomHorizontalFlip(), version=v2), 4, True),
    "flip first": (augmented(v1.RandomHorizontalFlip(), v1.RandomCrop(32, (2, 2))), 2, True),
    "crop only": (augmented(v1.RandomCrop((32, 32), padding=1)), 1, False),
    "flip only": (augmented(v1.RandomHorizontalFlip()), 0, True),
    "no flip": (augmented(v1.RandomCrop(32), v1.RandomHorizontalFlip(p=0)), 0, False),
    "on floats": (
        v1.Compose([v1.ToTensor(), v1.RandomCrop(32, 1), v1.Normalize(*CIFAR)]),
        1,
        False,
    ),
    "flip last": (v1.Compose([V1, v1.RandomHorizontalFlip()]), 0, True),
    "between conversions": (
        v2.Compose([v2.ToImage(), v2.RandomCrop(32, 1), *V2.transforms[1:]]),
        1,
        False,
    ),
}


def outcomes(lifted):
    """Every crop and flip that the settings allow, looked up: a list of [C, H, W]."""
    image, pad = lifted.images[0].permute(2, 0, 1), lifted.pad
    height, width = image.shape[1:]
    padded = torch.nn.functional.pad(image, [pad] * 4)
    steps = range(2 * pad + 1)
    for row, column, flip in itertools.product(steps, steps, {False, lifted.flip}):
        crop = padded[:, row : row + height, column : column + width].long()
        crop = crop.flip(-1) if flip else crop
        yield torch.stack([table[crop[c]] for c, table in enumerate(lifted.lut)])


@pytest.mark.parametrize(("transform", "pad", "flip"), AUGMENTED.values(), ids=AUGMENTED)
def test_random_steps_are_found_and_make_the_same_images(
    transform, pad, flip, tmp_path, monkeypatch
):
    dataset = make_cifar(tmp_path, monkeypatch, transform=transform)
    one = Subset(dataset, [3])
    lifted = lift(DataLoader(one, batch_size=1))
    assert (lifted.pad, lifted.flip) == (pad, flip)
    torch.manual_seed(0)
    allowed = {made.numpy().tobytes() for made in outcomes(lifted)}
    draws = 300 if pad < 4 else 1000
    seen = {one[0][0].numpy().tobytes() for _ in range(draws)}
    assert seen <= allowed
    # 162 outcomes at most, so that 1,000 draws miss one of them in about a third of all runs.
    assert len(seen) >= 0.97 * len(allowed)


class Stream(IterableDataset):
    def __iter__(self):
        yield torch.zeros(3, 2, 2), 0


class Changed(datasets.FakeData):
    pass


class ChangedTensors(TensorDataset):
    def __getitem__(self, index):
        return super().__getitem__(index)


class ChangedLoader(DataLoader):
    def __iter__(self):
        return super().__iter__()


class ChangedSubset(Subset):
    def __getitems__(self, indices):
        return super().__getitems__(indices)


TENSORS = make_tensors()
LOADERS = {
    "a list": ([], "loader list is not a torch DataLoader"),
    "subclass": (ChangedLoader(TENSORS), "ChangedLoader is not a torch DataLoader"),
    "stream": (DataLoader(Stream()), "the dataset is iterable"),
    "own batches": (
        DataLoader(TENSORS, batch_sampler=BatchSampler(SequentialSampler(TENSORS), 2, False)),
        "batch_sampler is not the default one",
    ),
    "no batches": (DataLoader(TENSORS, batch_size=None), "batch_sampler is not the default"),
    "collate": (DataLoader(TENSORS, collate_fn=lambda b: b), "collate_fn <lambda> is not"),
    "weighted": (
        DataLoader(TENSORS, sampler=WeightedRandomSampler([1.0] * 9, 9)),
        "WeightedRandomSampler is not recognised",
    ),
    "distributed": (
        DataLoader(
            TENSORS, sampler=torch.utils.data.DistributedSampler(TENSORS, num_replicas=2, rank=0)
        ),
        "DistributedSampler is not recognised",
    ),
    "replacement": (
        DataLoader(TENSORS, sampler=RandomSampler(TENSORS, replacement=True)),
        "with replacement",
    ),
    "part": (DataLoader(TENSORS, sampler=RandomSampler(TENSORS, num_samples=4)), "draws 4 of 9"),
    "other dataset": (DataLoader(Changed(5, transform=V1)), "Changed is not recognised.*CIFAR10"),
    "other getitem": (DataLoader(ChangedTensors(*TENSORS.tensors)), "ChangedTensors is not rec"),
    "other subset": (DataLoader(ChangedSubset(TENSORS, [0])), "ChangedSubset is not recognised"),
    "mask": (DataLoader(Subset(TENSORS, torch.ones(9).bool())), "indices of bool"),
    "beyond": (DataLoader(Subset(TENSORS, [9])), "indices beyond its 9 images"),
    "empty": (DataLoader(Subset(TENSORS, [])), "the dataset is empty"),
    "one tensor": (DataLoader(TensorDataset(TENSORS.tensors[0])), "holds 1 tensors"),
    "normalised": (
        DataLoader(TensorDataset(TENSORS.tensors[0] - 0.1, TENSORS.tensors[1])),
        "multiples of 1/255",
    ),
    "not bytes": (
        DataLoader(TensorDataset(TENSORS.tensors[0] * 0.999, TENSORS.tensors[1])),
        "multiples of 1/255",
    ),
    "float64": (
        DataLoader(TensorDataset(TENSORS.tensors[0].double(), TENSORS.tensors[1])),
        "torch.float64 images",
    ),
    "vectors": (
        DataLoader(TensorDataset(torch.zeros(3, 5), torch.zeros(3).long())),
        r"holds images \[3, 5\]",
    ),
    "negative": (
        DataLoader(TensorDataset(TENSORS.tensors[0], torch.arange(9) - 1)),
        "labels go from -1 to 7",
    ),
    "soft labels": (
        DataLoader(TensorDataset(TENSORS.tensors[0], torch.rand(9))),
        r"labels are float32 \[9\]",
    ),
    "sizes": (
        DataLoader(ConcatDataset([TENSORS, make_tensors(size=7)])),
        r"images differ in size, \[6, 6, 3\] and \[7, 7, 3\]",
    ),
}


@pytest.mark.parametrize(("loader", "reason"), LOADERS.values(), ids=LOADERS)
def test_loaders_and_datasets_that_are_not_recognised(loader, reason):
    got = lift(loader)
    assert isinstance(got, str)
    assert re.search(reason, got), got
    assert "\n" not in got


class ChangedCrop(v1.RandomCrop):
    pass


TRANSFORMS = {
    "rotation": (augmented(v1.RandomRotation(5)), "RandomRotation is not recognised.*ToTensor"),
    "subclass": (augmented(ChangedCrop(32)), "ChangedCrop is not recognised"),
    "apply": (augmented(v1.RandomApply([v1.RandomHorizontalFlip()])), "RandomApply is not"),
    "jitter": (augmented(v2.ColorJitter(0.1), version=v2), "ColorJitter is not recognised"),
    "resized crop": (augmented(v1.RandomResizedCrop(32)), "RandomResizedCrop is not recognised"),
    "function": (lambda image: image, "<lambda> is not recognised"),
    "none": (None, "has no transform"),
    "bytes": (v2.ToImage(), "ends without floats"),
    "small crop": (augmented(v1.RandomCrop(24)), r"cuts \[24, 24\] from images of \[32, 32\]"),
    "sides": (augmented(v1.RandomCrop(32, (1, 2))), "padding .*1, 2.*same on all sides"),
    "fill": (augmented(v1.RandomCrop(32, 4, fill=9)), "fills with 9; expected 0"),
    "fill v2": (augmented(v2.RandomCrop(32, 4, fill=(0, 0, 9))), "fills with .*; expected 0"),
    "reflect": (augmented(v1.RandomCrop(32, 4, padding_mode="reflect")), "pads by 'reflect'"),
    "two crops": (augmented(v1.RandomCrop(32, 4), v1.RandomCrop(32, 4)), "RandomCrop .*twice"),
    "late pad": (v1.Compose([V1, v1.RandomCrop(32, 4)]), "pads after Normalize"),
    "often": (augmented(v1.RandomHorizontalFlip(0.7)), "p=0.7; expected 0.5"),
    "late resize": (augmented(v1.RandomCrop(32, 4), v1.Resize(16)), "Resize follows a random"),
    "float resize": (v1.Compose([V1, v1.Resize(16)]), "Resize works on floats"),
    "two norms": (v1.Compose([V1, v1.Normalize(*CIFAR)]), "Normalize stands there twice"),
    "half": (v2.Compose([v2.ToImage(), v2.ToDtype(torch.float16, scale=True)]), "float16"),
    "unscaled": (v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32)]), "give it scale=True"),
    "channels": (
        v1.Compose([v1.ToTensor(), v1.Normalize([0.5] * 4, [0.5] * 4)]),
        "fails on images of 3 channels",
    ),
}


@pytest.mark.parametrize(("transform", "reason"), TRANSFORMS.values(), ids=TRANSFORMS)
def test_transforms_that_are_not_recognised(transform, reason, tmp_path, monkeypatch):
    dataset = make_cifar(tmp_path, monkeypatch, transform=transform)
    got = lift(DataLoader(dataset))
    assert isinstance(got, str)
    assert re.search(reason, got), got
    assert "\n" not in got


def test_other_reasons_that_only_the_dataset_shows(tmp_path, monkeypatch):
    dataset = make_cifar(tmp_path, monkeypatch)
    dataset.target_transform = lambda label: label
    assert "target_transform <lambda> may draw" in lift(DataLoader(dataset))
    mixed = make_folder(tmp_path / "f", V1)
    assert "images differ in size, [40, 30, 3] and [31, 64, 3]" in lift(DataLoader(mixed))
    own = make_folder(tmp_path / "f", V1, loader=lambda path: Image.open(path))
    assert "image loader <lambda> is not recognised" in lift(DataLoader(own))
    other = make_cifar(tmp_path, monkeypatch, transform=V2)
    one = make_cifar(tmp_path, monkeypatch)
    assert "different transforms" in lift(DataLoader(ConcatDataset([one, other])))


def test_images_that_do_not_fit_in_memory_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(lifted_datasets, "_available_bytes", lambda: 10_000)
    assert "the images need" in lift(DataLoader(make_cifar(tmp_path, monkeypatch)))
    assert "the images need" in lift(DataLoader(gtsrb_resized(tmp_path, monkeypatch)))
    assert isinstance(lift(DataLoader(make_tensors(2))), Lifted)


@pytest.mark.parametrize("damage", ["truncated", "no image", "missing"])
def test_a_corrupt_file_is_named_or_left_out_with_one_warning(damage, tmp_path, monkeypatch):
    dataset = folder_cropped(tmp_path, monkeypatch)
    whole = lift(DataLoader(dataset))
    hurt = tmp_path / "dog" / "0.jpg"
    if damage == "missing":
        hurt.unlink()
    else:
        hurt.write_bytes(hurt.read_bytes()[:300] if damage == "truncated" else b"hello")
    with pytest.raises(ValueError, match=r"dog/0\.jpg must be an undamaged .* skip_corrupt=True"):
        lift(DataLoader(dataset))
    with pytest.warns(UserWarning, match="left out 1 of 7 images") as warned:
        lifted = lift(DataLoader(dataset), skip_corrupt=True)
    assert len(warned) == 1
    kept = [i for i, (path, _) in enumerate(dataset.samples) if path != str(hurt)]
    assert torch.equal(lifted.images, whole.images[kept])
    assert torch.equal(lifted.labels, whole.labels[kept])


def test_nothing_but_corrupt_files_is_an_error_even_on_request(tmp_path, monkeypatch):
    dataset = folder_cropped(tmp_path, monkeypatch)
    for path, _ in dataset.samples:
        open(path, "wb").close()
    with pytest.raises(ValueError, match="none of the 7 images can be read"):
        lift(DataLoader(dataset), skip_corrupt=True)


def test_skipping_without_damage_warns_of_nothing(tmp_path, monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loader = DataLoader(folder_cropped(tmp_path, monkeypatch), batch_size=3)
        assert_same_batches(loader, skip_corrupt=True)
