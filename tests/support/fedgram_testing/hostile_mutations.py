"""Ways to damage an adapter: what it says, its configuration, a header, the bytes, the file system around it."""

import os
import pickle
import random
import shutil
import struct
from pathlib import Path

from . import hostile_values as values
from .hostile_bases import CONFIG, ITEM_SIZES, Draft, Header

_OPTIONS = [
    "use_dora", "use_qalora", "lora_bias", "target_parameters", "trainable_token_indices", "layers_to_transform",
    "layers_pattern", "layer_replication", "exclude_modules", "auto_mapping", "megatron_config", "loftq_config",
    "eva_config", "corda_config", "ensure_weight_tying", "revision", "peft_version", "runtime_config", "unknown_option",
]  # fmt: skip


class Bomb:
    """Pickled, it would show that somebody unpickled it."""

    def __reduce__(self):
        return exec, ("raise SystemError('unpickled')",)


# The draft: files stay whole, what they say is wrong.


def special_values(rng: random.Random, draft: Draft) -> None:
    for _ in range(rng.randrange(1, 4)):
        _, _, data = draft.tensors[rng.choice(list(draft.tensors))]
        if data:
            value = rng.choice(values.SPECIAL)
            data[rng.randrange(len(data))] = value


def scaled_values(rng: random.Random, draft: Draft) -> None:
    key = rng.choice(list(draft.tensors))
    dtype, shape, data = draft.tensors[key]
    factor = rng.choice([0.0, 1e-30, 1e-42, 1e30])
    draft.tensors[key] = dtype, shape, [value * factor for value in data]


def other_name(rng: random.Random, draft: Draft) -> None:
    old = rng.choice(list(draft.tensors))
    new = rng.choice(values.NAMES)
    if rng.random() < 0.5:
        new = old.replace(rng.choice(["q_proj", "self_attn", "lora_A", "weight", "base_model.model."]), new)
    draft.tensors = {new if key == old else key: value for key, value in draft.tensors.items()}


def additional_tensor(rng: random.Random, draft: Draft) -> None:
    key = rng.choice([*values.NAMES, f"base_model.model.{rng.choice(values.NAMES)}.lora_A.weight"])
    draft.tensors[key] = rng.choice(list(draft.tensors.values()))


def dropped_tensor(rng: random.Random, draft: Draft) -> None:
    if len(draft.tensors) > 1:
        del draft.tensors[rng.choice(list(draft.tensors))]


def other_shape(rng: random.Random, draft: Draft) -> None:
    key = rng.choice(list(draft.tensors))
    dtype, shape, data = draft.tensors[key]
    shapes = [shape[::-1], [*shape, 1], [1] * 20 + shape, [len(data)], [], [0, *shape], [0], [2**40, 0], [2**62, 4, 0]]
    new = rng.choice([*shapes, [rng.randrange(1, 9), rng.randrange(1, 9)]])
    count = 1
    for n in new:
        count *= n
    draft.tensors[key] = dtype, list(new), [rng.gauss(0, 1) for _ in range(count)]


def other_dtype(rng: random.Random, draft: Draft) -> None:
    key = rng.choice(list(draft.tensors))
    _, shape, data = draft.tensors[key]
    dtype = rng.choice(list(ITEM_SIZES))
    draft.tensors[key] = dtype, shape, data


def many_tensors(rng: random.Random, draft: Draft) -> None:
    empty = "F32", [0], []
    draft.tensors |= {f"base_model.model.m{i}.{rng.choice(['lora_A.weight', 'x'])}": empty for i in range(50)}


def enormous_rank(rng: random.Random, draft: Draft) -> None:
    rank = rng.choice([300, 1025, 20_000])
    draft.config["r"] = rank
    draft.tensors = {
        "base_model.model.q_proj.lora_A.weight": ("F16", [rank, 1], [1.0] * rank),
        "base_model.model.q_proj.lora_B.weight": ("F16", [1, rank], [1.0] * rank),
    }


def another_adapter(rng: random.Random, draft: Draft) -> None:
    draft.folder = rng.choice(["", "other", "x y", "名前", "-o", "adapter_config.json.d"])


# The configuration.


def other_option(rng: random.Random, draft: Draft) -> None:
    draft.config[rng.choice([*draft.config, *_OPTIONS])] = values.junk(rng)


def other_size(rng: random.Random, draft: Draft) -> None:
    draft.config[rng.choice(["r", "lora_alpha", "lora_dropout"])] = values.number(rng)


def other_patterns(rng: random.Random, draft: Draft) -> None:
    table = {
        rng.choice(values.PATTERNS): rng.choice([1, 2, 2, 4, values.number(rng)]) for _ in range(rng.randrange(1, 5))
    }
    draft.config[rng.choice(["rank_pattern", "alpha_pattern"])] = table


