"""How much host memory the stream of batches takes, at most: a sum over its settings. `moma bench data` holds it
against a process that reads."""

from __future__ import annotations

from moma_jax.config import Config, PrepareConfig
from moma_jax.data.order import WHOLE_INDEX_DOCUMENTS
from moma_jax.data.store import open_store

POSITION = 22
"""Bytes of a position of a batch: five arrays of 4 and two of 1."""
ASSEMBLING = 64
"""Bytes of a position while its batch is laid out: what was read, places as int64, and the batch's own arrays."""
BESIDE_PREFETCH = 2
"""Batches that are there besides data.prefetch: one that waits to be handed over, one that the loop has in hand."""
DECODING = 8
"""Bytes of a token of a chunk that is being read: packed, unpacked, and 4 bytes wide at most."""
SPANS = 8
"""Of a document, in its index; few have more."""


def loader_bytes(config: Config, hosts: int = 1) -> dict[str, int]:
    """Bytes on one host by what they are for, and "total": bounds, most of them above what is there.

    Args:
      config: resolved. Its stores are opened for the numbers of their documents; random tokens need none.
      hosts: among which the rows are split; the lanes are too, where they are a multiple of a batch's routing groups.

    Returns:
      "batches" (made ahead), "assembling" (by data.read_threads), "cache" (decoded chunks, of each store),
      "reading" (chunks in flight), "index" (of documents, of each store or, where it has many, of windows), "total".
    """
    data = config.data
    positions = config.batch_tokens // hosts
    found = {
        "batches": (data.prefetch + BESIDE_PREFETCH) * positions * POSITION,
        "assembling": data.read_threads * positions * ASSEMBLING,
    }
    if data.kind == "store":
        stores = {store.path: open_store(store.path) for store in data.stores}
        chunk = (data.prepare or PrepareConfig()).chunk_tokens
        views = [stores[s.path].view(s.collection) for s in data.stores]
        found |= {
            "cache": len(stores) * data.cache_bytes,
            "reading": len(stores) * data.read_concurrency * chunk * DECODING,
            "index": sum(_index_bytes(config, view, hosts) for view in views),
        }
    return found | {"total": sum(found.values())}


def _index_bytes(config: Config, view, hosts: int) -> int:
    """Of one store: the windows of this host's lanes, and its whole index where that is read at once."""
    data, modalities = config.data, len(config.data.modalities)
    groups = config.train.batch_rows // data.group_rows
    lanes = data.lanes // hosts if data.lanes % groups == 0 else data.lanes
    document = 8 * (5 + modalities) + 9 * SPANS
    windows = min(lanes * data.window_documents, view.documents)
    whole = view.documents * (17 + 5 * SPANS) if view.documents <= WHOLE_INDEX_DOCUMENTS else 0
    return windows * document + whole
