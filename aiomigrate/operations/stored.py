"""The state of a table as text, so that the journal can say what a migration found. Pure."""

from __future__ import annotations

import base64
import json
import zlib
from typing import Any

import pyarrow as pa

from aiomigrate.operations.base import EMBEDDING, TableState
from aiomigrate.operations.indexes import index_from, index_to


def encode(state: TableState | None) -> str | None:
    """Returns a state as text of some hundred characters, `None` for a table that is not there."""
    if state is None:
        return None
    told = (state.schema.metadata or {}).get(EMBEDDING)
    kept = state.schema if not state.witnesses() else pa.schema(state.fields())
    schema = kept.with_metadata({EMBEDDING: told} if told else {}).serialize().to_pybytes()
    indexes = json.dumps([{**index_to(i), "name": i.name} for i in state.indexes])
    whole = len(schema).to_bytes(4, "big") + schema + indexes.encode()
    if len(whole) > _SHORT:
        # With a small window: zlib's usual one is 256 KB of memory, fetched and given back each
        # time.
        packer = zlib.compressobj(wbits=12, memLevel=5)
        whole = packer.compress(whole) + packer.flush()
    return base64.b64encode(whole).decode()


_SHORT = 1000
"""Bytes that take longer to compress than to write."""


def decode(text: str | None) -> TableState | None:
    """Returns the state of `encode`.

    Raises:
        ValueError: The text is none that `encode` made.
    """
    if text is None:
        return None
    try:
        whole = base64.b64decode(text)
        if not whole.startswith(b"\0"):  # which no compressed text does
            whole = zlib.decompress(whole)
        length = int.from_bytes(whole[:4], "big")
        schema = pa.ipc.read_schema(pa.py_buffer(whole[4 : 4 + length]))
        indexes: list[Any] = json.loads(whole[4 + length :])
        return TableState(schema, tuple(index_from(index) for index in indexes))
    except (zlib.error, pa.ArrowException, OSError, TypeError, KeyError) as exc:
        raise ValueError("no stored state") from exc
