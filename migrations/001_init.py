"""Version 1: the tables of the first release.

A migration belongs to the line of its table, and a file may hold several. Each file freezes the
schemas it needs: it never imports the application's models, which go on changing.

The dimension of the text vectors depends on the embedding model that is deployed, so it is a
parameter of the run (`-x dimension=768`); `operations` is then a function of the parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from aiomigrate import Migration, op

VERSION = 1
TIME = pa.timestamp("ms")
MULTIMODAL_VECTOR = pa.list_(pa.float32(), 1024)


def required(name: str, kind: pa.DataType) -> pa.Field[Any]:
    """Returns a NOT NULL field."""
    return pa.field(name, kind, nullable=False)


def text_vector(params: Mapping[str, Any]) -> pa.DataType:
    """Returns the type of a text embedding for a run's parameters."""
    return pa.list_(pa.float32(), int(params.get("dimension", 1536)))


users = Migration(
    table="users",
    version=VERSION,
    description="Create users",
    operations=[
        op.CreateTable(
            pa.schema(
                [
                    required("uid", pa.string()),
                    pa.field("email", pa.string()),
                    pa.field("phone", pa.string()),
                    required("password", pa.string()),
                    required("salt", pa.string()),
                    pa.field("nickname", pa.string()),
                    required("status", pa.int32()),
                    required("createdAt", TIME),
                    required("updatedAt", TIME),
                ]
            )
        )
    ],
)


def create_memos(params: Mapping[str, Any]) -> list[op.Operation]:
    """Creates memos with a text vector of the given dimension."""
    schema = pa.schema(
        [
            required("memoId", pa.string()),
            required("uid", pa.string()),
            pa.field("categoryId", pa.string()),
            required("content", pa.string()),
            pa.field("attachments", pa.list_(pa.string())),
            required("embedding", text_vector(params)),
            required("createdAt", TIME),
            required("updatedAt", TIME),
        ]
    )
    return [op.CreateTable(schema)]


memos = Migration(
    table="memos",
    version=VERSION,
    description="Create memos",
    operations=create_memos,
)

memo_relations = Migration(
    table="memo_relations",
    version=VERSION,
    description="Create memo_relations",
    operations=[
        op.CreateTable(
            pa.schema(
                [
                    required("relationId", pa.string()),
                    required("uid", pa.string()),
                    required("sourceMemoId", pa.string()),
                    required("targetMemoId", pa.string()),
                    required("createdAt", TIME),
                ]
            )
        )
    ],
)

categories = Migration(
    table="categories",
    version=VERSION,
    description="Create categories",
    operations=[
        op.CreateTable(
            pa.schema(
                [
                    required("categoryId", pa.string()),
                    required("uid", pa.string()),
                    required("name", pa.string()),
                    pa.field("color", pa.string()),
                    required("createdAt", TIME),
                    required("updatedAt", TIME),
                ]
            )
        )
    ],
)


def create_embedding_cache(params: Mapping[str, Any]) -> list[op.Operation]:
    """Creates embedding_cache with a text vector of the given dimension."""
    schema = pa.schema(
        [
            required("modelHash", pa.string()),
            required("contentHash", pa.string()),
            required("embedding", text_vector(params)),
            required("createdAt", TIME),
        ]
    )
    return [op.CreateTable(schema)]


embedding_cache = Migration(
    table="embedding_cache",
    version=VERSION,
    description="Create embedding_cache",
    operations=create_embedding_cache,
)

attachments = Migration(
    table="attachments",
    version=VERSION,
    description="Create attachments",
    operations=[
        op.CreateTable(
            pa.schema(
                [
                    required("attachmentId", pa.string()),
                    required("uid", pa.string()),
                    required("filename", pa.string()),
                    required("type", pa.string()),
                    required("size", pa.int32()),
                    required("storageType", pa.string()),
                    required("path", pa.string()),
                    pa.field("bucket", pa.string()),
                    pa.field("prefix", pa.string()),
                    pa.field("endpoint", pa.string()),
                    pa.field("region", pa.string()),
                    pa.field("isPublicBucket", pa.string()),
                    pa.field("multimodalEmbedding", MULTIMODAL_VECTOR),
                    pa.field("multimodalModelHash", pa.string()),
                    required("createdAt", TIME),
                ]
            )
        )
    ],
)

multimodal_embedding_cache = Migration(
    table="multimodal_embedding_cache",
    version=VERSION,
    description="Create multimodal_embedding_cache",
    operations=[
        op.CreateTable(
            pa.schema(
                [
                    required("modelHash", pa.string()),
                    required("contentHash", pa.string()),
                    required("modalityType", pa.string()),
                    required("embedding", MULTIMODAL_VECTOR),
                    required("createdAt", TIME),
                ]
            )
        )
    ],
)

daily_recommendations = Migration(
    table="daily_recommendations",
    version=VERSION,
    description="Create daily_recommendations",
    operations=[
        op.CreateTable(
            pa.schema(
                [
                    required("recommendationId", pa.string()),
                    required("uid", pa.string()),
                    required("date", pa.string()),
                    required("memoIds", pa.list_(pa.string())),
                    required("createdAt", TIME),
                ]
            )
        )
    ],
)
