"""Reads a .wandb file back: a LevelDB log (7 bytes of header, blocks of 32 KiB) of wandb's protobuf records."""

import json
import struct


def records(file):
    """Every wandb_internal_pb2.Record of the file, in order."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts, found = file.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        room = 32768 - at % 32768
        if room < 7:  # too little for a header: the rest of the block is empty
            at += room
            continue
        _crc, size, kind = struct.unpack("<IHB", data[at : at + 7])
        if kind == 0:
            break
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            record = Record()
            record.ParseFromString(parts)
            found.append(record)
            parts = b""
    return found


def items(update):
    """{'a.b': value} of a list of key and JSON value."""
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in update}


def read(file):
    """(config, history rows, kinds of records) of a .wandb file."""
    all_records = records(file)
    config = {}
    for record in all_records:
        if record.WhichOneof("record_type") == "run":
            config |= items(record.run.config.update)
        if record.WhichOneof("record_type") == "config":
            config |= items(record.config.update)
    history = [items(r.history.item) for r in all_records if r.WhichOneof("record_type") == "history"]
    return config, history, {r.WhichOneof("record_type") for r in all_records}
