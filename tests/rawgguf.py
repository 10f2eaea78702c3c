"""A GGUF file taken apart into what is written in it, so that tests can put it together wrongly.

    g = Raw.read(path); g.tensors[0].offset = 7; g.write(path2)
"""
import struct
from dataclasses import dataclass, field, replace

SCALAR = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


def string(s):
    b = s.encode() if isinstance(s, str) else s
    return struct.pack("<Q", len(b)) + b


def pack(kind, value):
    """A metadata value; `value` is (element kind, list) for an array, bytes for what is to be written as it is."""
    if isinstance(value, bytes):
        return value
    if kind == 8:
        return string(value)
    if kind == 9:
        return struct.pack("<IQ", value[0], len(value[1])) + b"".join(pack(value[0], v) for v in value[1])
    return struct.pack("<" + SCALAR[kind], value)


@dataclass
class Info:
    name: str
    dims: tuple            # GGUF's order, the row length first
    kind: int
    offset: int
    n_dims: int | None = None


@dataclass
class Raw:
    kv: list               # (key, kind, value)
    tensors: list          # Info
    data: bytes
    version: int = 3
    alignment: int = 32
    marks: list = field(default_factory=list)          # byte positions where one thing ends and the next begins

    @classmethod
    def read(cls, path):
        b = open(path, "rb").read()
        pos = 24
        version, n_tensors, n_kv = struct.unpack_from("<IQQ", b, 4)
        marks = [4, 8, 16, 24]

        def take(code):
            nonlocal pos
            v, = struct.unpack_from("<" + code, b, pos)
            pos += struct.calcsize("<" + code)
            return v

        def text():
            nonlocal pos
            n = take("Q")
            pos += n
            return b[pos - n:pos].decode()

        def value(kind):
            if kind == 8:
                return text()
            if kind == 9:
                k, n = take("I"), take("Q")
                return k, [value(k) for _ in range(n)]
            return take(SCALAR[kind])

        kv, tensors = [], []
        for _ in range(n_kv):
            key = text()
            marks.append(pos)
            kind = take("I")
            marks.append(pos)
            kv.append((key, kind, value(kind)))
            marks.append(pos)
        for _ in range(n_tensors):
            name = text()
            marks.append(pos)
            n = take("I")
            marks.append(pos)
            dims = tuple(take("Q") for _ in range(n))
            marks.append(pos)
            kind = take("I")
            marks.append(pos)
            tensors.append(Info(name, dims, kind, take("Q")))
            marks.append(pos)
        start = -(-pos // 32) * 32
        marks += [start] + [start + t.offset for t in tensors] + [len(b) - 1]
        return cls(kv, tensors, b[start:], version, 32, sorted(set(marks)))

    def bytes(self, *, magic=b"GGUF", n_kv=None, n_tensors=None):
        h = magic + struct.pack("<IQQ", self.version, len(self.tensors) if n_tensors is None else n_tensors,
                                len(self.kv) if n_kv is None else n_kv)
        for k, kind, v in self.kv:
            h += string(k) + struct.pack("<I", kind) + pack(kind, v)
        for t in self.tensors:
            h += string(t.name) + struct.pack("<I", len(t.dims) if t.n_dims is None else t.n_dims)
            h += b"".join(struct.pack("<Q", d) for d in t.dims) + struct.pack("<IQ", t.kind, t.offset)
        return h + bytes(-len(h) % self.alignment) + self.data

    def write(self, path, **how):
        path.write_bytes(self.bytes(**how))
        return str(path)

    def copy(self):
        return replace(self, kv=list(self.kv), tensors=[replace(t) for t in self.tensors])

    # edits, each on a copy
    def set(self, key, kind, value):
        """Give a key another kind and value, or add it."""
        g, new = self.copy(), (key, kind, value)
        at = [i for i, (k, *_) in enumerate(g.kv) if k == key]
        if at:
            g.kv[at[0]] = new
        else:
            g.kv.append(new)
        return g

    def drop(self, *keys):
        g = self.copy()
        g.kv = [e for e in g.kv if e[0] not in keys]
        g.tensors = [t for t in g.tensors if t.name not in keys]
        return g

    def tensor(self, name, **change):
        g = self.copy()
        g.tensors = [replace(t, **change) if t.name == name else t for t in g.tensors]
        return g

    def where(self, name):
        return next(t for t in self.tensors if t.name == name)
