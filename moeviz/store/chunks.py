"""A column of a row group as bytes of Parquet: pages, and what the footer says of them.

What is known of the columns makes this fast: numbers are few a row, texts are few and repeated, lists hold small
integers or floats. Codes of a dictionary go at the width of whole bytes where zstd packs them better than bits do.

Shapes: R rows, N entries of a column (a number each; of lists, all elements one after the other), V entries that
hold a value.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from moeviz.store import thrift

_INT32, _FLOAT, _DOUBLE, _BYTE_ARRAY = 1, 4, 5, 6
_PLAIN, _RLE, _RLE_DICTIONARY, _BYTE_STREAM_SPLIT = 0, 3, 8, 9
_DATA_PAGE, _DICTIONARY_PAGE = 0, 2
_UNCOMPRESSED, _ZSTD = 0, 6
_WORTH_BYTES = 300
"""From how many bytes on a column is compressed: fewer take 10 us as well, which zstd spends on its tables."""
_MOST_SPAN = 1 << 16
"""Numbers that lie further apart are not looked for in a table of distinct ones."""

PHYSICAL: dict[pa.DataType, tuple[int, int | None]] = {
    pa.int32(): (_INT32, None),
    pa.uint8(): (_INT32, 11),
    pa.uint16(): (_INT32, 12),
    pa.uint32(): (_INT32, 13),
    pa.float32(): (_FLOAT, None),
    pa.float64(): (_DOUBLE, None),
    pa.string(): (_BYTE_ARRAY, 0),
}
"""Arrow type -> Parquet's physical type and its ConvertedType, if any."""
_PLAIN_TYPES = {_INT32: "<i4", _FLOAT: "<f4", _DOUBLE: "<f8"}
_CODES = (pa.uint8(), pa.uint16())
"""Elements of lists: numbers that can be codes of a dictionary in which each number stands for itself."""
ELEMENTS = (*_CODES, pa.uint32(), pa.int32(), pa.float32())
"""Of lists."""


class Column(NamedTuple):
    """What is known of a column before its rows: the same at every flush."""

    path: tuple[bytes, ...]
    type_: int
    """Parquet's."""
    is_list: bool
    is_code: bool
    """Whether numbers of its lists can be codes of a dictionary."""
    noted: bool
    """Whether the smallest and the largest value are noted, of integers and text."""


class Chunk(NamedTuple):
    """A column of a row group, as written."""

    pages: Sequence[bytes]
    metadata: bytes
    """Fields 1 to 7 of ColumnMetaData: all before the offsets."""
    edges: thrift.Field | None
    """Its statistics, if noted."""
    data_at: int
    """Where in `pages` the data page begins: after the dictionary, if there is one."""
    num_bytes: int
    """Of `pages`."""


class _Dictionary(NamedTuple):
    """What codes stand for."""

    size: int
    plain: bytes
    squeezed: bytes | None = None
    """`plain` after compression, where that is known already."""


class _Body(NamedTuple):
    """The entries of a column: levels, then values."""

    encoding: int
    entries: int
    parts: Sequence[bytes | memoryview]
    dictionary: _Dictionary | None = None


def column(field: pa.Field, noted: bool) -> Column | None:
    """What to know of a column; None: of a type that is not written here."""
    name, is_list = field.name.encode(), pa.types.is_list(field.type)
    element = field.type.value_type if is_list else field.type
    if element not in (ELEMENTS if is_list else PHYSICAL):
        return None
    path = (name, b"list", b"element") if is_list else (name,)
    return Column(path, PHYSICAL[element][0], is_list, element in _CODES, noted)


