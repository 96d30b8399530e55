"""The Arrow schemas of the two metadata tables, and the conversion of records to and from rows.

Pure: reading and writing the tables is for `ledger.ledger`. The names of tables, columns and JSON
keys are stored in users' databases, pinned by tests, and never change.
"""

from __future__ import annotations

import datetime as dt
import json
import operator
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from aiomigrate.errors import LedgerCorruptError, LedgerFormatError
from aiomigrate.ledger.records import NOT_YET, Event, HeadRow
from aiomigrate.ledger.validation import fault_of
from aiomigrate.migration.model import MAX_VERSION

FORMAT = 1
"""Format version of the metadata tables; a table of a higher version is refused."""

LEASE_PREFIX = ":lease:"
"""Prefix of the names of lease rows; no table and no line can have such a name."""

PRIMARY_KEY = b"lance-schema:unenforced-primary-key"
_FORMAT_KEY = b"aiomigrate:format"

_KEYED = {PRIMARY_KEY: b"true"}
ADDED_FIELDS: tuple[pa.Field[Any], ...] = (
    pa.field("epoch", pa.int64(), metadata={_FORMAT_KEY: str(FORMAT).encode()}),
    pa.field("owner", pa.string()),
    pa.field("beat", pa.int64()),
    pa.field("phase", pa.string()),
    pa.field("digest", pa.string()),
    pa.field("lease", pa.string()),
)
"""The columns that aiomigrate adds to a head that another system created."""

_HEAD_FIELDS: list[pa.Field[Any]] = [
    pa.field("tableName", pa.string(), nullable=False, metadata=_KEYED),
    pa.field("currentVersion", pa.int32(), nullable=False),
    pa.field("lastMigratedAt", pa.timestamp("ms"), nullable=False),
    *ADDED_FIELDS,
]
_JOURNAL_FIELDS: list[pa.Field[Any]] = [
    pa.field("id", pa.string(), nullable=False, metadata=_KEYED),
    pa.field("lease", pa.string(), nullable=False),
    pa.field("epoch", pa.int64(), nullable=False, metadata={_FORMAT_KEY: str(FORMAT).encode()}),
    pa.field("seq", pa.int64(), nullable=False),
    pa.field("at", pa.timestamp("us", tz="UTC"), nullable=False),
    pa.field("kind", pa.string(), nullable=False),
    pa.field("run_id", pa.string()),
    pa.field("line", pa.string()),
    pa.field("version", pa.int32()),
    pa.field("description", pa.string()),
    pa.field("checksum", pa.string()),
    pa.field("algorithm", pa.string()),
    pa.field("source", pa.string()),
    pa.field("tables", pa.string()),
    pa.field("waited_s", pa.float64()),
    pa.field("ran_s", pa.float64()),
    pa.field("ledger_s", pa.float64()),
    pa.field("rows", pa.int64()),
    pa.field("commits", pa.int64()),
    pa.field("size", pa.int64()),
    pa.field("retries", pa.int64()),
    pa.field("host", pa.string()),
    pa.field("pid", pa.int64()),
    pa.field("tool", pa.string()),
    pa.field("error", pa.string()),
    pa.field("detail", pa.string()),
]
HEAD_SCHEMA = pa.schema(_HEAD_FIELDS)
JOURNAL_SCHEMA = pa.schema(_JOURNAL_FIELDS)
_JSON = ("tables", "detail")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stamp:
    """The fields that all events of one journal commit share.

    Attributes:
        seq: Sequence number of the first event; the following events count up from it.
        at: Time of the events that have none of their own, UTC.
        common: Other fields, by name.
    """

    seq: int
    at: dt.datetime
    common: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """The content of the head.

    Attributes:
        exists: Whether the table exists.
        rows: One row per line, unordered; duplicates are possible if another system wrote them.
        leases: The lease rows by key.
        is_adopted: Whether the table has the columns that aiomigrate adds.
    """

    exists: bool = False
    rows: tuple[HeadRow, ...] = ()
    leases: Mapping[str, HeadRow] = field(default_factory=dict)
    is_adopted: bool = False


# ---- rows and events as Arrow -------------------------------------------------------------------


def lease_row_name(key: str) -> str:
    """Returns the name of a lease's row in the head."""
    return LEASE_PREFIX + key


def lease_row(
    key: str,
    *,
    at: dt.datetime,
    epoch: int = 0,
    owner: str = "",
    beat: int = 0,
    phase: str = "",
) -> HeadRow:
    """Returns the head row of a lease; without an owner the lease is free."""
    return HeadRow(
        name=lease_row_name(key),
        version=0,
        migrated_at=at,
        epoch=epoch,
        owner=owner,
        beat=beat,
        phase=phase,
        lease=key,
    )


