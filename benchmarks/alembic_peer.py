"""Alembic on SQLite with nothing to do: what a start costs where migrations are long established.

The least that it can be: one revision, an `env.py` that only connects and runs.
"""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config

_ENV = """\
from alembic import context
from sqlalchemy import create_engine, pool

engine = create_engine(context.config.get_main_option("sqlalchemy.url"), poolclass=pool.NullPool)
with engine.connect() as connection:
    context.configure(connection=connection)
    with context.begin_transaction():
        context.run_migrations()
"""

_REVISION = """\
import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade():
    op.create_table("notes", sa.Column("id", sa.Integer, primary_key=True))
"""


def prepare(folder: Path) -> Config:
    """Writes a script folder, and a database at its newest revision."""
    scripts = folder / "alembic"
    (scripts / "versions").mkdir(parents=True)
    (scripts / "env.py").write_text(_ENV, encoding="utf-8")
    (scripts / "script.py.mako").write_text("", encoding="utf-8")
    (scripts / "versions" / "0001_notes.py").write_text(_REVISION, encoding="utf-8")
    config = Config()
    config.set_main_option("script_location", str(scripts))
    config.set_main_option("sqlalchemy.url", f"sqlite:///{folder / 'notes.sqlite'}")
    command.upgrade(config, "head")
    return config


async def start(config: Config) -> None:
    """Upgrades, which has nothing to do. It blocks, as Alembic does."""
    command.upgrade(config, "head")
