"""Digests of rows, which show whether the inputs of a computed value have changed. Pure."""

from __future__ import annotations

import hashlib
import struct
from typing import Any

import pyarrow as pa

_NULL = b"\xff"


def digests(batch: pa.RecordBatch) -> list[int]:
    """Returns a digest of each row, a signed 64-bit integer; equal rows have equal digests.

    A digest does not depend on how the rows are split into batches, and NULL differs from every
    other value.
    """
    columns = [_column_bytes(column) for column in batch.columns]
    if len(columns) == 1:
        rows = columns[0]
    else:
        rows = [
            b"".join([struct.pack("<I", len(part)) + part for part in row])
            for row in zip(*columns, strict=True)
        ]
    return [
        int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little", signed=True)
        for text in rows
    ]


def digest(value: object) -> int:
    """Returns the digest of one value, as `digests` computes it for a batch of one text column."""
    short = hashlib.blake2b(_value_bytes(value), digest_size=8).digest()
    return int.from_bytes(short, "little", signed=True)


def _column_bytes(column: Any) -> list[bytes]:
    kind = column.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return [_NULL if text is None else text.encode() for text in column.to_pylist()]
    if pa.types.is_fixed_size_list(kind) and _is_number(kind.value_type):
        return _list_bytes(column, kind)
    return [_value_bytes(value) for value in column.to_pylist()]


def _list_bytes(column: Any, kind: Any) -> list[bytes]:
    """Returns the bytes of each list of numbers.

    NULL, and a list that contains NULL, are converted like values of other types.
    """
    width = kind.list_size * (kind.value_type.bit_width // 8)
    values = column.values.slice(column.offset * kind.list_size, len(column) * kind.list_size)
    with_null = set()
    if values.null_count:
        nulls = values.is_null().to_pylist()
        with_null = {position // kind.list_size for position, null in enumerate(nulls) if null}
        values = values.fill_null(0)
    whole = memoryview(values.to_numpy(zero_copy_only=False)).cast("B")
    return [
        bytes(whole[row * width : (row + 1) * width])
        if row not in with_null
        else _value_bytes(column[row].as_py())
        for row in range(len(column))
    ]


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_floating(kind) or pa.types.is_integer(kind)


def _value_bytes(value: object) -> bytes:
    if value is None:
        return _NULL
    if isinstance(value, str):
        return value.encode()
    return value if isinstance(value, bytes) else repr(value).encode()
