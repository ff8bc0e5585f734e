"""Any images, listed in a table: path, pid, camid, split, as CSV or Parquet.

Rows are read block by block into arrays: ten million take seconds with pyarrow, about three times as long without.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..split import Split, encode
from .files import BLOCK, Options, RawDataset, in_blocks

SPLITS = ("train", "query", "gallery")
COLUMNS = ("path", "pid", "split")  # and camid, which may be missing or empty
NAMES = ("manifest.csv", "manifest.parquet")

Block = dict[str, np.ndarray]  # column -> (n,) bytes


def read_manifest(root: Path, options: Options) -> RawDataset:
    """The rows of options.manifest, or of root/manifest.csv or root/manifest.parquet, in their order.

    Columns, in any order, others are passed over: path (relative to root, or absolute below it), pid and camid (any
    text or number), split (train, query or gallery). No camid column, or an empty one: no camera ids. Rows that make no
    sense are reported as unparsed; a path that leaves root is one of them. Symbolic links below root are followed.
    """
    file = find_manifest(root, options.manifest)
    parts, unparsed = no_parts(), []
    row = 1 if file.suffix == ".parquet" else 2  # as an editor counts the lines
    for block in read_blocks(file):
        paths, reasons = below_root(block["path"], root)
        reasons |= dict.fromkeys(np.flatnonzero(block["pid"] == b"").tolist(), "no pid")
        rows_of = {split: block["split"] == split.encode() for split in SPLITS}
        for i in np.flatnonzero(~np.any(list(rows_of.values()), axis=0)).tolist():
            reasons[i] = f"split {os.fsdecode(bytes(block['split'][i]))!r}; expected train, query or gallery"
        for i, reason in sorted(reasons.items()):
            unparsed.append(f"{file.name} row {row + i}: {os.fsdecode(bytes(block['path'][i]))}: {reason}")
        good = np.ones(len(paths), dtype=bool)
        good[list(reasons)] = False
        for split, columns in parts.items():
            rows = rows_of[split] & good
            if rows.any():
                for name, values in (("path", paths), ("pid", block["pid"]), ("camid", block["camid"])):
                    columns[name].append(values[rows])
        row += len(paths)
    return assemble(parts, (str(root),), unparsed)


Parts = dict[str, dict[str, list[np.ndarray]]]  # {split: {path, pid, camid: blocks of (n,) bytes}}


def no_parts() -> Parts:
    return {split: {"path": [], "pid": [], "camid": []} for split in SPLITS}


def assemble(parts: Parts, roots: tuple[str, ...], unparsed: list[str]) -> RawDataset:
    """The data set from its parts, which it empties as it goes.

    pids and cameras become places in the sorted list of their names: one list of pids for training, one for the test
    set, one list of cameras for all. An empty camid is none: all images have one or none has.
    """

    def take(split: str, column: str) -> np.ndarray:
        blocks = parts[split].pop(column)
        return np.concatenate(blocks) if blocks else np.empty(0, dtype="S1")

    files, cameras = [take(split, "path") for split in SPLITS], [take(split, "camid") for split in SPLITS]
    has_camid = np.concatenate([column != b"" for column in cameras])
    if has_camid.any() and not has_camid.all():
        for file, column in zip(files, cameras, strict=True):
            unparsed += [
                f"{os.fsdecode(name)}: no camera id, but others have one" for name in file[column == b""].tolist()
            ]
    camids: list[np.ndarray | None] = [None] * 3
    camid_names = None
    if has_camid.any():
        codes, camid_names = encode(np.concatenate(cameras))
        camids = list(np.split(codes, np.cumsum([len(column) for column in cameras])[:-1]))
    train_pids, train_names = encode(take("train", "pid"))
    test_pids, test_names = encode(np.concatenate([take(split, "pid") for split in SPLITS[1:]]))
    pids = [train_pids, *np.split(test_pids, [len(files[1])])]
    names = [train_names, test_names, test_names]
    train, query, gallery = (
        Split(roots, files[i], pids[i], camids[i], None, names[i], camid_names) for i in range(len(SPLITS))
    )
    return RawDataset(train, query, gallery, tuple(unparsed))


def find_manifest(root: Path, name: str) -> Path:
    files = [root / n for n in ([name] if name else NAMES)]
    for file in files:
        if file.is_file():
            return file
    raise ValueError(
        f"DATA.MANIFEST {name!r}: no {' or '.join(map(str, files))}; expected a table of path, pid, camid, split"
    )


def below_root(paths: np.ndarray, root: Path) -> tuple[np.ndarray, dict[int, str]]:
    """(paths relative to root, {row: why it is refused}).

    By the text of the path: a symbolic link below root was put there by whoever owns root and may lead elsewhere.
    """
    reasons = dict.fromkeys(np.flatnonzero(paths == b"").tolist(), "no path")
    # abspath: as written, without a look at what is a link.
    for folder in dict.fromkeys((os.path.abspath(root), os.path.realpath(root))):  # noqa: PTH100
        prefix = os.fsencode(folder.rstrip("/") + "/")
        inside = np.char.startswith(paths, prefix)
        if inside.any():
            width = paths.dtype.itemsize
            letters = np.ascontiguousarray(paths).view(np.uint8).reshape(len(paths), width)[:, len(prefix) :]
            shorter = np.ascontiguousarray(letters).view(f"S{width - len(prefix)}").reshape(-1)
            paths = np.where(inside, shorter, paths)
    reasons |= dict.fromkeys(np.flatnonzero(np.char.startswith(paths, b"/")).tolist(), "leaves DATA.ROOT")
    for i in np.flatnonzero(np.char.find(paths, b"..") >= 0).tolist():
        if b".." in bytes(paths[i]).split(b"/"):
            reasons[i] = "leaves DATA.ROOT"
    return paths, reasons


# --- rows -------------------------------------------------------------------------------------------------------------


def read_blocks(file: Path) -> Iterator[Block]:
    """Blocks of at least the columns path, pid, camid, split. Raises ValueError for a file that is no such table."""
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        if file.suffix == ".parquet":
            raise ValueError(f"{file}: reading it takes pyarrow; expected pip install 'reid_dist[parquet]'") from None
        yield from read_csv(file)
        return
    yield from (read_parquet(file) if file.suffix == ".parquet" else read_csv_with_arrow(file))


def read_header(file: Path) -> list[str]:
    with file.open("rb") as stream:
        beginning = stream.read(1024)
    if b"\0" in beginning:
        raise ValueError(f"{file}: it begins with {beginning[:16]!r}; expected CSV, as text in UTF-8")
    with file.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as stream:
        header = [name.strip() for name in next(csv.reader(stream), [])]
    check_columns(file, header)
    return header


def check_columns(file: Path, columns: list[str]) -> None:
    missing = [name for name in COLUMNS if name not in columns]
    if missing or len(set(columns)) < len(columns):
        raise ValueError(
            f"{file}: columns {', '.join(columns) or 'none'}; expected path, pid, split and perhaps camid, once each"
        )


def read_csv(file: Path) -> Iterator[Block]:
    """With Python's own reader."""
    header = read_header(file)
    with file.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as stream:
        rows = csv.reader(stream)
        next(rows)
        for block in in_blocks(row for row in rows if row):
            for row in block:
                if len(row) != len(header):
                    raise ValueError(f"{file}: row {','.join(row)!r}: {len(row)} fields; expected {len(header)}")
            columns = zip(header, zip(*block, strict=True), strict=True)
            texts = {name: np.array([os.fsencode(v) for v in values], dtype=bytes) for name, values in columns}
            yield with_camid(texts, len(block))


