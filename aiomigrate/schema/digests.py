"""Digests of rows: whether what a value was computed from has changed since. Pure."""

from __future__ import annotations

import hashlib
import struct
from typing import Any

import pyarrow as pa

_NULL = b"\xff"


def digests(batch: pa.RecordBatch) -> list[int]:
    """Returns a digest of each row, a signed 64-bit integer, equal for equal values.

    It does not depend on how the rows are cut into batches, and tells NULL from everything else.
    """
    columns = [_texts(column) for column in batch.columns]
    if len(columns) == 1:
        texts = columns[0]
    else:
        texts = [
            b"".join([struct.pack("<I", len(part)) + part for part in row])
            for row in zip(*columns, strict=True)
        ]
    return [
        int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little", signed=True)
        for text in texts
    ]


def digest(value: object) -> int:
    """Returns the digest of one value, as `digests` has it for a batch of one text column."""
    short = hashlib.blake2b(_text(value), digest_size=8).digest()
    return int.from_bytes(short, "little", signed=True)


def _texts(column: Any) -> list[bytes]:
    kind = column.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return [_NULL if text is None else text.encode() for text in column.to_pylist()]
    if pa.types.is_fixed_size_list(kind) and _is_plain(kind.value_type):
        return _lists(column, kind)
    return [_text(value) for value in column.to_pylist()]


def _lists(column: Any, kind: Any) -> list[bytes]:
    """Returns the bytes of each list of numbers; one with NULL within, or none, as other values."""
    width = kind.list_size * (kind.value_type.bit_width // 8)
    values = column.values.slice(column.offset * kind.list_size, len(column) * kind.list_size)
    odd = set()
    if values.null_count:
        nulls = values.is_null().to_pylist()
        odd = {position // kind.list_size for position, null in enumerate(nulls) if null}
        values = values.fill_null(0)
    whole = memoryview(values.to_numpy(zero_copy_only=False)).cast("B")
    return [
        bytes(whole[row * width : (row + 1) * width])
        if row not in odd
        else _text(column[row].as_py())
        for row in range(len(column))
    ]


def _is_plain(kind: pa.DataType) -> bool:
    return pa.types.is_floating(kind) or pa.types.is_integer(kind)


def _text(value: object) -> bytes:
    if value is None:
        return _NULL
    if isinstance(value, str):
        return value.encode()
    return value if isinstance(value, bytes) else repr(value).encode()