def chunk(array: pa.Array, column: Column) -> Chunk:
    """Write the values of a column in a row group."""
    if column.is_list:
        return _assembled(column, _lists(array, column))
    if column.type_ == _BYTE_ARRAY:
        body, texts = _texts(array)
        edges = (min(texts), max(texts)) if column.noted and texts else None
        return _assembled(column, body, _edges(array.null_count, edges) if column.noted else None)
    values_V = (array.drop_null() if array.null_count else array).to_numpy()
    body = _numbers(values_V.astype(_PLAIN_TYPES[column.type_], copy=False), array)
    return _assembled(column, body, _integer_edges(values_V, array.null_count) if column.noted else None)


def _numbers(values_V: np.ndarray, array: pa.Array) -> _Body:
    """A number a row: `values_V`, or NULL where `array` has it."""
    entries, size = len(array), values_V.itemsize
    levels, plain = _levels(_presence(array)), values_V.tobytes()
    if len(values_V) > 1 and plain == plain[:size] * len(values_V):
        return _Body(_RLE_DICTIONARY, entries, (levels, *_coded(values_V, 1)), _Dictionary(1, plain[:size]))
    if values_V.dtype.kind == "f" and len(plain) >= _WORTH_BYTES:
        return _Body(_BYTE_STREAM_SPLIT, entries, (levels, _planes(values_V)))
    return _Body(_PLAIN, entries, (levels, plain))


def _texts(array: pa.StringArray) -> tuple[_Body, list[bytes]]:
    """A text a row, as codes of the distinct ones where that saves any; and these."""
    coded = array.dictionary_encode()
    texts = [text.encode() for text in coded.dictionary.to_pylist()]
    levels = _levels(_presence(array))
    codes_V = (coded.indices.drop_null() if array.null_count else coded.indices).to_numpy()
    if 2 * len(texts) >= len(codes_V):
        return _Body(_PLAIN, len(array), (levels, _counted(texts[code] for code in codes_V.tolist()))), texts
    parts = (levels, *_coded(codes_V, len(texts)))
    return _Body(_RLE_DICTIONARY, len(array), parts, _Dictionary(len(texts), _counted(texts))), texts


def _counted(texts: Iterable[bytes]) -> bytes:
    """Texts one after the other, each behind its length."""
    return b"".join([part for text in texts for part in (len(text).to_bytes(4, "little"), text)])


def _lists(array: pa.ListArray, column: Column) -> _Body:
    """A list a row."""
    offsets = array.offsets.to_numpy()
    lengths_R = np.diff(offsets)
    values_V = array.values.to_numpy()[offsets[0] : offsets[-1]]
    entries, *levels = _list_levels(array, lengths_R)
    if not len(values_V):
        return _Body(_PLAIN, entries, levels)
    if column.type_ == _FLOAT:
        return _Body(_BYTE_STREAM_SPLIT, entries, (*levels, _planes(values_V.astype("<f4", copy=False))))
    if column.is_code:
        most = int(values_V.max())
        if most < max(256, len(values_V)):
            parts = (*levels, *_coded(values_V, most + 1))
            return _Body(_RLE_DICTIONARY, entries, parts, _identity(most + 1))
    distinct = _distinct(values_V)
    if distinct is None:
        return _Body(_PLAIN, entries, (*levels, values_V.astype("<i4", copy=False).data))
    numbers, codes_V = distinct
    dictionary = _Dictionary(len(numbers), numbers.astype("<i4").tobytes())
    return _Body(_RLE_DICTIONARY, entries, (*levels, *_coded(codes_V, len(numbers), tight=True)), dictionary)


def _list_levels(array: pa.ListArray, lengths_R: np.ndarray) -> tuple[int, bytes, bytes]:
    """Entries, repetition levels (0 where a list begins, 1 in it), definition levels (3: there is an element)."""
    if lengths_R.all():
        entries = int(lengths_R.sum())
        return entries, _levels(_repeats(lengths_R)), _levels(_run(3, entries))
    if array.null_count == len(array):
        none = _levels(_run(0, len(array)))
        return len(array), none, none
    entries_R = np.maximum(lengths_R, 1)
    defined_R = np.where(lengths_R > 0, 3, array.is_valid().to_numpy(zero_copy_only=False))
    runs = zip(defined_R.tolist(), entries_R.tolist(), strict=True)
    defined = b"".join(_run(level, entries) for level, entries in runs)
    return int(entries_R.sum()), _levels(_repeats(entries_R)), _levels(defined)


