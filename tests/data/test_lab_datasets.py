"""Datasets as bytes: every pixel and label is where it belongs, and bad files are told."""

import hashlib
import io
import pickle
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from fst_fast.data import image_sets
from fst_fast.data.image_sets import ImageSet


def make_set(count=20):
    images = torch.arange(count).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 2, 3, 3)
    return ImageSet(images, torch.arange(count) % 4, ("a", "b", "c", "d"))


def picture(seed, height=5, width=7, channels=3):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def png(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "png")
    return buffer.getvalue()


# Parts and statistics


@pytest.mark.parametrize("sizes", [(5, 7), (20,), (0, 20), (1, 2, 3), ()])
def test_parts_are_disjoint_and_together_everything(sizes):
    whole = make_set()
    parts = whole.split(*sizes, seed=1)
    rest = 20 - sum(sizes)
    assert [len(part) for part in parts] == [*sizes, *([rest] if rest else [])]
    seen = [int(image[0, 0, 0]) for part in parts for image in part.images]
    assert sorted(seen) == list(range(20))
    for part in parts:
        assert part.labels.tolist() == [int(image[0, 0, 0]) % 4 for image in part.images]
        assert part.classes == whole.classes


def test_the_seed_draws_the_parts():
    one, two, other = (make_set().split(10, seed=seed)[0].images for seed in (1, 1, 2))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert one[:, 0, 0, 0].tolist() != list(range(10))


@pytest.mark.parametrize("sizes", [(21,), (15, 6), (-1, 5)])
def test_impossible_parts_are_refused(sizes):
    with pytest.raises(ValueError, match="split: sizes must be >= 0 and sum to at most 20, got"):
        make_set().split(*sizes)


def test_subset_takes_positions_or_a_mask():
    whole = make_set()
    assert whole.subset(torch.tensor([3, 0])).images[:, 0, 0, 0].tolist() == [3, 0]
    assert len(whole.subset(whole.labels == 1)) == 5


def test_statistics_are_numpys_channel_by_channel():
    images = torch.from_numpy(np.stack([picture(seed) for seed in range(3)]))
    mean, std = ImageSet(images, torch.zeros(3).long(), ("a",)).statistics()
    pixels = images.numpy().astype(float).reshape(-1, 3) / 255
    assert mean == pytest.approx(pixels.mean(axis=0).tolist(), rel=1e-12)
    assert std == pytest.approx(pixels.std(axis=0, ddof=1).tolist(), rel=1e-12)


# Digits and CIFAR-10


def test_digits():
    raw = pytest.importorskip("sklearn.datasets").load_digits()
    data = image_sets.digits(8)  # the stored size: nothing is interpolated
    assert data.images.shape == (1797, 8, 8, 3)
    assert data.classes == tuple("0123456789")
    assert torch.equal(data.labels, torch.from_numpy(raw.target))
    expected = np.rint(raw.images * 255 / 16).astype(np.uint8)
    for channel in range(3):
        assert np.array_equal(data.images[..., channel].numpy(), expected)
    large = image_sets.digits()
    assert large.images.shape == (1797, 32, 32, 3)
    assert large.images.dtype == torch.uint8
    assert large.images.is_contiguous()
    assert (int(large.images.min()), int(large.images.max())) == (0, 255)


def write_batch(folder, name, content):
    """One file of CIFAR-10; returns torchvision's (name, MD5) of it."""
    data = pickle.dumps(content)
    (folder / name).write_bytes(data)
    return [name, hashlib.md5(data).hexdigest()]


