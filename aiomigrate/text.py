"""Formats text for users: durations, sizes, tables, suggestions. Pure; only the standard library.

Not for logs or JSON, which hold plain values.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


def duration(seconds: float) -> str:
    """Returns a number of seconds as text: `12 ms`, `3.4 s`, `2 min 5 s`, `1 h 30 min`."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{seconds // 60:.0f} min {seconds % 60:.0f} s"
    return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:.0f} min"


def bytes_text(value: float) -> str:
    """Returns a number of bytes as text, in powers of 1000: `812 B`, `3.4 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Returns a text table with aligned columns.

    Args:
        header: The column titles.
        rows: The cells; each row is as long as the header. Without rows, only the header is shown.
        right: Indexes of the right-aligned columns.
    """
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
    """Returns inclusive ranges of table_versions as text: `3 to 5, 8`. Empty without ranges."""
    return ", ".join(f"{a}" if a == b else f"{a} to {b}" for a, b in spans)


def nearest(name: str, names: Iterable[str]) -> str:
    """Returns ` Did you mean 'x'?` with the name closest to `name`, or an empty string."""
    close = difflib.get_close_matches(name, list(names), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def error_line(error: str | None) -> str:
    """Returns the most useful line of an error text; empty without one.

    In a traceback this is the line that names the last exception, else the first line.
    """
    lines = [line.rstrip() for line in (error or "").splitlines() if line.strip()]
    if not lines:
        return ""
    if not lines[0].startswith("Traceback"):
        return lines[0].strip()
    last = max(i for i, line in enumerate(lines) if line.startswith("Traceback"))
    # Frames are indented; the exception and the rest of a multi-line message are not.
    return next((line for line in lines[last + 1 :] if not line[0].isspace()), lines[-1].strip())