def other_selection(rng: random.Random, draft: Draft) -> None:
    field = rng.choice(["target_modules", "exclude_modules", "layers_pattern", "modules_to_save", "target_parameters"])
    pool = [*values.PATTERNS, *values.NAMES]
    draft.config[field] = rng.choice([rng.choice(pool), [rng.choice(pool)], [rng.choice(pool) for _ in range(5)]])


def dropped_option(rng: random.Random, draft: Draft) -> None:
    if draft.config:
        del draft.config[rng.choice(list(draft.config))]


def repeated_option(rng: random.Random, draft: Draft) -> None:
    draft.config["<twice>"] = True


# The header: the file is put together right, the header says something else.


def _entry(rng: random.Random, header: Header) -> dict:
    entries = [entry for _, entry in header.entries if isinstance(entry, dict) and "shape" in entry]
    return rng.choice(entries) if entries else {}


def wrong_offsets(rng: random.Random, header: Header) -> None:
    entry = _entry(rng, header)
    begin, end = 0, len(header.data)
    odd = [[end, begin], [begin, end], [begin], [], [begin, end, 1], [-4, 4], [2**63, 2**64], [0, 0], [end, end + 8]]
    shifted = [value + rng.choice([-8, -4, -1, 1, 4, 8]) for value in (begin, end)]
    entry["data_offsets"] = rng.choice([*odd, shifted, [values.number(rng), values.number(rng)], values.junk(rng)])


def exchanged_offsets(rng: random.Random, header: Header) -> None:
    first, second = _entry(rng, header), _entry(rng, header)
    if "data_offsets" in first and "data_offsets" in second:
        first["data_offsets"], second["data_offsets"] = second["data_offsets"], first["data_offsets"]


def overlapping(rng: random.Random, header: Header) -> None:
    first, second = _entry(rng, header), _entry(rng, header)
    if "data_offsets" in first:
        second["data_offsets"] = first["data_offsets"]


def wrong_shape(rng: random.Random, header: Header) -> None:
    shape = rng.choice(
        [[values.number(rng), values.number(rng)], [2**32, 2**32], [2**40, 6], [1] * 99, values.junk(rng)]
    )
    _entry(rng, header)["shape"] = shape


def wrong_dtype(rng: random.Random, header: Header) -> None:
    odd = ["F8_E4M3", "F8_E5M2", "F4", "C64", "BOOL", "f32", "", "O", values.junk(rng)]
    _entry(rng, header)["dtype"] = rng.choice([*ITEM_SIZES, *odd])


def wrong_entry(rng: random.Random, header: Header) -> None:
    if header.entries:
        i = rng.randrange(len(header.entries))
        header.entries[i] = header.entries[i][0], values.junk(rng)


def further_field(rng: random.Random, header: Header) -> None:
    entry = _entry(rng, header)
    if entry and rng.random() < 0.5:
        del entry[rng.choice(list(entry))]
    else:
        entry[rng.choice(["x", "dtype ", "strides", ""])] = values.junk(rng)


def repeated_tensor(rng: random.Random, header: Header) -> None:
    if header.entries:
        key, entry = rng.choice(header.entries)
        twin = dict(entry) if isinstance(entry, dict) else entry
        if isinstance(twin, dict) and rng.random() < 0.5:
            twin["data_offsets"] = [0, len(header.data)]
        header.entries.append((key, twin))


def odd_metadata(rng: random.Random, header: Header) -> None:
    header.entries.append(("__metadata__" if rng.random() < 0.7 else "_metadata", values.junk(rng)))


def shuffled(rng: random.Random, header: Header) -> None:
    rng.shuffle(header.entries)


def more_data(rng: random.Random, header: Header) -> None:
    header.data += bytes(rng.choice([1, 4, 4096]))


def less_data(rng: random.Random, header: Header) -> None:
    header.data = header.data[: rng.randrange(len(header.data) + 1)]


def sparse_giant(rng: random.Random, header: Header) -> None:
    size = rng.choice([2**12, 2**14])
    begin = len(header.data)
    header.data += bytes(size * 8)
    for name, shape in (("lora_A", [size, 1]), ("lora_B", [1, size])):
        entry = {"dtype": "F32", "shape": shape, "data_offsets": [begin, begin + 4 * size]}
        header.entries.append((f"base_model.model.huge.{name}.weight", entry))
        begin += 4 * size


# The bytes of a file.


