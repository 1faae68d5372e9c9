"""Pictures that a store has more than once, and the documents that are dropped for it.

Every part keeps 64 bits of each picture's pixels as the image tokenizer reads them, and of its codes. When the parts
are complete they are laid beside each other: equal ones are counted, and the documents that stay are written as lists
of numbers beside the parts, which themselves never change. Equal pixels make a duplicate; equal codes on both sides of
the split are enough for a held-out document not to count, as the model cannot tell them apart.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import tensorstore as ts

from moma_jax.data.parts import COLLECTIONS, SPLITS, Column, kept_name, part_name
from moma_jax.storage.directory import CONTEXT, Directory

COUNTED = ("pictures", "distinct", "on_both_sides", "dropped_duplicates", "dropped_held_out")
"""What `settle` counts: pictures, different ones, codes both trained on and held out, and documents that went."""


class _Piece(NamedTuple):
    """A collection of a part that has pictures."""

    part: int
    collection: str
    picture_P4: np.ndarray


def settle(directory: Directory, parts: list[dict[str, Any]], drop: bool, own_split: bool) -> dict[str, int]:
    """Counts equal pictures and drops documents for them; `parts` change to what stays.

    Held-out documents that show a picture which is trained on are dropped where the split is ours to make (by hash), or
    where duplicates shall go. About 100 bytes of memory for each picture of the store.

    Args:
      parts: content of all part.json, in order. drop: whether pairs that repeat a picture go.
      own_split: whether the source itself says what is held out.
    """
    n = len(parts)
    directory.clear("kept")
    pieces = [
        _Piece(k, f"{collection}-{split}", _read(directory, f"{part_name(k, n)}/{collection}-{split}/pictures"))
        for split in SPLITS
        for collection in COLLECTIONS
        for k, part in enumerate(parts, 1)
        if "pictures" in part["collections"].get(f"{collection}-{split}", {}).get("checksums", ())
    ]
    key_P = np.concatenate([np.zeros(0, np.uint64), *(piece.picture_P4[:, 0] for piece in pieces)])
    held_P = np.repeat([p.collection.endswith("validation") for p in pieces], [len(p.picture_P4) for p in pieces])
    held_P = held_P.astype(bool)
    codes_P = np.concatenate([np.zeros(0, np.uint64), *(piece.picture_P4[:, 1] for piece in pieces)])
    both = np.intersect1d(codes_P[~held_P], codes_P[held_P])
    counts = dict.fromkeys(COUNTED, 0) | {
        "pictures": len(key_P), "distinct": len(np.unique(key_P)), "on_both_sides": len(both)
    }  # fmt: skip
    gone: dict[tuple[int, str], np.ndarray] = {}
    repeated = _repeated(pieces) if drop else [np.zeros(len(p.picture_P4), bool) for p in pieces]
    for piece, repeat_P in zip(pieces, repeated, strict=True):
        crossing_P = np.zeros(len(repeat_P), bool)
        if piece.collection.endswith("validation") and (drop or not own_split):
            crossing_P = np.isin(piece.picture_P4[:, 1], both)
        document_P = piece.picture_P4[:, 3].astype(np.int64)
        crossing, repeats = (np.unique(document_P[mask]) for mask in (crossing_P, repeat_P & ~crossing_P))
        counts["dropped_held_out"] += len(crossing)
        counts["dropped_duplicates"] += len(repeats)
        if len(crossing) + len(repeats):
            gone[piece.part, piece.collection] = np.union1d(crossing, repeats)
    for (k, collection), gone_D in gone.items():
        _drop(directory, parts, k, collection, gone_D)
    return counts


def _repeated(pieces: list[_Piece]) -> list[np.ndarray]:
    """Of each piece's pictures, whether a pair before shows the same, from another row of the source."""
    masks = [np.zeros(len(piece.picture_P4), bool) for piece in pieces]
    for split in SPLITS:
        own = [number for number, piece in enumerate(pieces) if piece.collection == f"pairs-{split}"]
        if not own:
            continue
        picture_P4 = np.concatenate([pieces[number].picture_P4 for number in own])
        _, first_U, which_P = np.unique(picture_P4[:, 0], return_index=True, return_inverse=True)
        repeat_P = picture_P4[:, 2] != picture_P4[first_U[which_P], 2]
        ends = np.cumsum([len(pieces[number].picture_P4) for number in own])
        for number, mask_P in zip(own, np.split(repeat_P, ends[:-1]), strict=True):
            masks[number] = mask_P
    return masks


def _drop(directory: Directory, parts: list[dict[str, Any]], k: int, collection: str, gone_D: np.ndarray) -> None:
    """Writes which documents of a collection of a part stay, and takes the others out of its counts."""
    n, description = len(parts), parts[k - 1]["collections"][collection]
    base = f"{part_name(k, n)}/{collection}"
    bounds_N2, span_K2 = _read(directory, f"{base}/bounds"), _read(directory, f"{base}/spans")
    kept_N = np.setdiff1d(np.arange(description["documents"]), gone_D)
    tokens_M = np.array(description["tokens_M"])
    for document in gone_D.tolist():
        first, last = bounds_N2[document, 1], bounds_N2[document + 1, 1]
        np.subtract.at(tokens_M, span_K2[first:last, 0], span_K2[first:last, 1])
    if not len(kept_N):
        del parts[k - 1]["collections"][collection]
        return
    column = Column(directory.kvstore(kept_name(k, n, collection)), "int64", (), 64 << 20, 65536)
    column.append(kept_N)
    description |= {"kept": column.close(), "documents": len(kept_N), "tokens_M": tokens_M.tolist()}


def _read(directory: Directory, name: str) -> np.ndarray:
    """A whole array."""
    spec = {"driver": "zarr3", "kvstore": directory.kvstore(name)}
    return ts.open(spec, context=CONTEXT, read=True).result().read().result()
