"""Parquet files of a few bytes that say gigabytes of text."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as parquet

SAME = "a" * 10_000_000


def repeated(path: str) -> None:
    parquet.write_table(
        pa.table({"text": pa.DictionaryArray.from_arrays(pa.array([0] * 300, pa.int32()), pa.array([SAME]))}),
        path,
        compression="zstd",
    )


def packed(path: str) -> None:
    parquet.write_table(pa.table({"text": [SAME] * 29}), path, compression="zstd", use_dictionary=False)


def one_value(path: str) -> None:
    parquet.write_table(pa.table({"text": ["a" * 30_000_000]}), path, compression="zstd", use_dictionary=False)


def one_page(path: str) -> None:
    parquet.write_table(pa.table({"text": ["a" * 600_000_000]}), path, compression="zstd", use_dictionary=False)


def one_row(path: str) -> None:
    """Of which a list says one text many times."""
    same = pa.DictionaryArray.from_arrays(pa.array([0] * 3_000, pa.int32()), pa.array(["a" * 1_000_000]))
    turns = pa.StructArray.from_arrays([pa.array(["user"] * 3_000), same], ["role", "content"])
    messages = pa.ListArray.from_arrays(pa.array([0, 3_000], pa.int32()), turns)
    parquet.write_table(pa.table({"messages": messages}), path, compression="zstd")


def shared_beginnings(path: str) -> None:
    """In lists, where every value but the first stores nothing of its own."""
    texts = pa.array([[{"role": "user", "content": "a" * 1_000_000}] * 600])
    parquet.write_table(
        pa.table({"messages": texts}),
        path,
        compression="zstd",
        use_dictionary=False,
        column_encoding={"messages.list.element.content": "DELTA_BYTE_ARRAY", "messages.list.element.role": "PLAIN"},
    )