def flipped_bits(rng: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        if changed:
            changed[_near_the_front(rng, len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def other_bytes(rng: random.Random, data: bytes) -> bytes:
    begin = _near_the_front(rng, len(data)) if data else 0
    return data[:begin] + rng.randbytes(rng.choice([1, 4, 16])) + data[begin + rng.choice([0, 1, 4, 16]) :]


def removed_bytes(rng: random.Random, data: bytes) -> bytes:
    begin = _near_the_front(rng, len(data)) if data else 0
    return data[:begin] + data[begin + rng.choice([1, 2, 8, 100]) :]


def truncated(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def trailing(rng: random.Random, data: bytes) -> bytes:
    return data + rng.choice([b"\0", b" ", b"\n{}", rng.randbytes(9), data])


def empty(rng: random.Random, data: bytes) -> bytes:
    return b""


def other_length(rng: random.Random, data: bytes) -> bytes:
    lengths = [0, 1, 2, len(data), len(data) - 8, 10**8, 2**31, 2**32, 2**63, 2**64 - 1, rng.randrange(2**16)]
    return struct.pack("<Q", rng.choice(lengths) % 2**64) + data[8:]


def foreign(rng: random.Random, data: bytes) -> bytes:
    deep = b"[" * 5000
    return rng.choice(
        [
            b"\x80\x04\x95.",
            b"PK\x03\x04" + bytes(40),
            b"\x89HDF\r\n",
            b"\xff" * 64,
            b"\0" * 64,
            b"\xef\xbb\xbf" + data,
            data.decode("latin-1").encode("utf-16"),
            deep,
            b'{"a":' * 5000,
            struct.pack("<Q", len(deep)) + deep,
            b"1" * 5000,
            b'{"peft_type": "LORA", "r": ' + b"1" * 5000 + b"}",
            b"NaN",
            b'"LORA"',
        ]
    )


def _near_the_front(rng: random.Random, size: int) -> int:
    """Headers are where it hurts."""
    return rng.randrange(min(size, rng.choice([9, 64, 400, size])) or 1)


# The file system.


def replaced_by_directory(rng: random.Random, path: Path, root: Path) -> None:
    _remove(path)
    path.mkdir()


def replaced_by_pipe(rng: random.Random, path: Path, root: Path) -> None:
    _remove(path)
    os.mkfifo(path)


def replaced_by_link(rng: random.Random, path: Path, root: Path) -> None:
    _remove(path)
    targets = [
        path.name,
        "nowhere",
        ".",
        "..",
        "/dev/null",
        "/dev/zero",
        "/dev/tty",
        "/proc/self/mem",
        "/etc/passwd",
        CONFIG,
    ]
    path.symlink_to(rng.choice(targets))


def moved_behind_link(rng: random.Random, path: Path, root: Path) -> None:
    if path.is_file() and not path.is_symlink():
        path.rename(path.with_name("blob"))
        path.symlink_to("blob")


def removed(rng: random.Random, path: Path, root: Path) -> None:
    _remove(path)


def pickled(rng: random.Random, path: Path, root: Path) -> None:
    if rng.random() < 0.7:
        _remove(path)
    name = rng.choice(["adapter_model.bin", "pytorch_model.pt", "adapter_model.pkl", path.name])
    _remove(path.with_name(name))  # it may be a pipe by now, or a link to anywhere
    path.with_name(name).write_bytes(pickle.dumps(Bomb()))


def two_adapters(rng: random.Random, path: Path, root: Path) -> None:
    for name in ("second", "third"):
        if not (root / name).exists():
            (root / name).mkdir()
            for source in root.iterdir():
                if source.is_file() and not source.is_symlink() and source.stat().st_size < 1 << 20:
                    shutil.copyfile(source, root / name / source.name)
    if rng.random() < 0.5:
        _remove(root / CONFIG)


def endless(rng: random.Random, path: Path, root: Path) -> None:
    if path.is_file() and not path.is_symlink():
        os.truncate(path, rng.choice([1 << 20, 32 << 20]))


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


STAGES = {
    "draft": (0.35, [
        special_values, scaled_values, other_name, additional_tensor, dropped_tensor, other_shape, other_dtype,
        many_tensors, enormous_rank, another_adapter,
    ]),
    "config": (0.25, [
        other_option, other_option, other_size, other_patterns, other_selection, dropped_option, repeated_option,
    ]),
    "header": (0.25, [
        wrong_offsets, wrong_offsets, exchanged_offsets, overlapping, wrong_shape, wrong_dtype, wrong_entry,
        further_field, repeated_tensor, odd_metadata, shuffled, more_data, less_data, sparse_giant,
    ]),
    "bytes": (0.15, [
        flipped_bits, flipped_bits, other_bytes, removed_bytes, truncated, trailing, empty, other_length, foreign,
    ]),
    "files": (0.06, [
        replaced_by_directory, replaced_by_pipe, replaced_by_link, moved_behind_link, removed, pickled, two_adapters,
        endless,
    ]),
}  # fmt: skip
"""How often an adapter is changed at each stage, and how."""