def _planes(values_V: np.ndarray) -> memoryview:
    """The bytes of numbers sorted by their place in the number: so they compress better."""
    size = values_V.itemsize
    return np.ascontiguousarray(values_V.view(np.uint8).reshape(-1, size).T).reshape(-1).data


def _distinct(values_V: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """The distinct numbers, rising, and which of them each is; None where that would save little."""
    least = int(values_V.min())
    span = int(values_V.max()) - least + 1
    if span > _MOST_SPAN:
        return None
    above_V = values_V - values_V.dtype.type(least)
    seen = np.zeros(span, bool)
    seen[above_V] = True
    numbers = np.flatnonzero(seen)
    if 2 * len(numbers) > len(values_V):
        return None
    return numbers + least, (np.cumsum(seen, dtype=np.int32) - 1)[above_V]


def _coded(codes_V: np.ndarray, size: int, tight: bool = False) -> Sequence[bytes | memoryview]:
    """Codes below `size`: their width in bits, then one run of them all, packed.

    `tight`: in no more bits than they need where that is more than a byte, for codes that zstd would not shrink.
    """
    if size == 1:
        return (b"\x08", _run(0, len(codes_V)))
    eights = -(-len(codes_V) // 8)
    if tight and 1 << 8 < size <= 1 << 15:
        width = (size - 1).bit_length()
        return (bytes([width]), thrift.varint(eights << 1 | 1), _packed(codes_V, width))
    width = 1 if size <= 1 << 8 else 2 if size <= 1 << 16 else 4
    packed = codes_V.astype(f"<u{width}", copy=False).data
    padding = bytes((8 * eights - len(codes_V)) * width)
    return (bytes([8 * width]), thrift.varint(eights << 1 | 1), packed, padding)


def _packed(codes_V: np.ndarray, width: int) -> bytes:
    """Codes of `width` bits, 9 to 15, one after the other from the lowest bit on, filled up to a multiple of eight.

    Eight codes are `width` bytes: two halves of four codes, joined in a number of 128 bits.
    """
    filled = np.zeros(-(-len(codes_V) // 8) * 8, np.uint64)
    filled[: len(codes_V)] = codes_V
    shifts = np.arange(0, 4 * width, width, dtype=np.uint64)
    halves = np.bitwise_or.reduce(filled.reshape(-1, 2, 4) << shifts, axis=2)
    whole = np.empty(halves.shape, "<u8")
    whole[:, 0] = halves[:, 0] | halves[:, 1] << np.uint64(4 * width)
    whole[:, 1] = halves[:, 1] >> np.uint64(64 - 4 * width)
    return whole.view(np.uint8)[:, :width].tobytes()


@lru_cache(maxsize=8)
def _identity(size: int) -> _Dictionary:
    """The dictionary in which number i of 0..size-1 has code i."""
    numbers = np.arange(size, dtype="<i4").tobytes()
    return _Dictionary(size, numbers, _zstd(numbers))


def _assembled(column: Column, body: _Body, edges: thrift.Field | None = None) -> Chunk:
    """Pages of a column, compressed where there is enough to compress."""
    data = b"".join(body.parts)
    dictionary = body.dictionary
    raw_bytes = len(data) + (len(dictionary.plain) if dictionary else 0)
    codec = _ZSTD if raw_bytes >= _WORTH_BYTES else _UNCOMPRESSED
    first: tuple[bytes, ...] = ()
    if dictionary:
        plain = dictionary.plain
        if codec == _ZSTD:
            plain = _zstd(plain) if dictionary.squeezed is None else dictionary.squeezed
        first = _dictionary_header(dictionary.size, len(dictionary.plain), len(plain)), plain
    squeezed = _zstd(data) if codec == _ZSTD else data
    pages = (*first, _data_header(body.entries, body.encoding, len(data), len(squeezed)), squeezed)
    num_bytes, data_at = sum(map(len, pages)), sum(map(len, first))
    heads = num_bytes - len(squeezed) - (len(first[1]) if first else 0)
    sizes = thrift.next_i64s(body.entries, heads + raw_bytes, num_bytes)
    metadata = _kind(column.type_, column.path, body.encoding, codec) + sizes
    return Chunk(pages, metadata, edges, data_at, num_bytes)


@lru_cache(maxsize=1 << 10)
def _kind(type_: int, path: tuple[bytes, ...], encoding: int, codec: int) -> bytes:
    """What ColumnMetaData says of a column and hardly ever changes: fields 1 to 4."""
    encodings = (_PLAIN, _RLE, encoding) if encoding == _RLE_DICTIONARY else (_RLE, encoding)
    fields = (thrift.i32(1, type_), thrift.i32s(2, encodings), thrift.binaries(3, path), thrift.i32(4, codec))
    return thrift.fields_of(fields)[:-1]


def _data_header(entries: int, encoding: int, raw_bytes: int, page_bytes: int) -> bytes:
    own = thrift.next_i32s(entries, encoding, _RLE, _RLE) + b"\0"
    return (
        thrift.next_i32s(_DATA_PAGE, raw_bytes, page_bytes) + b"\x2c" + own + b"\0"
    )  # 2c: a struct, field 5


@lru_cache(maxsize=1 << 10)
def _dictionary_header(size: int, raw_bytes: int, page_bytes: int) -> bytes:
    own = thrift.struct(7, [thrift.i32(1, size), thrift.i32(2, _PLAIN)])
    return thrift.next_i32s(_DICTIONARY_PAGE, raw_bytes, page_bytes) + thrift.fields_of([own], after=3)


def _integer_edges(values_V: np.ndarray, nulls: int) -> thrift.Field:
    if not len(values_V):
        return _edges(nulls, None)
    edges = int(values_V.min()), int(values_V.max())
    low, high = (edge.to_bytes(4, "little", signed=edge < 0) for edge in edges)
    return _edges(nulls, (low, high))


@lru_cache(maxsize=1 << 10)
def _edges(nulls: int, edges: tuple[bytes, bytes] | None) -> thrift.Field:
    """The smallest and the largest value, and how many rows have none."""
    noted = [] if edges is None else [thrift.binary(5, edges[1]), thrift.binary(6, edges[0])]
    return thrift.struct(12, [thrift.i64(3, nulls), *noted])


def _presence(array: pa.Array) -> bytes:
    """Definition levels of rows: 1 where there is a value."""
    if array.null_count in (0, len(array)):
        return _run(int(array.null_count == 0), len(array))
    bits = np.packbits(array.is_valid().to_numpy(zero_copy_only=False), bitorder="little")
    return thrift.varint(len(bits) << 1 | 1) + bits.tobytes()


def _levels(runs: bytes) -> bytes:
    return len(runs).to_bytes(4, "little") + runs


def _run(level: int, count: int) -> bytes:
    """The same level `count` times."""
    return thrift.varint(count << 1) + bytes([level])


def _repeats(lengths_R: np.ndarray) -> bytes:
    """Repetition levels of lists: 0 where a list begins, 1 in it."""
    first = int(lengths_R[0])
    if (lengths_R == first).all():
        return _repeat(first) * len(lengths_R)
    return b"".join(map(_repeat, lengths_R.tolist()))


@lru_cache(maxsize=4096)
def _repeat(length: int) -> bytes:
    return _run(0, 1) + (_run(1, length - 1) if length > 1 else b"")


def _zstd(body: bytes) -> bytes:
    return pa.Codec("zstd", compression_level=1).compress(body, asbytes=True)