def test_cifar10_reads_torchvisions_files(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    generator = np.random.default_rng(0)
    rows = generator.integers(0, 256, (3, 2, 3072), dtype=np.uint8)  # [file, image, CHW]
    files = [
        write_batch(folder, f"part{i}", {"data": row, "labels": [i, 9 - i]})
        for i, row in enumerate(rows)
    ]
    name, md5 = write_batch(folder, "batches.meta", {"label_names": list("abcdefghij")})
    monkeypatch.setattr(CIFAR10, "train_list", files[:2])
    monkeypatch.setattr(CIFAR10, "test_list", files[2:])
    monkeypatch.setattr(CIFAR10, "meta", {"filename": name, "key": "label_names", "md5": md5})
    training, test = image_sets.cifar10(tmp_path), image_sets.cifar10(tmp_path, train=False)
    expected = rows[:2].reshape(4, 3, 32, 32).transpose(0, 2, 3, 1)
    assert np.array_equal(training.images.numpy(), expected)
    assert training.labels.tolist() == [0, 9, 1, 8]
    assert training.classes == tuple("abcdefghij")
    assert (len(test), test.labels.tolist()) == (2, [2, 7])


# Folders


def write_folder(root, content):
    for name, data in content.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def test_a_folder_is_read_in_sorted_order(tmp_path):
    arrays = {name: picture(seed) for seed, name in enumerate(["zoo/b", "zoo/a", "10/x", "9/y"])}
    content = {f"{name}.png": png(array) for name, array in arrays.items()}
    data = image_sets.folder(write_folder(tmp_path, {**content, "zoo/notes.txt": b"no image"}))
    assert data.classes == ("10", "9", "zoo")
    assert data.labels.tolist() == [0, 1, 2, 2]
    expected = [arrays[name] for name in ("10/x", "9/y", "zoo/a", "zoo/b")]
    assert np.array_equal(data.images.numpy(), np.stack(expected))
    assert data.images.is_contiguous()


def test_grey_transparent_and_deep_pictures_become_rgb_bytes(tmp_path):
    grey, clear = picture(1, channels=1), picture(2, channels=4)
    deep = (picture(3, channels=1).astype(np.uint16) << 8) + 77
    content = {"a/1.png": png(grey), "a/2.png": png(clear), "a/3.png": png(deep)}
    images = image_sets.folder(write_folder(tmp_path, content)).images.numpy()
    assert images.dtype == np.uint8
    assert np.array_equal(images[0], np.stack([grey] * 3, axis=-1))
    assert np.array_equal(images[1], clear[..., :3])
    assert np.abs(images[2].astype(int) - deep[..., None] / 257).max() <= 1


def test_several_sizes_need_a_size(tmp_path):
    flat = np.full((20, 30, 3), 9, np.uint8)
    flat[:, :10] = 200  # cut away from the sides: the centre is columns 5..25
    content = {"a/1.png": png(flat), "a/2.png": png(picture(2, 10, 10))}
    write_folder(tmp_path, content)
    with pytest.raises(
        ValueError,
        match=r"one size, got \[20, 30, 3\] in .*1.png and \[10, 10, 3\] in .*2.png; pass size=",
    ):
        image_sets.folder(tmp_path)
    images = image_sets.folder(tmp_path, size=10).images
    assert images.shape == (2, 10, 10, 3)
    assert np.array_equal(images[1].numpy(), picture(2, 10, 10))  # of that size already: untouched
    assert (images[0, :, :2] > 150).all()
    assert (images[0, :, 4:] < 20).all()


WHOLE = png(picture(1))
DAMAGED = {
    "empty": b"",
    "text": b"not a picture",
    "truncated": WHOLE[:60],
    "header": WHOLE[:11] + b"\x03" + WHOLE[12:],  # Pillow: ValueError
    "chunk": WHOLE[: (at := WHOLE.index(b"IDAT")) - 1] + b"\x70" + WHOLE[at:],  # SyntaxError
    "huge": b"P6 900000 900000 255 ",  # DecompressionBombError
}


@pytest.mark.parametrize("data", DAMAGED.values(), ids=DAMAGED)
def test_a_file_that_is_no_picture_is_named(tmp_path, data):
    write_folder(tmp_path, {"a/1.png": png(picture(1)), "b/broken.png": data})
    with pytest.raises(
        ValueError, match=r"folder .*: image .*broken.png must be .*, got .*; remove"
    ):
        image_sets.folder(tmp_path)


def test_folders_without_pictures_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"one sub-folder of images per class, got .*nowhere"):
        image_sets.folder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="one sub-folder of images per class"):
        image_sets.folder(tmp_path)
    write_folder(tmp_path, {"a/1.png": png(picture(1)), "b/notes.txt": b""})
    with pytest.raises(ValueError, match=r"one sub-folder of images per class.* b"):
        image_sets.folder(tmp_path)


