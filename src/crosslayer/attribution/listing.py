"""Rows of an aggregate or a contrast as CSV: records inside records become columns."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from crosslayer.files import write_csv

IMPLIED = ("role", "value")
"""Names of fields that say nothing in the name of a column."""
FIRST = ("role", "source", "target")
"""Fields whose columns come first: what a row is about."""


def write_rows(path: Path, rows: Sequence[Any]) -> None:
    """Write records of one kind, atomically; a column is named as in `influence`, `influence_low`, `source_layer`."""
    flattened = [_flat(asdict(row)) for row in rows]
    write_csv(path, list(flattened[0]) if rows else [], [list(row.values()) for row in flattened])


def _flat(record: Mapping[str, Any], *before: str) -> dict[str, Any]:
    found = {}
    for name, value in sorted(record.items(), key=lambda item: item[0] not in FIRST):
        path = before if name in IMPLIED else (*before, name)
        found |= _flat(value, *path) if isinstance(value, Mapping) else {"_".join(path): value}
    return found
