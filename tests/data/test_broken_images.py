"""Broken, hostile and unusual images: each kind has one fate, and every error names its file."""

import io
import os
import random
import warnings

import numpy as np
import pytest
from hostile import images, pictures, records
from PIL import Image, ImageFile, ImageOps
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from fst_fast.data import decoding, image_sets, npz
from fst_fast.data.decoding import ImageError, decode
from fst_fast.data.torch_pipeline.lift import lift

WHOLE, REFUSED = pictures.whole(), pictures.refused()
PNG = WHOLE["png"]


def write(root, name, data=PNG):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def by_pillow(data):
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


# What is taken


@pytest.mark.parametrize("name", [n for n in WHOLE if "16" not in n])
def test_whole_files_are_what_pillow_makes_of_them(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = np.asarray(decode(WHOLE[name], name))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert np.array_equal(got, by_pillow(WHOLE[name]))


@pytest.mark.parametrize("name", ["png 16 bits", "tiff 16 bits"])
def test_of_16_bits_the_upper_8_are_kept(name):
    with Image.open(io.BytesIO(WHOLE[name])) as image:
        deep = np.asarray(image)
    got = np.asarray(decode(WHOLE[name], name))
    assert np.array_equal(got, np.repeat((deep >> 8)[..., None], 3, axis=-1))
    with pytest.raises(ImageError, match=r"16 bits.png must be of 8 bits .* clip to white"):
        decode(WHOLE[name], "16 bits.png", deep=False)


@pytest.mark.parametrize("kind", ["PNG", "GIF", "TIFF", "WEBP"])
def test_of_several_pictures_the_first_is_taken(kind):
    first, second = (Image.new("RGB", (9, 9), colour) for colour in ("red", "blue"))
    data = pictures.encoded(first, kind, save_all=True, append_images=[second], lossless=True)
    with Image.open(io.BytesIO(data)) as image:
        assert image.n_frames == 2
    assert np.array_equal(np.asarray(decode(data, "x")), np.asarray(first))


def test_an_orientation_is_not_applied():
    with Image.open(io.BytesIO(WHOLE["jpeg turned"])) as image:
        upright = np.asarray(ImageOps.exif_transpose(image))
    assert not np.array_equal(np.asarray(decode(WHOLE["jpeg turned"], "x")), upright)


def test_colours_beneath_transparency_stay():
    clear = np.asarray(Image.open(io.BytesIO(WHOLE["png transparent"])))
    assert clear.shape[-1] == 4
    assert np.array_equal(np.asarray(decode(WHOLE["png transparent"], "x")), clear[..., :3])


@pytest.mark.parametrize("name", ["été", "画像", "a\nb", "\x1b[31m", os.fsdecode(b"\xff\xfe")])
def test_any_name_is_read_and_printed(tmp_path, name):
    path = write(tmp_path, f"{name}/{name}.png")
    assert image_sets.folder(tmp_path).classes == (name,)
    path.write_bytes(PNG[:50])
    with pytest.raises(ValueError, match=r"\.png") as raised:
        image_sets.folder(tmp_path)
    assert str(raised.value).split(": image ")[1].isprintable()


# What is refused


@pytest.mark.parametrize("name", REFUSED)
def test_what_must_be_refused_names_the_file_and_the_fault(tmp_path, name):
    data, said = REFUSED[name]
    write(tmp_path, "cat/broken.png", data)
    for read in (image_sets.folder, lifted):
        with pytest.raises(ValueError, match=r"cat/broken\.png must be") as raised:
            read(tmp_path)
        if "bits" not in name:
            assert raised.match(said)
        assert raised.match("skip_corrupt=True")


def must_not_run(*arguments, **options):
    raise AssertionError("this must not run")


@pytest.mark.parametrize("name", [n for n in REFUSED if n.startswith(("bomb", "strip"))])
def test_of_bombs_no_pixel_is_decoded(name, monkeypatch):
    monkeypatch.setattr(ImageFile.ImageFile, "load", must_not_run)
    data, said = REFUSED[name]
    with pytest.raises(ImageError, match=said):
        decode(data, name)


def lifted(root, **options):
    return lift(DataLoader(ImageFolder(root, transforms.ToTensor())), **options)


def test_corrupt_images_are_left_out_and_counted(tmp_path):
    for i, (data, _) in enumerate(REFUSED.values()):
        write(tmp_path, f"{'ab'[i % 2]}/{i}.png", data)
    for i, name in enumerate("aba"):
        write(tmp_path, f"{name}/whole{i}.png")
    for read in (image_sets.folder, lifted):
        with pytest.warns(UserWarning, match=f"left out {len(REFUSED)} of {len(REFUSED) + 3} im"):
            data = read(tmp_path, skip_corrupt=True)
        assert data.labels.tolist() == [0, 0, 1]
        assert np.array_equal(data.images.numpy(), np.stack([by_pillow(PNG)] * 3))
    for path in tmp_path.glob("*/whole*.png"):
        path.unlink()
    with pytest.raises(ValueError, match=f"none of the {len(REFUSED)} images can be read"):
        image_sets.folder(tmp_path, skip_corrupt=True)


def test_pillows_own_limit_is_the_limit(monkeypatch):
    side = pictures.SIDE
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", side * side)
    decode(PNG, "x")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", side * side - 1)
    with pytest.raises(ImageError, match=f"at most {side * side - 1} pixels, got {side} x {side}"):
        decode(PNG, "x")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    decode(PNG, "x")


def test_postscript_reaches_no_interpreter(tmp_path, monkeypatch):
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", must_not_run)
    write(tmp_path, "a/1.png", REFUSED["postscript"][0])
    for read in (image_sets.folder, lifted):
        with pytest.raises(ValueError, match="got none of these"):
            read(tmp_path)


def test_a_file_of_gigabytes_is_not_read(tmp_path):
    path = write(tmp_path, "a/1.png", WHOLE["webp"])
    os.truncate(path, decoding.LARGEST_BYTES + 1)  # sparse
    with pytest.raises(ValueError, match=r"1\.png must be a file of at most 1 GiB, got 1\.0 GiB"):
        image_sets.folder(tmp_path)


@pytest.mark.skipif(os.name != "posix", reason="needs pipes and links")
def test_what_is_no_file_does_not_hang(tmp_path):
    write(tmp_path, "a/1.png")
    (tmp_path / "a" / "folder.png").mkdir()  # passed over, as torchvision does
    assert len(image_sets.folder(tmp_path)) == 1
    path = tmp_path / "a" / "2.png"
    for make, got in (
        (lambda: os.mkfifo(path), "regular file, got a pipe, socket or device"),
        (lambda: path.symlink_to("/dev/zero"), "regular file, got a pipe, socket or device"),
        (lambda: path.symlink_to(tmp_path / "nowhere"), "FileNotFoundError"),
    ):
        make()
        for read in (image_sets.folder, lifted):
            with pytest.raises(ValueError, match=rf"2\.png must be .*{got}"):
                read(tmp_path)
        path.unlink()


@pytest.mark.skipif(os.name != "posix", reason="needs links")
@pytest.mark.parametrize("target", [".", "..", "../b"])
def test_a_folder_reached_twice_is_told(tmp_path, target):
    write(tmp_path, "a/1.png")
    write(tmp_path, "b/1.png")
    (tmp_path / "a" / "again").symlink_to(target, target_is_directory=True)
    with pytest.raises(ValueError, match=r"must be reached once, got a link to .*; remove the l"):
        image_sets.folder(tmp_path)


def test_a_file_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    def refuse(path, *arguments):
        raise PermissionError(13, "Permission denied", str(path))

    write(tmp_path, "a/1.png")
    # The superuser may read everything.
    monkeypatch.setattr("pathlib.Path.open", refuse)
    with pytest.raises(ValueError, match=r"a/1\.png must be .* got PermissionError"):
        image_sets.folder(tmp_path)


# Archives


def save(path, **changed):
    files = [PNG] * 4
    good = {
        "encoded": np.frombuffer(b"".join(files), np.uint8),
        "offsets": np.arange(5) * len(PNG),
        "labels": np.array([0, 2, 2, 0]),
        "classes": np.array(["cat", "dog", "eel"]),
    }
    np.savez_compressed(path, **{**good, **changed})
    return path


SIZE = len(PNG)
ARCHIVES = {
    "encoded of floats": (
        {"encoded": np.zeros(9)},
        r"encoded as uint8 .* got float64 \[9\]",
    ),
    "offsets of floats": ({"offsets": np.arange(5.0)}, "offsets as integers .* got float64"),
    "no images": ({"offsets": np.zeros(1, int)}, "one image or more, got int64"),
    "offsets out of order": (
        {"offsets": np.array([0, 2, 1, 3, 4]) * SIZE},
        r"rise within encoded, 0\.\.\d+, got them from 0 to .*, out of order",
    ),
    "an empty image": ({"offsets": np.array([0, 1, 1, 3, 4]) * SIZE}, "out of order"),
    "offsets beyond": ({"offsets": np.arange(5) * SIZE * 2}, "got them from 0 to"),
    "negative offsets": ({"offsets": np.arange(-1, 4) * SIZE}, "got them from -"),
    "too few labels": ({"labels": np.zeros(3, int)}, r"\[4\], one per image, got int64 \[3\]"),
    "labels of floats": ({"labels": np.zeros(4)}, "labels as integers"),
    "label too high": ({"labels": np.array([0, 1, 3, 0])}, r"labels in 0\.\.2, .* got 0 to 3"),
    "negative label": ({"labels": np.array([0, 1, -1, 0])}, r"labels in 0\.\.2, .* got -1 to 1"),
    "largest label": (
        {"labels": np.array([0, 1, 2**64 - 1, 0], np.uint64)},
        r"labels in 0\.\.2, .* got 0 to 18446744073709551615",
    ),
    "classes of bytes": ({"classes": np.array([b"a", b"b"])}, "classes as text"),
    "no classes": ({"classes": np.array([], "U1")}, r"labels in 0\.\.-1"),
}


@pytest.mark.parametrize(("changed", "said"), ARCHIVES.values(), ids=ARCHIVES)
def test_arrays_that_do_not_fit_are_told(tmp_path, changed, said):
    with pytest.raises(ValueError, match=rf"npz: .*x\.npz must hold .*{said}.*; save it again"):
        image_sets.npz(save(tmp_path / "x.npz", **changed))


def test_a_class_may_have_no_images_and_bad_ones_are_left_out(tmp_path):
    broken = np.frombuffer(PNG + PNG[:-40] + bytes(40) + PNG * 2, np.uint8)
    path = save(tmp_path / "x.npz", encoded=broken)
    with pytest.raises(ValueError, match=r"image 1 of .*x\.npz must be an undamaged"):
        image_sets.npz(path)
    with pytest.warns(UserWarning, match=r"x\.npz: left out 1 of 4"):
        data = image_sets.npz(path, skip_corrupt=True)
    assert data.labels.tolist() == [0, 2, 0]
    assert data.classes == ("cat", "dog", "eel")


def test_an_archive_that_unpacks_to_more_is_not_unpacked(tmp_path, monkeypatch):
    path = save(tmp_path / "x.npz", encoded=np.zeros(10**6, np.uint8))
    size = path.stat().st_size
    assert size < 10**4
    monkeypatch.setattr(npz, "SPARE_BYTES", 10**5)
    monkeypatch.setattr(np, "load", must_not_run)
    with pytest.raises(ValueError, match=rf"x\.npz must unpack .* got 100\d+ .* file of {size}; s"):
        image_sets.npz(path)


# Broken at random


def test_at_random_a_part_of_make_hostile():
    table = images.rows(full=False)
    assert [row for row in table if not records.within(row)] == []
    assert sum(row["count"] for row in table) > 200


def test_the_trials_are_not_idle(tmp_path):
    """Both fates occur often; a reader that fails otherwise, or names no file, is found."""
    outcomes = list(images.broken_folders(60, tmp_path))
    assert min(outcomes.count("read"), outcomes.count("refused")) > 10

    def nameless(root):
        try:
            return image_sets.folder(root)
        except ValueError:
            raise ValueError("broken") from None

    def wrongly(root):
        raise KeyError

    for reader, count in ((nameless, outcomes.count("refused")), (wrongly, 60)):
        root = tmp_path / reader.__name__
        root.mkdir()
        _, found = images.wrong(images.broken_folders(60, root, reader))
        assert len(found) == count


def test_mutations_are_drawn_from_the_seed():
    files = list(WHOLE.values())
    one, two = ([pictures.mutated(random.Random(s), files) for s in range(20)] for _ in range(2))
    assert one == two
    assert len(set(one)) > 15
