"""Makes the databases in `killed/`, which a process of release 0.1.0 left when it was killed.

They prove that a later release goes on where that one was interrupted (see
`tests/guarantees/test_older_release_killed.py`). This was run once, with the wheel in `released/`,
which was built at the last commit before the modules of the package were reorganised. The archives
must not be made anew with a newer release: they would prove nothing of databases in the field. So
the process that is killed is always one of that wheel. For a case that is new, its archive is
added; archives that are there stay as they are.

    python -m tests.data.make_killed
"""

from __future__ import annotations

import io
import sys
import tarfile
import tempfile
from pathlib import Path

from tests.guarantees.killed_scripts import BEFORE, KILLED, TABLE
from tests.guarantees.releases import DATA, RELEASED, processes

FOLDER = DATA / "killed"
OPTIONS = {"lease_ttl": 0.5, "concurrency": 1}


def kill(name: str, database: Path) -> None:
    """Migrates a database until the process is killed."""
    killed = KILLED[name]
    with processes(RELEASED) as (process,):
        assert process.package.startswith(f"{RELEASED}/"), process.package
        target = {} if killed.is_undoing else {"to": BEFORE}
        told = process.call(database, name, "upgrade", options=OPTIONS, **target)
        assert "error" not in told, told
        back = {"line": TABLE, "to": BEFORE} if killed.is_undoing else {}
        process.prepare(database, name, killed.does, options=OPTIONS, kills=True, **back)
        process.begin()
        told_last = process.end()
        assert told_last is None, f"{name} was not killed: {told_last}"


def pack(database: Path, archive: Path) -> None:
    """Packs a database without times, owners and rights."""

    def plain(info: tarfile.TarInfo) -> tarfile.TarInfo:
        info.uid = info.gid = info.mtime = 0
        info.uname = info.gname = ""
        return info

    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz", compresslevel=9) as tar:
        tar.add(database, arcname="database", filter=plain)
    archive.write_bytes(packed.getvalue())


def main() -> None:
    """Makes the archives that are missing."""
    FOLDER.mkdir(exist_ok=True)
    for name in KILLED:
        archive = FOLDER / f"{name}.tar.gz"
        if archive.exists():
            continue
        with tempfile.TemporaryDirectory(prefix="aiomigrate-") as folder:
            database = Path(folder) / "database"
            kill(name, database)
            pack(database, archive)
        sys.stdout.write(f"{archive.name}: {archive.stat().st_size} bytes\n")


if __name__ == "__main__":
    main()
