"""Held-out losses by document, in a small Parquet file of the run: what intervals over documents are made from.

One row for each evaluation set, routing and document: where the document lies (the store by its number in `data.stores`
and the document's number in its view), and for each modality the cross-entropy of its targets in nats and their weight.
Runs that are evaluated on the same rows have the same documents, so their losses can be paired. A document of which
several pieces were packed is one.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from moma_jax.batch import Packed
from moma_jax.errors import InputError
from moma_jax.late import pa, pq
from moma_jax.storage.directory import Directory

DOCUMENTS = "documents.parquet"
"""File, in a run's directory, of its last evaluation."""
KEYS = ("eval_set", "routing", "store", "document")


class DocumentLosses:
    """Adds up losses of one evaluation set, by routing and document."""

    def __init__(self, modalities: tuple[str, ...]):
        self._modalities, self._unnamed = modalities, 0
        self._cells: dict[tuple[str, int, int], np.ndarray] = {}

    def add(self, packed: Packed, nats_by_routing: dict[str, np.ndarray]) -> None:
        """Args: `nats_by_routing` is each routing's weighted cross-entropy of the batch's targets (B, S)."""
        piece_BS, name_N2 = self._pieces(packed)
        batch, count = packed.batch, len(self._modalities)
        counted_BS = batch.weight_BS > 0
        cell_T = piece_BS[counted_BS] * count + batch.target_modality_BS[counted_BS]
        length = len(name_N2) * count
        weight_NM = np.bincount(cell_T, batch.weight_BS[counted_BS], length).reshape(-1, count)
        for routing, nats_BS in nats_by_routing.items():
            nats_NM = np.bincount(cell_T, np.asarray(nats_BS, np.float64)[counted_BS], length).reshape(-1, count)
            for (store, document), *cell in zip(name_N2.tolist(), nats_NM, weight_NM, strict=True):
                if cell[1].any():
                    key = (routing, store, document)
                    self._cells[key] = self._cells.get(key, 0) + np.array(cell)

    def _pieces(self, packed: Packed) -> tuple[np.ndarray, np.ndarray]:
        """Which piece every token belongs to (B, S), and each piece's store and document (N, 2)."""
        segment_BS = np.asarray(packed.batch.segment_BS)
        room = int(segment_BS.max(initial=0)) + 1
        piece_BS = np.arange(len(segment_BS))[:, None] * room + segment_BS
        name_N2 = np.full((len(segment_BS) * room, 2), -1, np.int64)
        if packed.piece_N6 is None:  # random tokens: every document is new
            name_N2[:, 1] = self._unnamed + np.arange(len(name_N2))
            self._unnamed += len(name_N2)
        else:
            row_N = packed.piece_N6[:, 5]
            number_N = np.arange(len(row_N)) - np.searchsorted(row_N, row_N) + 1
            held_N = number_N < room  # rows beyond the set's were cleared
            name_N2[(row_N * room + number_N)[held_N]] = packed.piece_N6[held_N, :2]
        return piece_BS, name_N2

    def table(self, eval_set: str) -> pa.Table:
        """The rows of this set."""
        keys = list(self._cells)
        sums = np.array(list(self._cells.values())).reshape(len(keys), 2, len(self._modalities))
        columns: dict[str, Any] = {"eval_set": pa.array([eval_set] * len(keys), pa.string())}
        columns |= {name: [key[i] for key in keys] for i, name in enumerate(KEYS[1:])}
        for m, name in enumerate(self._modalities):
            columns |= {f"nats_{name}": sums[:, 0, m].astype(np.float32), f"tokens_{name}": sums[:, 1, m]}
        return pa.table(columns)


def read_documents(home: Directory) -> dict[tuple[str, str], dict[tuple[int, int], dict[str, tuple[float, float]]]]:
    """By (evaluation set, routing): by (store, document): by modality the nats and the weight of its targets.

    Args: `home` is a run's directory; the result is empty where it has no such file.

    Raises:
      InputError: the file is damaged or another one.
    """
    content = home.read(DOCUMENTS)
    if content is None:
        return {}
    try:
        table = pq.read_table(io.BytesIO(content))
        keys = zip(*(table[name].to_pylist() for name in KEYS), strict=True)
        names = [name.removeprefix("nats_") for name in table.column_names if name.startswith("nats_")]
        cells = {m: [table[f"{what}_{m}"].to_pylist() for what in ("nats", "tokens")] for m in names}
    except (pa.ArrowException, KeyError, ValueError, OSError) as error:
        where = f"{home.path}/{DOCUMENTS}"
        raise InputError(f"{where}: is damaged ({error}); restore it, or remove it and evaluate again") from error
    found: dict[tuple[str, str], dict[tuple[int, int], dict[str, tuple[float, float]]]] = {}
    for row, (eval_set, routing, store, document) in enumerate(keys):
        of_document = {m: (nats[row], weight[row]) for m, (nats, weight) in cells.items()}
        found.setdefault((eval_set, routing), {})[store, document] = of_document
    return found


def to_bytes(tables: list[pa.Table]) -> bytes:
    """The file of some sets' tables."""
    content = io.BytesIO()
    pq.write_table(pa.concat_tables(tables), content, compression="zstd")
    return content.getvalue()
