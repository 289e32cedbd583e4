"""Generates malicious pickles: every way to fetch a callable, to use it, and to hide or to hurt."""

from __future__ import annotations

import random
import struct
from pathlib import Path

DANGEROUS = [
    *[(m, "system") for m in ("os", "posix", "nt")],
    *[("builtins", n) for n in ("eval", "exec", "open", "compile", "__import__", "type", "vars")],
    *[("__builtin__", n) for n in ("eval", "apply", "file", "__import__")],
    ("subprocess", "Popen"), ("subprocess", "check_output"), ("os", "execvp"), ("pty", "spawn"),
    ("importlib", "import_module"), ("runpy", "run_path"), ("pydoc", "locate"), ("pdb", "run"),
    ("operator", "attrgetter"), ("operator", "methodcaller"), ("functools", "partial"),
    ("functools", "reduce"), ("copyreg", "_reconstructor"), ("copyreg", "add_extension"),
    ("types", "CodeType"), ("types", "FunctionType"), ("marshal", "loads"), ("pickle", "loads"),
    ("timeit", "timeit"), ("cProfile", "run"), ("code", "interact"), ("webbrowser", "open"),
    ("shutil", "rmtree"), ("pathlib", "Path.unlink"), ("ctypes", "CDLL"),
    ("socket", "create_connection"), ("urllib.request", "urlopen"), ("pip", "main"),
    ("multiprocessing.util", "spawnv_passfds"),
    ("torch", "load"), ("torch.hub", "load"), ("torch.jit", "load"), ("torch.serialization", "load"),
    ("torch.storage", "_load_from_bytes"), ("torch._utils", "_rebuild_qtensor"),
    ("torch._dynamo.guards", "GuardBuilder.get"), ("torch.utils.cpp_extension", "load_inline"),
    ("torch.distributed.rpc.internal", "deserialize"), ("torch.utils.data", "DataLoader"),
    ("numpy", "load"), ("numpy.testing._private.utils", "runstring"), ("numpy", "fromfile"),
    ("numpy.core.multiarray", "_reconstruct"), ("transformers", "pipeline"), ("joblib", "load"),
    ("collections", "OrderedDict.fromkeys"), ("collections", "namedtuple"), ("antigravity", "x"),
    ("torch.distributed", "tensor.placement_types.Shard"), ("sys", "modules"), ("this", "s"),
    ("torch._utils", "_rebuild_tensor_v2.__globals__"), ("", ""), ("os\x00", "system"), ("óś", "x"),
    ("streamconv.planning.child", "_ask"), ("streamconv.torchfile.unpickle", "load_inert"),
    ("a" * 999, "b"),
]  # fmt: skip
ALLOWED = [
    ("collections", "OrderedDict"), ("torch", "Size"), ("torch", "FloatStorage"), ("torch", "float32"),
    ("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_tensor_v3"),
    ("torch._utils", "_rebuild_parameter"), ("torch._tensor", "_rebuild_from_type_v2"),
    ("torch._utils", "_rebuild_wrapper_subclass"), ("torch.distributed.tensor", "DTensor"),
    ("torch.distributed.tensor._dtensor_spec", "DTensorSpec"), ("_codecs", "encode"),
    ("torch.distributed.device_mesh", "DeviceMesh"), ("builtins", "getattr"), ("__builtin__", "set"),
    ("torch.distributed.tensor.placement_types", "Shard"), ("torch.storage", "UntypedStorage"),
    ("torch.distributed._shard.sharded_tensor.api", "ShardedTensor"), ("torch", "device"),
]  # fmt: skip
_ATTRIBUTES = [
    "__globals__",
    "__class__",
    "__init__",
    "__reduce__",
    "__subclasses__",
    "mro",
    "args",
]
_HEAD = b"\x80\x04"


def text(value: str) -> bytes:
    raw = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(raw)) + raw


def tensor() -> bytes:
    """A valid tensor of four float32 in record 0."""
    storage = (
        b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\x04tQ"
    )
    size = b"(" + storage + b"K\x00K\x04\x85K\x01\x85\x89ccollections\nOrderedDict\n)Rt"
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + size + b"R"