def rows_to_arrow(rows: Iterable[HeadRow]) -> pa.Table:
    """Returns head rows as an Arrow table of `HEAD_SCHEMA`."""
    return pa.Table.from_pylist(
        [
            {
                "tableName": row.name,
                "currentVersion": row.version,
                "lastMigratedAt": row.migrated_at.replace(tzinfo=None),
                "epoch": row.epoch,
                "owner": row.owner,
                "beat": row.beat,
                "phase": row.phase,
                "digest": row.digest,
                "lease": row.lease,
            }
            for row in rows
        ],
        schema=HEAD_SCHEMA,
    )


def events_to_arrow(events: Iterable[Event], owner: str, stamp: Stamp | None = None) -> pa.Table:
    """Returns events as an Arrow table of `JOURNAL_SCHEMA`.

    Args:
        events: The events.
        owner: The writer's nonce; with lease, epoch and sequence number it makes the id unique.
        stamp: Fields to set on all events, `None` if the events have them already.
    """
    rows: list[dict[str, Any]] = []
    common = {} if stamp is None else dict(stamp.common)
    for number, event in enumerate(events):
        row = dict(zip(_EVENT_FIELDS, _field_values(event), strict=True)) | common
        if stamp is not None:
            row["seq"] = stamp.seq + number
            row["at"] = stamp.at if event.at == NOT_YET else event.at
        row["id"] = f"{row['lease']}:{row['epoch']}:{row['seq']}:{owner}"
        row["kind"] = str(event.kind)
        for name in _JSON:
            row[name] = _as_json(row[name]) if row[name] else None
        rows.append(row)
    # For the few rows of most commits, structs are four times as fast as separate columns.
    structs: Any = pa.array(rows, _EVENT_TYPE)
    return pa.Table.from_struct_array(structs)


_as_json = json.JSONEncoder(ensure_ascii=False).encode
_EVENT_TYPE = pa.struct(list(JOURNAL_SCHEMA))
_EVENT_FIELDS = [name for name in JOURNAL_SCHEMA.names if name != "id"]
_field_values = operator.attrgetter(*_EVENT_FIELDS)


def parse_head(content: pa.Table, name: str) -> Head:
    """Returns the content of a head as values.

    Args:
        content: All rows. Columns that aiomigrate adds may be missing.
        name: Name of the table, for errors.

    Raises:
        LedgerCorruptError: A column is missing or has another type, or a value is invalid.
        LedgerFormatError: A newer release of aiomigrate wrote the table.
    """
    _check_columns(content.schema, HEAD_SCHEMA, name, required=3)
    adopted = all(f.name in content.schema.names for f in ADDED_FIELDS)
    if adopted:
        _check_format(content.schema, name)
    columns = [n for n in HEAD_SCHEMA.names if n in content.schema.names]
    values = {column: content[column].to_pylist() for column in columns}
    empty = [None] * len(content)
    rows: list[HeadRow] = []
    leases: dict[str, HeadRow] = {}
    zipped = zip(*(values.get(n, empty) for n in HEAD_SCHEMA.names), strict=True)
    for table, version, at, epoch, owner, beat, phase, digest, lease in zipped:
        if not isinstance(table, str) or not isinstance(version, int) or at is None:
            raise LedgerCorruptError(
                f"The metadata table {name!r} has a row with NULL: "
                f"tableName {table!r}, currentVersion {version!r}.",
                "Correct the row, or restore an earlier table_version of that table.",
            )
        if not 0 <= version <= MAX_VERSION:
            raise LedgerCorruptError(
                f"The metadata table {name!r} records version {version} for {table!r}.",
                "Versions are 0 or more: correct the row.",
                line=table,
                version=version,
            )
        row = HeadRow(
            name=table,
            version=version,
            migrated_at=at.replace(tzinfo=dt.UTC),
            epoch=epoch,
            owner=owner,
            beat=beat,
            phase=phase,
            digest=digest,
            lease=lease,
        )
        if table.startswith(LEASE_PREFIX):
            leases[table.removeprefix(LEASE_PREFIX)] = row
        else:
            rows.append(row)
    return Head(exists=True, rows=tuple(rows), leases=leases, is_adopted=adopted)


def _repeated(names: Sequence[str]) -> set[str]:
    return {name for name, count in Counter(names).items() if count > 1}


