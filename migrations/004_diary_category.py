"""Version 4: a "日记" (diary) category for every user who has none.

The work is a loop over rows, which no operation can say, so this is a function. It must be
idempotent: it first reads what is there, and the new ids derive from the users, so that running it
again finds what it wrote. It reads in batches and writes once: one commit, not one for each user.
"""

from __future__ import annotations

import datetime as dt
import uuid
from typing import Any

from aiomigrate import Context, Migration

NAME = "日记"
NAMESPACE = uuid.UUID("6f2c1a0e-8a57-5d0b-9d53-0d1f6b1c4e04")
"""Of the ids made here; never change it."""


async def add_diary_categories(context: Context) -> None:
    """Adds the category to each user without one of that name."""
    users, categories = context.table("users"), context.table("categories")
    served: set[Any] = set()
    async for batch in categories.batches(f"name = '{NAME}'", ["uid"]):
        served.update(batch["uid"].to_pylist())
    now = dt.datetime.now(dt.UTC).replace(tzinfo=None)  # the column is UTC without a time zone
    rows = []
    async for batch in users.batches(columns=["uid"]):
        for uid in batch["uid"].to_pylist():
            if uid is None or uid in served:
                continue
            served.add(uid)
            rows.append(
                {
                    "categoryId": str(uuid.uuid5(NAMESPACE, uid)),
                    "uid": uid,
                    "name": NAME,
                    "color": None,
                    "createdAt": now,
                    "updatedAt": now,
                }
            )
        context.progress(len(rows))
    await categories.add(rows)


categories = Migration(
    table="categories",
    version=4,
    description="Give every user a diary category",
    touches=("categories", "users"),
    depends_on={"users": 1},
    up=add_diary_categories,
)
