"""Features in a file: written by `extract`, read by `search` and `evaluate`; .npz or .parquet by the file's ending.

.npz: arrays feats (N, D) float32, path (N,) text, pid and camid (N,) int64 or text, which may be absent, and metadata,
JSON as text. `numpy.load` reads it without pickles. .parquet: a row an image, columns path, pid, camid and feats (lists
of D floats), and the same JSON under the key reid_dist of the schema's metadata.
"""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .files import write_atomic

ENDINGS = (".npz", ".parquet")
LABELS = ("pid", "camid")
KEY = b"reid_dist"


@dataclass(frozen=True)
class FeatureFile:
    """N images, a row each.

    feats: (N, D) float32, as the network gives them, not normalised. paths: (N,) text. pids, camids: (N,) int64 or
    text, None where nobody knows them. metadata: what made them: network, weights (the file), weights_sha256, config
    (YAML of the network's keys), flip, ema, and what else the writer says.
    """

    feats: np.ndarray
    paths: np.ndarray
    pids: np.ndarray | None = None
    camids: np.ndarray | None = None
    metadata: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.feats)

    @property
    def columns(self) -> dict[str, np.ndarray]:
        """The text and number columns that are there, by their names in files."""
        named = {"path": self.paths, "pid": self.pids, "camid": self.camids}
        return {name: column for name, column in named.items() if column is not None}


def check_ending(path: str, key: str) -> None:
    """Raises ValueError, which names `key`, for another kind of file, a missing folder, or without pyarrow."""
    file = Path(path)
    if file.suffix not in ENDINGS:
        raise ValueError(f"{key} {path!r}: expected a name that ends in {' or '.join(ENDINGS)}")
    if not file.absolute().parent.is_dir():
        raise ValueError(f"{key} {path!r}: expected an existing folder")
    if file.suffix == ".parquet":
        import_pyarrow(key, path)


def write_features(path: str, features: FeatureFile) -> None:
    """The file, whole or not at all; the same bytes for the same features. Raises ValueError and OSError."""
    check_ending(path, "--out")
    feats = np.ascontiguousarray(features.feats, np.float32)
    assert all(column.shape == feats.shape[:1] for column in features.columns.values())
    write = write_parquet if path.endswith(".parquet") else write_npz
    write_atomic(Path(path), lambda part: write(part, feats, features))


def read_features(path: str, key: str) -> FeatureFile:
    """Raises ValueError, which names `key`, for a file that is missing, broken or no file of features."""
    check_ending(path, key)
    if not Path(path).is_file():
        raise ValueError(f"{key} {path!r}: expected an existing file of features")
    arrays, text = (read_parquet if path.endswith(".parquet") else read_npz)(path, key)
    feats, paths = arrays.get("feats"), arrays.get("path")
    if feats is None or paths is None or feats.ndim != 2 or feats.dtype.kind != "f":
        raise ValueError(f"{key} {path!r}: expected arrays feats (N, D) and path (N,), as extract writes them")
    for name in ("path", *LABELS):
        column = arrays.get(name)
        if column is None:
            continue
        if column.shape != feats.shape[:1] or column.dtype.kind not in ("U", "i"):
            found = f"{column.dtype} {column.shape}"
            raise ValueError(f"{key} {path!r}: {name} is {found}; expected ({len(feats)},), text or int64")
        arrays[name] = column.astype(np.int64, copy=False) if column.dtype.kind == "i" else column
    try:
        metadata = json.loads(text)
    except ValueError:
        metadata = None
    if not isinstance(metadata, dict):
        raise ValueError(f"{key} {path!r}: its metadata is no JSON object; expected a file that extract wrote")
    whole = feats.astype(np.float32, copy=False)
    return FeatureFile(whole, arrays["path"], arrays.get("pid"), arrays.get("camid"), metadata)


def write_npz(part: Path, feats: np.ndarray, features: FeatureFile) -> None:
    with part.open("wb") as stream:
        metadata = np.array(json.dumps(features.metadata))
        np.savez(stream, feats=feats, metadata=metadata, **features.columns)  # type: ignore[arg-type]


def read_npz(path: str, key: str) -> tuple[dict[str, np.ndarray], str]:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{key} {path!r}: not a whole .npz file of numbers and text ({reason})") from None
    return arrays, str(arrays.get("metadata", "{}"))


def import_pyarrow(key: str, path: str) -> Any:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ValueError(
            f"{key} {path!r}: Parquet takes pyarrow; expected pip install 'reid_dist[parquet]', or .npz"
        ) from None
    return pyarrow, parquet


def write_parquet(part: Path, feats: np.ndarray, features: FeatureFile) -> None:
    pa, parquet = import_pyarrow("--out", str(part))
    columns = {name: pa.array(column) for name, column in features.columns.items()}
    columns["feats"] = pa.FixedSizeListArray.from_arrays(pa.array(feats.reshape(-1)), feats.shape[1])
    table = pa.table(columns).replace_schema_metadata({KEY: json.dumps(features.metadata)})
    # Features do not compress, and a dictionary of them would only cost time.
    parquet.write_table(table, part, compression="none", use_dictionary=list(features.columns))


def read_parquet(path: str, key: str) -> tuple[dict[str, np.ndarray], str]:
    pa, parquet = import_pyarrow(key, path)
    try:
        table = parquet.read_table(path).combine_chunks()
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{key} {path!r}: not a whole Parquet file ({' '.join(str(error).split())})") from None
    arrays = {}
    for name in table.column_names:
        column = table.column(name)
        if pa.types.is_fixed_size_list(column.type):
            chunks = [chunk.flatten().to_numpy() for chunk in column.chunks]
            flat = np.concatenate(chunks) if chunks else np.empty(0, np.float32)
            arrays[name] = flat.reshape(-1, column.type.list_size)
        elif pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            arrays[name] = np.array(column.to_pylist(), dtype=str)
        else:
            arrays[name] = column.to_numpy()
    return arrays, (table.schema.metadata or {}).get(KEY, b"{}").decode()
