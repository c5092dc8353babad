"""Pickles that would run code, made by hand: name -> function of the canary's path -> file.

Plain ``pickle.loads`` of most of them creates the canary; the reader must refuse them all.
"""

import io
import pickle
import tarfile
import zipfile

import torch

MARK, STOP, REDUCE, TUPLE, BUILD, POP = b"(", b".", b"R", b"t", b"b", b"0"
PROTO2 = b"\x80\x02"
# What torch.save's old format begins with: its magic number, protocol and machine.
LEGACY = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True, "protocol_version": 1001}]


def text(value):
    data = value.encode()
    return b"X" + len(data).to_bytes(4, "little") + data


def listed(*values):
    return b"]" + b"".join(text(value) + b"a" for value in values)


def call(module, name, *arguments):
    """The opcodes of module.name(*arguments); arguments are opcodes, or text."""
    given = b"".join(a if isinstance(a, bytes) else text(a) for a in arguments)
    return f"c{module}\n{name}\n".encode() + MARK + given + TUPLE + REDUCE


def archive(data, **more):
    """A zip as torch.save writes it, around the opcodes of data.pkl."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as file:
        file.writestr("archive/data.pkl", PROTO2 + data + STOP)
        for name, value in {"byteorder": b"little", "version": b"3\n", **more}.items():
            file.writestr(f"archive/{name}", value)
    return out.getvalue()


def whole(data):
    return PROTO2 + data + STOP


def saved(content):
    out = io.BytesIO()
    torch.save(content, out)
    return out.getvalue()


def shell(canary):
    return f"touch {canary}"


def python(canary):
    return f"open({canary!r}, 'w').close()"


# (module, name, arguments) for a canary's path.
CALLS = {
    "os.system": lambda c: ("os", "system", shell(c)),
    "posix.system": lambda c: ("posix", "system", shell(c)),
    "nt.system": lambda c: ("nt", "system", shell(c)),
    "os.popen": lambda c: ("os", "popen", shell(c)),
    "os.mkdir": lambda c: ("os", "mkdir", c),
    "subprocess.call": lambda c: ("subprocess", "call", listed("touch", c)),
    "subprocess.getoutput": lambda c: ("subprocess", "getoutput", shell(c)),
    "commands.getoutput": lambda c: ("commands", "getoutput", shell(c)),
    "eval": lambda c: ("builtins", "eval", python(c)),
    "exec": lambda c: ("builtins", "exec", python(c)),
    "Python 2's eval": lambda c: ("__builtin__", "eval", python(c)),
    "open": lambda c: ("builtins", "open", c, "w"),
    "io.open": lambda c: ("io", "open", c, "w"),
    "io.FileIO": lambda c: ("io", "FileIO", c, "w"),
    "codecs.open": lambda c: ("codecs", "open", c, "w"),
    "_pyio.open": lambda c: ("_pyio", "open", c, "w"),
    "map of eval": lambda c: (
        *("builtins", "list"),
        call("builtins", "map", b"cbuiltins\neval\n", listed(python(c))),
    ),
    "functools.reduce": lambda c: (
        *("functools", "reduce", b"cbuiltins\nopen\n"),
        listed(c, "w"),
    ),
    "functools.partial": lambda c: ("functools", "partial", b"cos\nsystem\n", shell(c)),
    "operator.methodcaller": lambda c: ("operator", "methodcaller", "system", shell(c)),
    "getattr of os": lambda c: (
        *("builtins", "getattr", call("builtins", "__import__", "os"), "system"),
    ),
    "importlib": lambda c: ("importlib", "import_module", "antigravity"),
    "runpy": lambda c: ("runpy", "_run_code", python(c), b"}"),
    "code": lambda c: ("code", "InteractiveInterpreter"),
    "timeit": lambda c: ("timeit", "timeit", "0", python(c)),
    "profile": lambda c: ("profile", "run", python(c)),
    "cProfile": lambda c: ("cProfile", "run", python(c)),
    "trace": lambda c: ("trace", "Trace"),
    "bdb": lambda c: ("bdb", "Bdb"),
    "pdb": lambda c: ("pdb", "run", python(c)),
    "doctest": lambda c: ("doctest", "debug_script", python(c)),
    "pty": lambda c: ("pty", "spawn", "touch"),
    "ctypes": lambda c: ("ctypes", "CDLL", c),
    "marshal": lambda c: ("marshal", "loads", "x"),
    "types.FunctionType": lambda c: ("types", "FunctionType"),
    "pickle.loads": lambda c: ("pickle", "loads", text("x")),
    "_pickle.Unpickler": lambda c: ("_pickle", "Unpickler"),
    "shelve": lambda c: ("shelve", "open", c),
    "sqlite3": lambda c: ("sqlite3", "connect", c),
    "pathlib of another module": lambda c: ("pathlib", "os.system", shell(c)),
    "dotted name": lambda c: ("collections", "abc.sys.modules", "x"),
    "logging.FileHandler": lambda c: ("logging", "FileHandler", c),
    "logging.config": lambda c: ("logging.config", "listen"),
    "tempfile": lambda c: ("tempfile", "mkdtemp"),
    "shutil": lambda c: ("shutil", "copyfile", "/etc/hostname", c),
    "zipfile": lambda c: ("zipfile", "ZipFile", c, "w"),
    "urllib": lambda c: ("urllib.request", "urlopen", "http://127.0.0.1:9/"),
    "webbrowser": lambda c: ("webbrowser", "open", "http://127.0.0.1:9/"),
    "socket": lambda c: ("socket", "create_connection"),
    "asyncio": lambda c: ("asyncio", "create_subprocess_shell", shell(c)),
    "multiprocessing": lambda c: ("multiprocessing", "Process"),
    "numpy.save": lambda c: ("numpy", "save", c, "x"),
    "numpy.load": lambda c: ("numpy", "load", c),
    "numpy.memmap": lambda c: ("numpy", "memmap", c, "uint8", "w+"),
    "numpy's runstring": lambda c: ("numpy.testing._private.utils", "runstring", python(c), b"}"),
    "numpy.f2py": lambda c: ("numpy.f2py", "compile", "x"),
    "torch.save": lambda c: ("torch", "save", "x", c),
    "torch.load": lambda c: ("torch", "load", c),
    "torch.hub": lambda c: ("torch.hub", "load", c),
    "torch.jit": lambda c: ("torch.jit", "load", c),
    "torch.compile of text": lambda c: ("torch.utils.cpp_extension", "load_inline", "x", python(c)),
    "torch.testing": lambda c: ("torch.testing._internal.common_utils", "shell", shell(c)),
    "torch's own os": lambda c: ("torch.serialization", "os.system", shell(c)),
    "torch.storage's pickle": lambda c: ("torch.storage", "_load_from_bytes", b"C\x01x"),
    "torch's package": lambda c: ("torch.package", "PackageImporter", c),
    "this package": lambda c: ("fst_fast.checkpoints.atomic_files", "write_temporary", c, "x"),
    "this package's stand-in": lambda c: (
        "fst_fast.checkpoints.pickle_reader",
        "Ignored.__init__.__globals__",
    ),
}
PLACES = {
    "bare": lambda bad: bad,
    "beside the weights": lambda bad: b"}(" + text("state_dict") + b"}" + text("x") + bad + b"u",
    "in the weights": lambda bad: b"}(" + text("w") + bad + b"u",
    "optimizer's state": lambda bad: (
        b"}(" + text("optimizer") + b"}(" + text("state") + b"}(K\x00}(" + text("b") + bad + b"uuuu"
    ),
    "a list's end": lambda bad: b"](N" + bad + b"e",
    "a key": lambda bad: b"}(" + bad + b"Nu",
}


def evil(canary):
    return call("os", "system", shell(canary))


def tar(canary):
    """The oldest format of torch.save."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as file:
        for name in ("storages", "tensors", "pickle"):
            data = whole(evil(canary))
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            file.addfile(entry, io.BytesIO(data))
    return out.getvalue()