class Generator:
    """Makes one pickle after the other; what they would run touches the file ``canary``."""

    def __init__(self, rng: random.Random, canary: Path) -> None:
        self._rng = rng
        self._canary = canary

    def pickle(self) -> bytes:
        """A whole data.pkl: something malicious, alone or among valid tensors."""
        bad = self._bomb() if self._rng.random() < 0.2 else self._attack()
        place = self._rng.randrange(7)
        good = text("good") + tensor()
        if place == 0:
            return _HEAD + bad + b"."
        if place == 1:  # as a value among tensors
            return _HEAD + b"}(" + good + text("bad") + bad + b"u."
        if place == 2:  # as a key
            return _HEAD + b"}(" + good + bad + tensor() + b"u."
        if place == 3:  # done and dropped before a harmless dict
            return _HEAD + bad + b"0}(" + good + b"u."
        if place == 4:  # as the state of the dict
            return _HEAD + b"ccollections\nOrderedDict\n)R(" + good + b"u" + bad + b"b."
        if place == 5:  # as the shape of a tensor
            return (
                _HEAD + b"}(" + good + text("bad") + tensor().replace(b"K\x04\x85", bad, 1) + b"u."
            )
        return _HEAD + b"}" + text("model") + b"}(" + good + text("x") + bad + b"us."

    def _attack(self) -> bytes:
        made = self._use(self._fetch())
        for _ in range(self._rng.randrange(3)):
            made = self._rng.choice([self._use, self._wrap])(made)
        return made

    def _argument(self) -> bytes:
        command = f"touch {self._canary}"
        return self._rng.choice(
            [
                text(command),
                text(f"__import__('os').system({command!r})"),
                text(f"open({str(self._canary)!r}, 'w')"),
                text(str(self._canary)),
                b"B" + struct.pack("<I", len(command)) + command.encode(),
                b"(" + text("sh") + text("-c") + text(command) + b"l",
                b"K\x00",
                b"J\xff\xff\xff\xff",
                b"N",
                self._name(ALLOWED),
                tensor(),
            ]
        )

    def _arguments(self) -> bytes:
        return b"(" + b"".join(self._argument() for _ in range(self._rng.randrange(4))) + b"t"

    def _name(self, names: list[tuple[str, str]]) -> bytes:
        module, name = self._rng.choice(names)
        if self._rng.random() < 0.5:
            return text(module) + text(name) + b"\x93"
        return b"c" + module.encode() + b"\n" + name.encode() + b"\n"

    def _fetch(self) -> bytes:
        rng = self._rng
        kind = rng.randrange(6)
        if kind == 0:
            module, name = rng.choice(DANGEROUS)
            return b"(" + self._argument() + f"i{module}\n{name}\n".encode()  # INST calls at once
        if kind == 1:
            return rng.choice([b"\x82\x01", b"\x83\x01\x00", b"\x84\x01\x00\x00\x00"])
        if kind == 2:  # getattr of an allowed name, in a chain
            made = self._name(ALLOWED)
            for _ in range(rng.randint(1, 4)):
                attribute = text(rng.choice(_ATTRIBUTES))
                made = b"cbuiltins\ngetattr\n(" + made + attribute + b"tR"
            return made
        return self._name(DANGEROUS if kind < 5 else ALLOWED)

    def _use(self, fetched: bytes) -> bytes:
        kind = self._rng.randrange(8)
        if kind == 0:
            return fetched + self._arguments() + b"R"
        if kind == 1:
            return fetched + self._arguments() + b"\x81"
        if kind == 2:
            return fetched + self._arguments() + b"}" + text("k") + self._argument() + b"s\x92"
        if kind == 3:
            return b"(" + fetched + self._argument() + b"o"
        if kind == 4:  # BUILD on the thing itself, with the state of a dict or of slots
            state = b"}" + text(self._rng.choice(_ATTRIBUTES)) + self._argument() + b"s"
            return fetched + (state if self._rng.random() < 0.5 else b"N" + state + b"\x86") + b"b"
        if kind == 5:
            return fetched + b")R}" + text("__setstate__") + self._name(DANGEROUS) + b"sb"
        if kind == 6:
            return fetched + b"(" + self._argument() + self._argument() + b"u"
        return fetched + self._argument() + b"a"

    def _wrap(self, made: bytes) -> bytes:
        kind = self._rng.randrange(5)
        if kind == 0:
            return made + b"q\xf0" + b"h\xf0" + b"\x86"
        if kind == 1:
            return made + b"Q"  # a persistent id
        if kind == 2:
            return b"P" + str(self._canary).encode() + b"\n" + made + b"\x86"
        if kind == 3:
            return b"(" + made + b"l"
        return b"ctorch._utils\n_rebuild_tensor_v2\n(" + made + b"K\x00)))t" + b"R"

    def _bomb(self) -> bytes:
        rng = self._rng
        size = rng.choice([1 << 31, (1 << 32) - 1, 1 << 40, (1 << 63) - 1])
        wide, narrow = struct.pack("<Q", size), struct.pack("<I", min(size, (1 << 32) - 1))
        deep = rng.randrange(10_000, 400_000)
        return rng.choice(
            [
                b"Nr" + narrow,
                b"Np" + str(size).encode() + b"\n",
                b"\x96" + wide,
                b"\x8e" + wide,
                b"\x8d" + wide,
                b"\x95" + wide + b"N",
                b"X" + narrow,
                b"\x8b" + struct.pack("<i", 2**31 - 1),
                b"]" * deep + b"a" * (deep - 1),
                b")" + b"\x85" * deep,
                b"(" * deep,
                b")" + b"2\x86" * rng.randint(30, 90),
                b"}" + b")" + b"2\x86" * rng.randint(30, 90) + b"Ns",  # as a key: hashed for years
                b"I" + b"9" * rng.randint(5_000, 300_000) + b"\n",
                b"L" + b"9" * rng.randint(5_000, 300_000) + b"L\n",
                b"(" + b"K\x01" * deep + b"t\x85" + self._name(ALLOWED) + b"\x86",
                b"h\xff",
                b"0" * rng.randint(1, 50),
            ]
        )
