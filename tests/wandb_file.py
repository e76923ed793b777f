"""Reads an offline W&B run back: a LevelDB log of 32 KiB blocks that holds protobuf records."""

from __future__ import annotations

import json
import struct
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

HEADER, BLOCK = 7, 32768


def records(path: Path) -> Iterator:
    """Yields the records of one ``run-*.wandb`` file; a torn last one is left out."""
    from wandb.proto.wandb_internal_pb2 import Record

    data = path.read_bytes()
    assert data[:4] == b":W&B"
    position, pieces = HEADER, b""
    while position + HEADER <= len(data):
        left = BLOCK - position % BLOCK
        if left < HEADER:
            position += left
            continue
        checksum, size, kind = struct.unpack("<IHB", data[position : position + HEADER])
        body = data[position + HEADER : position + HEADER + size]
        if not kind or len(body) < size:
            return
        assert zlib.crc32(bytes([kind]) + body) == checksum
        position += HEADER + size
        pieces = body if kind in (1, 2) else pieces + body  # 1 whole, 2 first, 3 middle, 4 last piece
        if kind in (1, 4):
            yield Record.FromString(pieces)


def read(directory: Path, patience: float = 30.0) -> dict[str, list]:
    """Returns {record type: [records]} of the only run in ``directory`` (``.../wandb``), once it has ended.

    W&B's own process writes the file: on a busy machine its last blocks come after ``finish`` has returned.
    """
    deadline = time.monotonic() + patience
    while True:
        (path,) = directory.glob("offline-run-*/run-*.wandb")
        found: dict[str, list] = {}
        for record in records(path):
            kind = record.WhichOneof("record_type")
            found.setdefault(kind, []).append(getattr(record, kind))
        if "exit" in found or time.monotonic() > deadline:
            return found
        time.sleep(0.2)


def values(items) -> dict:
    """Returns {key: decoded value} of a history, config or summary record's items."""
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}
