"""Two files of features, a query and a gallery, with labels that mean the same in both."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..feature_files import read_features
from .further import Names


class Side(NamedTuple):
    """feats (N, D) float32; pids, camids (N,) int64."""

    feats: np.ndarray
    pids: np.ndarray
    camids: np.ndarray | None


class Pair(NamedTuple):
    query: Side
    gallery: Side
    pid_names: np.ndarray | None  # text that pids are places in; None: they are numbers
    camid_names: np.ndarray | None

    @property
    def names(self) -> Names:
        return Names(*(str if n is None else lambda i, n=n: str(n[i]) for n in (self.pid_names, self.camid_names)))


def read_pair(query_file: str, gallery_file: str) -> Pair:
    """Both files, with labels that are text numbered alike. Raises ValueError for files that do not fit together."""
    keys = ("--features-query", "--features-gallery")
    files = [read_features(path, key) for path, key in zip((query_file, gallery_file), keys, strict=True)]
    for file, path, key in zip(files, (query_file, gallery_file), keys, strict=True):
        if file.pids is None:
            raise ValueError(f"{key} {path!r}: has no pid; expected the identity of each row")
    widths = [file.feats.shape[1] for file in files]
    if widths[0] != widths[1]:
        raise ValueError(f"--features-gallery {gallery_file!r}: width {widths[1]}; expected the query's {widths[0]}")
    (q_pids, g_pids), pid_names = number([file.pids for file in files], "pid", gallery_file)
    (q_camids, g_camids), camid_names = number([file.camids for file in files], "camid", gallery_file)
    assert q_pids is not None and g_pids is not None
    query, gallery = Side(files[0].feats, q_pids, q_camids), Side(files[1].feats, g_pids, g_camids)
    return Pair(query, gallery, pid_names, camid_names)


def number(
    columns: list[np.ndarray | None], name: str, gallery_file: str
) -> tuple[list[np.ndarray | None], np.ndarray | None]:
    """(query's and gallery's labels as int64, what their numbers stand for or None)."""
    kinds = [None if column is None else column.dtype.kind for column in columns]
    if kinds[0] != kinds[1]:
        words = {None: "no", "i": "numbers as", "U": "text as"}
        raise ValueError(
            f"--features-gallery {gallery_file!r}: has {words[kinds[1]]} {name}, the query {words[kinds[0]]} {name}; "
            "expected the same kind"
        )
    if columns[0] is None or columns[1] is None or kinds[0] == "i":
        return columns, None
    names, places = np.unique(np.concatenate([columns[0], columns[1]]), return_inverse=True)
    return [places[: len(columns[0])].astype(np.int64), places[len(columns[0]) :].astype(np.int64)], names
