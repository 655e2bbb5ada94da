"""Bad files made from valid ones: bytes, JSON, zip members and the structure of HDF5."""

import json
import random
import zipfile
from pathlib import Path
from typing import Any

import numpy as np


def spoil(folder: Path, rng: random.Random) -> None:
    """Change one file of a folder, or its structure where it is HDF5."""
    path = rng.choice(sorted(p for p in folder.rglob("*") if p.is_file() and p.stat().st_size))
    if path.suffix in (".cxi", ".h5") and rng.random() < 0.6:
        spoil_hdf5(path, rng)
        if rng.random() < 0.7:
            return
    if path.suffix == ".npz" and rng.random() < 0.5:
        spoil_npz(path, rng)
        return
    content = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 1, 1, 2, 5, 20))):
        rng.choice(BYTE_CHANGES)(content, rng)
    if path.suffix in (".json", ".jsonl") and rng.random() < 0.5:
        content = spoil_json(path.read_bytes(), rng)
    path.write_bytes(content)


def _flip(content: bytearray, rng: random.Random) -> None:
    if content:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)


def _cut(content: bytearray, rng: random.Random) -> None:
    del content[rng.randrange(len(content) + 1) :]


def _splice(content: bytearray, rng: random.Random) -> None:
    a, b, n = (rng.randrange(len(content) + 1) for _ in range(3))
    content[a : a + n // 8] = content[b : b + n // 8]


def _insert(content: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(content) + 1)
    content[at:at] = rng.randbytes(rng.choice((1, 8, 4096)))


def _length(content: bytearray, rng: random.Random) -> None:
    size = rng.choice((1, 2, 4, 8))
    value = rng.choice(
        (0, 1, 2**31 - 1, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**64 - 1, len(content), rng.getrandbits(64))
    )
    at = rng.randrange(max(1, len(content) - size))
    content[at : at + size] = (value % 2 ** (8 * size)).to_bytes(size, rng.choice(("little", "big")))


def _zeros(content: bytearray, rng: random.Random) -> None:
    at, n = rng.randrange(len(content) + 1), rng.choice((4, 64, 1024))
    content[at : at + n] = bytes([rng.choice((0, 255))]) * n


BYTE_CHANGES = (_flip, _flip, _cut, _splice, _insert, _length, _length, _zeros)
_VALUES = (None, True, -1, 0, 1e308, 2**70, "x" * 300, "", [], {}, [[[]]], {"a": None}, [2**40], "NaN", -0.5)


def spoil_json(content: bytes, rng: random.Random) -> bytearray:
    """Other values under known keys, unknown keys, and nesting without an end."""
    lines = content.split(b"\n") if content.count(b"\n") > 1 and b'"event"' in content else [content]
    at = rng.randrange(len(lines))
    try:
        found = json.loads(lines[at])
    except ValueError:
        return bytearray(content)
    holders = [found]
    for holder in holders:
        values = holder.values() if isinstance(holder, dict) else holder if isinstance(holder, list) else ()
        holders += [value for value in values if isinstance(value, dict | list)]
    holder = rng.choice(holders)
    if isinstance(holder, dict) and holder:
        key = rng.choice(sorted(holder))
        if rng.random() < 0.3:
            del holder[key]
        else:
            holder[key] = rng.choice(_VALUES)
    elif isinstance(holder, list):
        holder.insert(rng.randrange(len(holder) + 1), rng.choice(_VALUES))
    text = json.dumps(found)
    if rng.random() < 0.1:
        text = text[:1] + '"deep": ' + "[" * 100_000 + text[1:]
    lines[at] = text.encode()
    return bytearray(b"\n".join(lines))


def spoil_npz(path: Path, rng: random.Random) -> None:
    """One array spoilt inside an archive that is whole."""
    with zipfile.ZipFile(path) as packed:
        members = {name: bytearray(packed.read(name)) for name in packed.namelist()}
    rng.choice(BYTE_CHANGES)(members[rng.choice(sorted(members))], rng)
    if rng.random() < 0.5:
        content = members[rng.choice(sorted(members))]
        old, new = rng.choice(((b"<f4", b"|O8"), (b"<f8", b"<U9"), (b"False", b"True "), (b"16", b"-9"), (b"(", b"[")))
        content[:128] = bytes(content[:128]).replace(old, new)
    with zipfile.ZipFile(path, "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as packed:
        for name, content in members.items():
            packed.writestr(name, bytes(content))


def spoil_hdf5(path: Path, rng: random.Random) -> None:
    """Wrong types, shapes, links, filters, chunks and attributes in the place of right ones."""
    import h5py  # noqa: PLC0415 - the one workflow that writes such files

    with h5py.File(path, "r+") as file:
        names: list[str] = []
        file.visititems(lambda name, node: names.append(name) if isinstance(node, h5py.Dataset) else None)
        for _ in range(rng.choice((1, 1, 2))):
            try:
                _spoil_dataset(file, rng.choice(names), rng)
            except (KeyError, ValueError, TypeError, OSError, RuntimeError):
                continue  # not every mixture can be written, and a link made before may lead nowhere


def _spoil_dataset(file: Any, name: str, rng: random.Random) -> None:
    if rng.random() < 0.15 and name in file:
        file[name].attrs["units"] = rng.choice(("um", "eV", b"\xff\xb5m", 3, [1.0] * 900, "x" * 9000, np.bytes_(b"")))
        return
    if name in file:
        del file[name]
    rng.choice(HDF5_CHANGES)(file, name, rng)


_DTYPES = (
    "u1",
    "<u2",
    ">u4",
    "<i8",
    "<f2",
    "<f4",
    ">f8",
    "<c8",
    "?",
    "S5",
    "V8",
    "vlen",
    "text",
    "enum",
    "pair",
    "ref",
)
_SHAPES = ((), (0,), (1,), (3,), (6,), (6, 3), (3, 6), (0, 16, 16), (6, 16, 16), (6, 17, 15), (2, 3, 16, 16), (1,) * 6)


def _dtype(rng: random.Random) -> Any:
    import h5py  # noqa: PLC0415

    name = rng.choice(_DTYPES)
    made = {"vlen": h5py.vlen_dtype(np.uint16), "text": h5py.string_dtype(), "ref": h5py.ref_dtype}
    made |= {"enum": h5py.enum_dtype({"a": 1, "b": 2}), "pair": np.dtype([("r", "<f4"), ("i", "<i4")])}
    return made.get(name, name)


def _other_values(file: Any, name: str, rng: random.Random) -> None:
    made = file.create_dataset(name, rng.choice(_SHAPES), _dtype(rng))
    if made.dtype.kind in "uif" and made.size:
        made[...] = np.random.default_rng(rng.getrandbits(32)).integers(0, 100, made.shape)


def _declared(file: Any, name: str, rng: random.Random) -> None:
    sides = [rng.choice((1, 6, 2**16, 2**31, 2**40)) for _ in range(rng.choice((1, 2, 3)))]
    file.create_dataset(name, (*sides, 16), rng.choice(("u1", "<f8")), chunks=(*(1 for _ in sides), 16))


def _link(file: Any, name: str, rng: random.Random) -> None:
    import h5py  # noqa: PLC0415

    target = rng.choice(("scan.cxi", "other.h5", "/etc/passwd", "/dev/zero", "..", "", "../../x", "valid/scan.cxi"))
    soft = h5py.SoftLink(rng.choice((f"/{name}", "/nothing", "/", "entry_1", "/entry_1/sample_1")))
    file[name] = rng.choice((soft, h5py.ExternalLink(target, rng.choice(("/", f"/{name}", "/data")))))


def _virtual(file: Any, name: str, rng: random.Random) -> None:
    import h5py  # noqa: PLC0415

    layout = h5py.VirtualLayout((6, 16, 16), np.uint16, maxshape=(None, 16, 16))
    source = h5py.VirtualSource(rng.choice((".", "other.h5", "/etc/passwd", "%b.h5", "scan.cxi")), name, (6, 16, 16))
    layout[rng.randrange(3) : rng.randrange(3, 6)] = source[: rng.randrange(1, 6)]
    file.create_virtual_dataset(name, layout)


def _stored_elsewhere(file: Any, name: str, rng: random.Random) -> None:
    place = rng.choice(("/etc/passwd", "raw.bin", "../../x", "scan.cxi", "/dev/zero"))
    file.create_dataset(name, (6, 16, 16), np.uint16, external=[(place, rng.choice((0, 2**40)), 3072)])


def _packed(file: Any, name: str, rng: random.Random) -> None:
    import hdf5plugin  # noqa: PLC0415

    filters = rng.choice(
        ({"compression": "gzip"}, {"compression": "lzf"}, {"shuffle": True}, {"fletcher32": True}, {"scaleoffset": 3},
         hdf5plugin.Bitshuffle(), hdf5plugin.LZ4(), hdf5plugin.Blosc(), hdf5plugin.Zstd())
    )  # fmt: skip
    made = file.create_dataset(name, (6, 16, 16), np.uint16, chunks=(2, 16, 16), **filters)
    made[...] = np.arange(6 * 256).reshape(6, 16, 16) % 97
    if rng.random() < 0.8:
        _, content = made.id.read_direct_chunk((2, 0, 0))
        spoilt = bytearray(content)
        for _ in range(rng.choice((1, 3))):
            rng.choice(BYTE_CHANGES)(spoilt, rng)
        made.id.write_direct_chunk((2, 0, 0), bytes(spoilt) or b"\0")


HDF5_CHANGES = (_other_values, _other_values, _declared, _link, _virtual, _stored_elsewhere, _packed, _packed)
