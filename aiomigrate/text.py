"""Plain text for people: durations, sizes, aligned tables, suggestions. Pure; imports nothing."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


def duration(seconds: float) -> str:
    """Returns a duration for people: `12 ms`, `3.4 s`, `2 min 5 s`, `1 h 30 min`."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{seconds // 60:.0f} min {seconds % 60:.0f} s"
    return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:.0f} min"


def bytes_text(value: float) -> str:
    """Returns a size for people: `812 B`, `3.4 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Returns aligned columns; `right` are the indexes of right-aligned ones."""
    widths = [max(len(r[i]) for r in (header, *rows)) for i in range(len(header))]
    lines = []
    for row in (header, ["-" * width for width in widths], *rows):
        cells = [
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def spell_spans(spans: Iterable[tuple[int, int]]) -> str:
    """Returns ranges of table_versions in words."""
    return ", ".join(f"{a}" if a == b else f"{a} to {b}" for a, b in spans)


def nearest(name: str, names: Iterable[str]) -> str:
    """Returns ` Did you mean 'x'?` for the closest of some names, or nothing."""
    close = difflib.get_close_matches(name, list(names), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def error_line(error: str | None) -> str:
    """Returns the telling line of an error: of a traceback that which names its last exception."""
    lines = [line.rstrip() for line in (error or "").splitlines() if line.strip()]
    if not lines:
        return ""
    if not lines[0].startswith("Traceback"):
        return lines[0].strip()
    last = max(i for i, line in enumerate(lines) if line.startswith("Traceback"))
    # Frames are indented; the exception is not, nor is what follows of a message of several lines.
    return next((line for line in lines[last + 1 :] if not line[0].isspace()), lines[-1].strip())