def read_csv_with_arrow(file: Path) -> Iterator[Block]:
    import pyarrow as pa
    from pyarrow import csv as arrow

    header = read_header(file)
    wanted = [name for name in (*COLUMNS, "camid") if name in header]
    try:
        batches = arrow.open_csv(
            file,
            # A block of bytes much smaller than the file: its rows exist as Arrow's arrays and as ours for a moment.
            read_options=arrow.ReadOptions(column_names=header, skip_rows=1, block_size=8 << 20),
            convert_options=arrow.ConvertOptions(
                include_columns=wanted, column_types=dict.fromkeys(wanted, pa.binary()), strings_can_be_null=False
            ),
        )
        for batch in batches:
            yield with_camid({name: to_bytes(batch.column(name)) for name in wanted}, len(batch))
    except pa.ArrowInvalid as error:
        raise ValueError(f"{file}: {error}") from None


def read_parquet(file: Path) -> Iterator[Block]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(file)
        columns = table.schema_arrow.names
        check_columns(file, columns)
        wanted = [name for name in (*COLUMNS, "camid") if name in columns]
        for batch in table.iter_batches(batch_size=4 * BLOCK, columns=wanted):
            yield with_camid({name: to_bytes(batch.column(name)) for name in wanted}, len(batch))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ValueError(f"{file}: {error}") from None


def to_bytes(column: Any) -> np.ndarray:
    """An Arrow array of text, bytes, numbers or a dictionary of these as (n,) numpy bytes; null is empty."""
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_large_binary(column.type):
        column = column.cast(pa.binary())
    elif not (pa.types.is_binary(column.type) or pa.types.is_string(column.type)):
        column = column.cast(pa.string())
    if column.null_count:
        column = column.fill_null(b"" if pa.types.is_binary(column.type) else "")
    offsets = np.frombuffer(column.buffers()[1], np.int32)[column.offset : column.offset + len(column) + 1]
    letters: np.ndarray = np.frombuffer(column.buffers()[2] or b"", np.uint8)[offsets[0] : offsets[-1]]
    lengths = np.diff(offsets)
    width = max(1, int(lengths.max(initial=0)))
    if lengths.min(initial=width) == width:
        table = letters
    else:
        table = np.zeros((len(column), width), np.uint8)
        table[np.arange(width) < lengths[:, None]] = letters
    return table.view(f"S{width}").reshape(-1)


def with_camid(block: Block, num: int) -> Block:
    return block if "camid" in block else {**block, "camid": np.zeros(num, dtype="S1")}
