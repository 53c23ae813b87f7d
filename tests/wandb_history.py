"""The history of an offline W&B run, read from its `run-*.wandb` file.

The file is a LevelDB log (github.com/google/leveldb, doc/log_format.md) behind a header of seven bytes: blocks of
32 KiB of records `crc 4, length 2, type 1, data`. Type 1 is a whole record; 2, 3, 4 are its first, middle, last part.
"""

import json
import struct
from pathlib import Path

from wandb.proto import wandb_internal_pb2

BLOCK, HEADER = 32768, 7


def records(path: Path):
    """Every record of the file as protobuf."""
    data = path.read_bytes()
    assert data[:4] == b":W&B", f"{path} is no W&B file"
    at, parts = HEADER, b""
    while at + HEADER <= len(data):
        if BLOCK - at % BLOCK < HEADER:  # too short for a record: zeros up to the next block
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + HEADER])
        parts += data[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def history(path: Path) -> list[dict]:
    """The rows that were logged: key -> value; an image or a table, which is logged in parts, is a mapping of them."""
    rows = []
    for record in records(path):
        if record.WhichOneof("record_type") == "history":
            row: dict = {}
            for item in record.history.item:
                key, *part = item.nested_key or [item.key]
                if part:
                    row.setdefault(key, {})["/".join(part)] = json.loads(item.value_json)
                else:
                    row[key] = json.loads(item.value_json)
            rows.append(row)
    return rows
