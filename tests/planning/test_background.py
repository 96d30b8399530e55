"""What a start does not wait for: follows from scripts and versions alone."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from aiomigrate.migration.model import Script, Scripts
from aiomigrate.planning.background import IDLE, Busy, defer
from aiomigrate.planning.dependencies import ordered

LINES = ("a", "b", "c")


def script(line: str, version: int, background: bool, extra: tuple[str, ...]) -> Script:
    """Returns a pending migration."""
    return Script(
        line=line, version=version, description="", operations=(), depends_on={}, checksum="c",
        touches=tuple(sorted({line, *extra})), table=line, background=background,
    )  # fmt: skip


scripts = st.lists(
    st.builds(
        script,
        st.sampled_from(LINES),
        st.integers(1, 4),
        st.booleans(),
        st.lists(st.sampled_from(LINES), max_size=1).map(tuple),
    ),
    max_size=8,
    unique_by=lambda s: s.key,
)


@settings(max_examples=300, deadline=None)
@given(scripts, st.sets(st.sampled_from(LINES)), st.sets(st.sampled_from(LINES)))
def test_what_is_deferred(drawn: list[Script], existing: set[str], busy: set[str]) -> None:
    """All that is marked and has data, all that is in hand, all that follows; nothing else."""
    pend = {s.key: s for s in drawn}
    order = ordered(drawn, {}, Scripts(tuple(drawn)))
    held = Busy(lines=frozenset(busy), holder="somebody") if busy else IDLE
    found = defer(pend, order, existing, held)
    for key, one in pend.items():
        follows = bool(found & set(order.before[key]))
        marked = one.background and bool(set(one.touches) & existing)
        assert (key in found) == (marked or one.line in busy or follows)
    if not busy and not any(s.background for s in drawn):
        assert not found
