"""Version 2: the scalar indexes of the first release.

The application recorded them under a line of their own, `indexes`, which is no table. Such a line
declares the tables it touches, and migrations that touch one table never run at once.
"""

from __future__ import annotations

from aiomigrate import Migration, op

BTREE = {
    "users": ("uid", "email", "phone"),
    "memos": ("memoId", "uid", "categoryId", "createdAt", "updatedAt"),
    "memo_relations": ("relationId", "uid", "sourceMemoId", "targetMemoId"),
    "categories": ("categoryId", "uid", "createdAt"),
    "embedding_cache": ("modelHash", "contentHash"),
    "attachments": ("attachmentId", "uid", "createdAt"),
    "multimodal_embedding_cache": ("modelHash", "contentHash"),
}

indexes = Migration(
    line="indexes",
    version=2,
    description="Index the keys, owners and times",
    touches=tuple(BTREE),
    depends_on=dict.fromkeys(BTREE, 1),
    operations=[
        *[
            op.CreateIndex(column, table=table)
            for table, columns in BTREE.items()
            for column in columns
        ],
        # Few distinct values: a bitmap is smaller and faster than a tree.
        op.CreateIndex("status", table="users", kind="Bitmap"),
        op.CreateIndex("modalityType", table="multimodal_embedding_cache", kind="Bitmap"),
    ],
)
