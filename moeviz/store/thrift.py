"""The part of Thrift's compact protocol that a Parquet footer needs: integers, bytes, lists and structs, written only.

https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache

Field = tuple[int, int, bytes]
"""Number of the field, its kind on the wire, its value as written. Fields of a struct go by rising number."""

_I32, _I64, _BINARY, _LIST, _STRUCT = 5, 6, 8, 9, 12


def i32(number: int, value: int) -> Field:
    return number, _I32, zigzag(value)


def i64(number: int, value: int) -> Field:
    return number, _I64, zigzag(value)


def binary(number: int, value: bytes) -> Field:
    return number, _BINARY, counted(value)


def struct(number: int, fields: Iterable[Field]) -> Field:
    return number, _STRUCT, fields_of(fields)


def structs(number: int, values: Sequence[bytes]) -> Field:
    """A list of structs, each as `fields_of` wrote it."""
    return number, _LIST, _list(_STRUCT, values)


def i32s(number: int, values: Sequence[int]) -> Field:
    return number, _LIST, _list(_I32, [zigzag(value) for value in values])


def binaries(number: int, values: Sequence[bytes]) -> Field:
    return number, _LIST, _list(_BINARY, [counted(value) for value in values])


def next_i32s(*values: int) -> bytes:
    """Fields whose numbers rise by one, from that of the field before them; the struct goes on."""
    return b"".join([b"\x15" + zigzag(value) for value in values])


def next_i64s(*values: int) -> bytes:
    """The same for i64."""
    return b"".join([b"\x16" + zigzag(value) for value in values])


def fields_of(fields: Iterable[Field], after: int = 0) -> bytes:
    """A struct on its own; or the rest of one, from the field number `after` on."""
    written, last = bytearray(), after
    for number, kind, value in fields:
        assert 0 < number - last < 16, "fields rise, by less than 16"
        written.append((number - last) << 4 | kind)
        written += value
        last = number
    written.append(0)
    return bytes(written)


def varint(value: int) -> bytes:
    """An unsigned integer, seven bits a byte, lowest first."""
    written = bytearray()
    while value > 0x7F:
        written.append(value & 0x7F | 0x80)
        value >>= 7
    written.append(value)
    return bytes(written)


@lru_cache(maxsize=1 << 14)  # a footer says the same sizes again and again
def zigzag(value: int) -> bytes:
    """A signed integer of up to 64 bits."""
    return varint((value << 1) ^ (value >> 63))


def counted(value: bytes) -> bytes:
    return varint(len(value)) + value


def _list(kind: int, values: Sequence[bytes]) -> bytes:
    size = len(values)
    head = bytes([size << 4 | kind]) if size < 15 else bytes([0xF0 | kind]) + varint(size)
    return head + b"".join(values)
