"""Small files that claim to be huge, and tensors with layouts that crash what touches them."""

import io
import json
import tarfile
import warnings
import zipfile

import torch

from .pickles import MARK, TUPLE, archive, call, saved, text, whole

HUGE = torch.ones(1).expand(10**6, 10**5)
MB = 1_000_000


def header(entries, data=b"", length=None):
    """A safetensors file with any header."""
    raw = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def entry(shape, start, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def storage(nbytes, name="0", kind="FloatStorage"):
    """The opcodes of a storage's persistent id."""
    parts = text("storage") + f"ctorch\n{kind}\n".encode() + text(name) + text("cpu")
    return MARK + parts + long(nbytes) + TUPLE + b"Q"


def long(value):
    data = value.to_bytes(10, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def tensor(size, stride, count=4, offset=0, kind="FloatStorage"):
    """The opcodes of a tensor of any claims, on a storage record of 16 bytes."""

    def numbers(values):
        return MARK + b"".join(map(long, values)) + TUPLE

    return call(
        *("torch._utils", "_rebuild_tensor_v2", storage(count, kind=kind), long(offset)),
        *(numbers(size), numbers(stride), b"\x89", call("collections", "OrderedDict")),
    )


def one(value):
    return b"}" + text("w") + value + b"s"


def forged(*arguments, **options):
    return archive(one(tensor(*arguments, **options)), **{"data/0": bytes(16)})


def compressed(method):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as file:
        file.writestr("archive/data.pkl", whole(one(b"N")))
        file.writestr("archive/data/0", bytes(60 * MB))
    return out.getvalue()


def overlapping_records():
    """Every entry of the directory is the same record: little in the file, much to read."""
    plain = zipfile.ZipFile(io.BytesIO(archive(one(b"N"), **{"data/0": bytes(MB)})))
    record = plain.getinfo("archive/data/0")
    out = io.BytesIO(plain.fp.getvalue())
    with zipfile.ZipFile(out, "a") as file:
        file.filelist += [record] * 5000
        file._didModify = True
    return out.getvalue()


def repeated(opcodes, times):
    return archive(opcodes * times)


def doubled():
    """A list that is 2**40 long when written out: each holds the last one twice."""
    lists = b"".join(b"](h%ch%ceq%c" % (i, i, i + 1) for i in range(40))
    return archive(b"]q\x00" + lists + one(b"h%c" % 40))


def views(length, count):
    """Tensors that overlap, saved as one storage."""
    base = torch.arange(float(length))
    return saved({f"v{i}": base[i:] for i in range(count)})


def tarred():
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as file:
        record = tarfile.TarInfo("storages")
        record.size = 60 * MB
        file.addfile(record, io.BytesIO(bytes(record.size)))
    return out.getvalue()


def unusual():
    base = torch.arange(16.0)
    eye = torch.eye(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
        by_channel = torch.quantize_per_channel(
            torch.ones(2, 2), torch.ones(2), torch.zeros(2), 0, torch.qint8
        )
        nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
        csr = eye.to_sparse_csr()
    return {
        "expanded to 10**11": HUGE,
        "sparse coo": eye.to_sparse(),
        "sparse csr": csr,
        "sparse csc": eye.to_sparse_csc(),
        "sparse bsr": torch.eye(4).to_sparse_bsr((2, 2)),
        "sparse bsc": torch.eye(4).to_sparse_bsc((2, 2)),
        "sparse of 10**18 elements": torch.sparse_coo_tensor(
            torch.zeros(2, 1, dtype=torch.long), torch.ones(1), (10**9, 10**9)
        ),
        "quantised": quantised,
        "quantised by channel": by_channel,
        "nested": nested,
        "meta": torch.empty(10**9, 10**3, device="meta"),
        "complex": torch.ones(2, dtype=torch.complex64),
        "float8": torch.ones(2).to(torch.float8_e4m3fn),
        "folded": base.as_strided((8, 8), (1, 1)),
        "expanded within its storage": base[:1].expand(8),
        "parameter of a sparse one": torch.nn.Parameter(eye.to_sparse()),
    }


def invalid_csr():
    """Loads under weights_only=True where invariants are not checked; multiplying crashes."""

    def part(values):
        return tensor([len(values)], [1], count=2, kind="LongStorage")

    parts = MARK + part([0, 1]) + part([0, 1]) + tensor([2], [1]) + MARK + long(10**9) * 2 + TUPLE
    layout = call("torch.serialization", "_get_layout", "torch.sparse_csr")
    data = call("torch._utils", "_rebuild_sparse_tensor", layout, parts + TUPLE)
    return archive(one(data), **{"data/0": bytes(16)})


# They end at the limit of computing time, or are slow to make.
SLOW = ("counts of 10**9", "a deep stack", "a tall stack", "a tall memo", "50,000 records")


def kinds():
    """Name -> (function that makes the file's bytes, suffix)."""
    made = {name: lambda v=value: saved({"w": v}) for name, value in unusual().items()}
    made |= {
        "10**11 elements": lambda: forged([10**11], [0]),
        "10**11 elements, forward": lambda: forged([10**11], [1]),
        "strides below zero": lambda: forged([2, 2], [-1, 1]),
        "sizes below zero": lambda: forged([-2, -2], [1, 1]),
        "an offset behind the end": lambda: forged([2], [1], offset=10**12),
        "an offset below zero": lambda: forged([2], [1], offset=-4),
        "sizes that overflow": lambda: forged([2**40, 2**40], [1, 1]),
        "2**62 dimensions' product": lambda: forged([2] * 62, [0] * 62),
        "a storage of 10**12": lambda: forged([10**11], [1], count=10**12),
        "a storage below zero": lambda: forged([4], [1], count=-1),
        "an invalid csr": invalid_csr,
        "overlapping tensors": lambda: views(64, 2),
        "a thousand views of one storage": lambda: views(100_000, 1000),
        "Tensor(10**11)": lambda: archive(one(call("torch", "Tensor", long(10**11)))),
        "FloatTensor(10**11)": lambda: archive(one(call("torch", "FloatTensor", long(10**11)))),
        "bytearray(10**11)": lambda: archive(call("builtins", "bytearray", long(10**11))),
        "bytearrays of 200 MB": lambda: repeated(call("builtins", "bytearray", long(200 * MB)), 20),
        "tensors of 200 MB": lambda: repeated(call("torch", "FloatTensor", long(50 * MB)), 20),
        "a set of all": lambda: archive(call("builtins", "set", b"]" + b"Na" * 9)),
        "counts of 10**9": lambda: archive(
            call("collections", "Counter", call("builtins", "bytearray", long(100 * MB)))
        ),
        "a text of 4 GB": lambda: archive(b"X\xff\xff\xff\xffshort"),
        "deep tuples": lambda: repeated(b")" + b"\x85" * 2 * MB, 1),
        "a deep stack": lambda: archive(MARK * 3 * MB),
        "a tall stack": lambda: archive(b"]" * 3 * MB),
        "a tall memo": lambda: archive(
            b"".join(b"]r" + i.to_bytes(4, "little") for i in range(500_000))
        ),
        "lists doubled 40 times": doubled,
        "a number of 10**9 digits": lambda: archive(b"\x8b\xff\xff\xff\x7f" + b"1" * 99),
        "deflated": lambda: compressed(zipfile.ZIP_DEFLATED),
        "bzip2": lambda: compressed(zipfile.ZIP_BZIP2),
        "overlapping records": overlapping_records,
        "50,000 records": lambda: many_records(50_000),
        "gzipped tar": tarred,
    }
    files = {name: (make, ".pt") for name, make in made.items()}
    return files | {name: (make, ".safetensors") for name, make in safetensors_kinds().items()}


def many_records(count):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        for i in range(count):
            file.writestr(f"archive/data/{i}", b"")
    return out.getvalue()


def safetensors_kinds():
    many = {f"tensor.{i}": entry([], 0, 0) for i in range(3)}
    return {
        "a header of 10**18": lambda: header(b"{}", length=10**18),
        "a header of 90 MB": lambda: header(b"{" + b" " * 90 * MB + b"}"),
        "a million names": lambda: header(
            {f"{i}": entry([0], 0, 0) for i in range(200_000)} | many
        ),
        "a metadata of 50 MB": lambda: header({"__metadata__": {"a": "x" * 50 * MB}}),
        "deep JSON": lambda: header(b"[" * MB),
        "deep JSON in the metadata": lambda: header(b'{"__metadata__":' + b'{"a":' * 100_000),
        "10**11 claimed": lambda: header({"w": entry([10**11], 0, 16)}, bytes(16)),
        "a product that overflows": lambda: header({"w": entry([2**40, 2**40], 0, 16)}, bytes(16)),
        "offsets that overflow": lambda: header({"w": entry([4], 0, 2**64 - 1)}, bytes(16)),
        "offsets backward": lambda: header({"w": entry([4], 16, 0)}, bytes(16)),
        "overlap": lambda: header({"a": entry([4], 0, 16), "b": entry([4], 0, 16)}, bytes(16)),
        "a hole": lambda: header({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, bytes(12)),
        "bytes behind": lambda: header({"a": entry([1], 0, 4)}, bytes(400)),
        "float8 there": lambda: header({"w": entry([4], 0, 4, "F8_E4M3")}, bytes(4)),
        "complex there": lambda: header({"w": entry([1], 0, 8, "C64")}, bytes(8)),
        "no tensor": lambda: header({}),
        "NaN": lambda: header({"w": entry([1], 0, 4)}, b"\xff" * 4),
    }