def legacy(canary, at):
    """The old format, with the code in one of its five pickles."""
    parts = [pickle.dumps(value, 2) for value in (*LEGACY, {}, [])]
    parts[at] = whole(evil(canary))
    return b"".join(parts)


def second(canary):
    """A zip with two data.pkl: some readers take the first, some the last."""
    out = io.BytesIO(saved({"w": torch.ones(2)}))
    with zipfile.ZipFile(out, "a") as file:
        file.writestr("other/data.pkl", whole(evil(canary)))
        file.writestr("other/version", "3")
    return out.getvalue()


def allowed(*arguments, then=b""):
    """A call of torch's own, allow-listed rebuilding functions, with what they do not expect."""
    return lambda canary: archive(call(*arguments) + then)


def state_of(module, name, canary):
    """An object of an allow-listed class, whose state is to be set."""
    new = f"c{module}\n{name}\n".encode() + b")\x81"
    return new + b"}(" + text("__reduce__") + evil(canary) + text("__class__") + b"Nu" + BUILD


FORMS = {
    "protocol 0": lambda c: b"cos\nsystem\n(V" + shell(c).encode() + b"\ntR.",
    "INST": lambda c: whole(MARK + text(shell(c)) + b"ios\nsystem\n"),
    "OBJ": lambda c: whole(MARK + b"cos\nsystem\n" + text(shell(c)) + b"o"),
    "NEWOBJ": lambda c: whole(b"csubprocess\nPopen\n(" + text(shell(c)) + b"t\x81"),
    "STACK_GLOBAL": lambda c: b"\x80\x04" + stack_global("os", "system", c),
    "STACK_GLOBAL from the memo": lambda c: (
        b"\x80\x04\x8c\x02os\x94" + stack_global("x", "system", c, b"h\x00")
    ),
    "an extension's number": lambda c: whole(b"\x82\x01(" + text(shell(c)) + b"tR"),
    "a frame": lambda c: pickle.dumps(Call(eval, python(c)), 4),
    "protocol 5": lambda c: pickle.dumps(Call(eval, python(c)), 5),
    "module of the builtin": lambda c: archive(call("builtins", "__import__", "os")),
    "a persistent id": lambda c: archive(MARK + text("storage") + evil(c) + b"tQ"),
    "a persistent id of another kind": lambda c: archive(MARK + text("module") + evil(c) + b"tQ"),
    "a storage's class": lambda c: archive(
        MARK + text("storage") + b"cos\nsystem\n" + text("0") + text("cpu") + b"K\x01tQ"
    ),
    "state of an OrderedDict": lambda c: archive(state_of("collections", "OrderedDict", c)),
    "state of a Parameter": lambda c: archive(state_of("torch.nn.parameter", "Parameter", c)),
    "backward hooks": lambda c: archive(
        call("torch._utils", "_rebuild_parameter", b"N\x88", evil(c))
    ),
    "rebuild from a type": lambda c: archive(
        call("torch._tensor", "_rebuild_from_type_v2", b"cos\nsystem\n", b"N", evil(c), b"N")
    ),
    "rebuild with an allowed function": allowed(
        *("torch._tensor", "_rebuild_from_type_v2", b"c_codecs\nencode\n"),
        *(b"ctorch\nTensor\n", MARK + text("x") + TUPLE, b"}" + text("data") + b"Ns"),
    ),
    "rebuild a wrapper": allowed("torch._utils", "_rebuild_wrapper_subclass", b"NNNNNNN"),
    "rebuild from an array": allowed(
        *("torch._utils", "_rebuild_device_tensor_from_numpy"),
        *(b"cnumpy\nndarray\n", b"NNN"),
    ),
    "the encoder": allowed("_codecs", "encode", "x", "rot13"),
    "an alias of a tensor's method": allowed("torch", "Tensor.set_", "x"),
    "a class of torch, not allowed": allowed("torch.nn.modules.linear", "Linear", b"K\x02K\x02"),
    "a dtype called": allowed("torch", "float32", "x"),
    "an attribute of an allowed class": allowed("torch", "Size.__class__", "x"),
    "a module's name in the name": allowed("collections", "OrderedDict.__init__", "x"),
    "an alias in the memo": lambda c: archive(
        b"ccollections\nOrderedDict\nq\x000cos\nsystem\nq\x000h\x00(" + text(shell(c)) + b"tR"
    ),
    "after the weights, thrown away": lambda c: archive(evil(c) + POP + b"}" + text("w") + b"Ns"),
    "after the end": lambda c: archive(b"}") + whole(evil(c)),
    "weights_only fails, plain pickle would not": lambda c: archive(
        call("collections", "OrderedDict") + b"\x95" + evil(c)
    ),
    "a name that asks to be allowed": lambda c: archive(
        call("torch.serialization", "add_safe_globals", b"](cos\nsystem\ne") + POP + evil(c)
    ),
    "torch's switch in the file": lambda c: archive(
        call("os", "putenv", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1") + POP + evil(c)
    ),
    "zip before a pickle": lambda c: whole(evil(c)) + archive(b"}"),
    "pickle before a zip": lambda c: saved({"w": torch.ones(1)}) + whole(evil(c)),
    "two data.pkl": second,
    "a program beside it": lambda c: archive(b"}", **{"constants.pkl": whole(evil(c))}),
    "code as a record": lambda c: archive(b"}", **{"code/__torch__.py": python(c).encode()}),
    "record names that climb": lambda c: archive(evil(c), **{"../../x": b""}),
    "tar": tar,
    **{f"old format, pickle {at}": lambda c, at=at: legacy(c, at) for at in range(len(LEGACY) + 2)},
}


class Call:
    """Pickles as a call of function(*arguments)."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def stack_global(module, name, canary, module_ops=None):
    ops = module_ops or b"\x8c" + bytes([len(module)]) + module.encode()
    ops += b"\x8c" + bytes([len(name)]) + name.encode() + b"\x93"
    return ops + MARK + text(shell(canary)) + TUPLE + REDUCE + STOP


def kinds():
    """Name -> function of the canary's path, of (file's bytes, suffix)."""
    places = list(PLACES.items())
    made = {}
    for i, (name, make) in enumerate(CALLS.items()):
        place, put = places[i % len(places)]
        wrap = archive if i % 3 else whole
        made[f"{name}, {place}"] = lambda c, m=make, p=put, w=wrap: (w(p(call(*m(c)))), ".pt")
    for name, make in FORMS.items():
        made[name] = lambda c, m=make: (m(c), ".pt")
    for suffix in (".safetensors", ".pth", ".bin", ".json", ""):
        made[f"renamed to {suffix or 'nothing'}"] = lambda c, s=suffix: (whole(evil(c)), s)
        made[f"a zip renamed to {suffix or 'nothing'}"] = lambda c, s=suffix: (archive(evil(c)), s)
    return made
