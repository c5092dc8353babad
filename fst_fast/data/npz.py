"""Reads ``.npz`` sets of encoded images; hostile ones run nothing and fill nothing."""

from __future__ import annotations

import itertools
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .decoding import check_regular

ARRAYS = ("encoded", "offsets", "labels", "classes")
# Encoded images shrink no further; labels and offsets do, and are small.
SPARE_BYTES = 2**28


@dataclass(frozen=True)
class Archive:
    """Encoded images, their labels [M] int64, and the name of each label."""

    files: list[bytes]
    labels: np.ndarray
    classes: tuple[str, ...]


def read_archive(path: Path) -> Archive:
    """Read and check an archive.

    A class without images is taken: small sets of many classes have some.

    Raises:
        ValueError: it is damaged, unpacks to more than twice its size and 256 MiB, holds pickled
            objects, or its arrays do not fit each other; names the file and the fault.
    """
    wanted = f"npz: {path} must be an .npz with {', '.join(ARRAYS[:3])} and {ARRAYS[3]}"
    try:
        size = check_regular(path, f"npz: {path}")
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked <= 2 * size + SPARE_BYTES:
            with np.load(path, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in ARRAYS}
    # zipfile, zlib and NumPy raise a dozen kinds of errors on damaged files.
    except Exception as error:
        raise ValueError(f"{wanted}: {type(error).__name__}: {str(error)[:200]}") from None
    if unpacked > 2 * size + SPARE_BYTES:
        raise ValueError(
            f"npz: {path} must unpack to at most twice its size and {SPARE_BYTES >> 20} MiB, got "
            f"{unpacked} bytes in a file of {size}; save it again with np.savez"
        )
    fault = _fault(**arrays)
    if fault:
        raise ValueError(f"npz: {path} must hold {fault}; save it again")
    encoded, offsets = arrays["encoded"], arrays["offsets"].tolist()
    files = [encoded[a:b].tobytes() for a, b in itertools.pairwise(offsets)]
    labels = arrays["labels"].astype(np.int64)
    return Archive(files, labels, tuple(map(str, arrays["classes"].tolist())))


def _fault(
    encoded: np.ndarray, offsets: np.ndarray, labels: np.ndarray, classes: np.ndarray
) -> str | None:
    """Return the first requirement that is not met, or None."""
    if encoded.dtype != np.uint8 or encoded.ndim != 1:
        return f"encoded as uint8 [bytes], got {_kind(encoded)}"
    if offsets.dtype.kind not in "iu" or offsets.ndim != 1 or len(offsets) < 2:
        return f"offsets as integers [images + 1], of one image or more, got {_kind(offsets)}"
    low, high = int(offsets.min()), int(offsets.max())
    if low < 0 or high > len(encoded) or (offsets[1:] <= offsets[:-1]).any():
        return (
            f"offsets that rise within encoded, 0..{len(encoded)}, got them from {low} to {high}"
            + ("" if (offsets[1:] > offsets[:-1]).all() else ", out of order")
        )
    if labels.dtype.kind not in "iu" or labels.shape != (len(offsets) - 1,):
        return f"labels as integers [{len(offsets) - 1}], one per image, got {_kind(labels)}"
    if classes.dtype.kind != "U" or classes.ndim != 1:
        return f"classes as text [classes], got {_kind(classes)}"
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= len(classes):
        return f"labels in 0..{len(classes) - 1}, one of its classes, got {low} to {high}"
    return None


def _kind(array: np.ndarray) -> str:
    return f"{array.dtype} {list(array.shape)}"
