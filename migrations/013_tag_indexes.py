"""Version 13: indexes of tags."""

from __future__ import annotations

from aiomigrate import Migration, op

tags = Migration(
    table="tags",
    version=13,
    description="Index tags by key, owner and time",
    operations=[op.CreateIndex("tagId"), op.CreateIndex("uid"), op.CreateIndex("createdAt")],
)