# Archives


def write_npz(path, files, **changed):
    arrays = {
        "encoded": np.frombuffer(b"".join(files), np.uint8),
        "offsets": np.cumsum([0, *(len(data) for data in files)]),
        "labels": np.arange(len(files), dtype=np.uint8) % 2,
        "classes": np.array(["cat", "dog"]),
    }
    arrays.update(changed)
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


def test_an_archive_round_trip(tmp_path):
    arrays = [picture(seed) for seed in range(3)]
    data = image_sets.npz(write_npz(tmp_path / "x.npz", [png(array) for array in arrays]))
    assert np.array_equal(data.images.numpy(), np.stack(arrays))
    assert data.labels.tolist() == [0, 1, 0]
    assert data.labels.dtype == torch.int64
    assert data.classes == ("cat", "dog")
    resized = image_sets.npz(tmp_path / "x.npz", size=4)
    assert resized.images.shape == (3, 4, 4, 3)


def test_an_archive_is_never_unpickled(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    trap = np.array([Trap()], dtype=object)
    for name in ("encoded", "offsets", "labels", "classes"):
        path = write_npz(tmp_path / "x.npz", [png(picture(1))], **{name: trap})
        with pytest.raises(ValueError, match=r"npz: .*x.npz must be an .npz .*allow_pickle"):
            image_sets.npz(path)
    (tmp_path / "y.npz").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ValueError, match=r"npz: .*y.npz must be an .npz"):
        image_sets.npz(tmp_path / "y.npz")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("name", ["encoded", "offsets", "labels", "classes"])
def test_a_missing_array_is_named(tmp_path, name):
    path = write_npz(tmp_path / "x.npz", [png(picture(1))], **{name: None})
    with pytest.raises(ValueError, match=rf"must be an .npz with encoded, .*: .*{name} is not"):
        image_sets.npz(path)


def test_files_that_are_no_archive_are_refused(tmp_path):
    whole = write_npz(tmp_path / "whole.npz", [png(picture(1))]).read_bytes()
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "truncated.npz").write_bytes(whole[:-40])
    (tmp_path / "empty.npz").write_bytes(b"")
    with zipfile.ZipFile(tmp_path / "other.npz", "w") as archive:
        archive.writestr("readme.txt", "no arrays")
    for name in ("array.npy", "truncated.npz", "empty.npz", "other.npz", "nowhere.npz"):
        with pytest.raises(ValueError, match=f"npz: .*{name} must be an .npz with encoded"):
            image_sets.npz(tmp_path / name)


def test_pictures_and_labels_of_an_archive_must_agree(tmp_path):
    files = [png(picture(1)), png(picture(2))]
    path = write_npz(tmp_path / "x.npz", files, labels=np.zeros(3, int))
    with pytest.raises(
        ValueError, match=r"labels as integers \[2\], one per image, got int64 \[3\]"
    ):
        image_sets.npz(path)
    path = write_npz(tmp_path / "x.npz", [files[0], b"no picture"])
    with pytest.raises(ValueError, match=r"npz .*: image 1 of .*x.npz must be an undamaged"):
        image_sets.npz(path)
    path = write_npz(tmp_path / "x.npz", [files[0], png(picture(3, 9, 9))])
    with pytest.raises(ValueError, match="images must have one size"):
        image_sets.npz(path)