def versions_if_current(
    content: pa.Table, versions: Mapping[str, int], digests: Mapping[str, str]
) -> dict[str, int] | None:
    """Returns the version of every line if the head proves that no line has to change.

    Every start calls this, so it reads few columns, builds no rows, and makes one pass (Arrow's
    own comparisons take longer: 0.3 ms even if there is nothing to compare).

    Args:
        content: All rows of the head.
        versions: Target version, by line.
        digests: Chain digest at the target, by line.

    Returns:
        The recorded version by line, lines without scripts included; `None` if the head does not
        prove it, which calls for a full check.
    """
    if not content.schema.equals(HEAD_SCHEMA, check_metadata=False):
        return None
    if _format_of(content.schema) != FORMAT:
        return None
    columns = ("tableName", "currentVersion", "digest")
    values: list[list[Any]] = [content[column].to_pylist() for column in columns]
    names, found, marks = values
    if content["epoch"].null_count:
        # Rows of lines without scripts stay as other systems left them, duplicates included.
        epochs = content["epoch"].to_pylist()
        foreign = {name for name, epoch in zip(names, epochs, strict=True) if epoch is None}
        if not foreign.isdisjoint(versions):
            return None
    others = {
        name: version
        for name, version, mark in zip(names, found, marks, strict=True)
        if versions.get(name) != version or digests.get(name) != mark
    }
    unique = set(names)
    if not others.keys().isdisjoint(versions) or len(unique) != len(versions) + len(others):
        return None
    if len(unique) != len(names) and not versions.keys().isdisjoint(_repeated(names)):
        return None
    return {**versions, **{n: v for n, v in others.items() if not n.startswith(LEASE_PREFIX)}}


def parse_journal(content: pa.Table, name: str) -> list[Event]:
    """Returns the events of a journal as values, in the order of the rows.

    Args:
        content: All rows, of `JOURNAL_SCHEMA`.
        name: Name of the table, for errors.

    Raises:
        LedgerCorruptError: A column is missing or has another type, or a value is invalid.
        LedgerFormatError: A newer release of aiomigrate wrote the table.
    """
    _check_columns(content.schema, JOURNAL_SCHEMA, name, required=len(JOURNAL_SCHEMA))
    _check_format(content.schema, name)
    fields = [n for n in JOURNAL_SCHEMA.names if n != "id"]
    events = []
    for row in content.select(fields).to_pylist():
        for column in _JSON:
            row[column] = _json_object(row[column])
            if row[column] is None:
                raise LedgerCorruptError(
                    f"The metadata table {name!r} has an event whose {column!r} is not a JSON "
                    f"object (epoch {row['epoch']}, seq {row['seq']}).",
                    "Restore an earlier table_version of that table.",
                )
        if None in (row["lease"], row["epoch"], row["seq"], row["at"], row["kind"]):
            raise LedgerCorruptError(
                f"The metadata table {name!r} has an event with NULL "
                f"(kind {row['kind']!r}, epoch {row['epoch']}, seq {row['seq']}).",
                "Restore an earlier table_version of that table.",
            )
        event = Event(**row)
        if fault := fault_of(event):
            raise LedgerCorruptError(
                f"The metadata table {name!r} has an event of kind {event.kind!r} with {fault} "
                f"(epoch {event.epoch}, seq {event.seq}).",
                "Restore an earlier table_version of that table.",
            )
        events.append(event)
    return events


def _json_object(text: str | None) -> dict[str, Any] | None:
    if not text:
        return {}
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


_NOT_A_LEDGER = (
    "The table is not a ledger of aiomigrate: choose another ledger name, or restore the table."
)


def _check_columns(have: pa.Schema, want: pa.Schema, name: str, *, required: int) -> None:
    for position, wanted in enumerate(want):
        index = have.get_field_index(wanted.name)
        if index < 0:
            if position < required:
                raise LedgerCorruptError(
                    f"The metadata table {name!r} has no column {wanted.name!r}.",
                    _NOT_A_LEDGER,
                )
            continue
        if have.field(index).type != wanted.type:
            raise LedgerCorruptError(
                f"The metadata table {name!r} has column {wanted.name!r} of type "
                f"{have.field(index).type}, not {wanted.type}.",
                _NOT_A_LEDGER,
            )


def _check_format(schema: pa.Schema, name: str) -> None:
    found = _format_of(schema)
    if found > FORMAT:
        raise LedgerFormatError(
            f"The metadata table {name!r} has format {found}; "
            f"this release of aiomigrate supports formats up to {FORMAT}.",
            "Upgrade aiomigrate.",
        )


def _format_of(schema: pa.Schema) -> int:
    written = (schema.field("epoch").metadata or {}).get(_FORMAT_KEY, b"1")
    return int(written) if written.isdigit() else MAX_VERSION
