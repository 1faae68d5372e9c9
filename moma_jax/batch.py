"""The contract between data and model: what one batch holds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Batch(NamedTuple):
    """Rows of packed documents. All arrays are (B, S); rows of one routing group are consecutive.

    Attributes:
      token_BS: int32 ids; the pad id where segment_BS is 0.
      target_BS: int32, the id that follows in the same document, also where the document was cut or the row ends.
      segment_BS: int32, 1, 2, ... by document within a row, 0 for padding.
      position_BS: int32, position within the segment, from 0.
      weight_BS: float32 weight of the target's loss; 0 on padding and where nothing follows.
      modality_BS, target_modality_BS: int8 modality of the id and of the target's, as the vocabulary has it.
    """

    token_BS: Any
    target_BS: Any
    segment_BS: Any
    position_BS: Any
    weight_BS: Any
    modality_BS: Any
    target_modality_BS: Any


@dataclass(frozen=True)
class Packed:
    """One batch and where the stream stands after it.

    Attributes:
      batch: the arrays.
      cursor: the lanes' states after this batch, a dictionary of small NumPy arrays; a stream opened with it
        continues with the next batch. With several hosts it is of this host's lanes; merged, all hosts' are what one
        host would have.
      epochs: passes over each store so far, by store name, as a fraction.
      waiting: documents held back in the cursor.
      piece_N6: int64, the documents (pieces of them) in the order of their rows: store, document, start, stop, length
        of the document, row; segment k of a row is its k-th piece. None for random tokens.
    """

    batch: Batch
    cursor: dict[str, Any]
    epochs: dict[str, float] = field(default_factory=dict)
    waiting: int = 0
    piece_N6: Any = None


def batch_of(token_BS, target_BS, segment_BS, position_BS, weight_BS, modality_V) -> Batch:
    """A Batch of ids whose modalities are looked up in `modality_V`, int8, by id."""
    return Batch(token_BS, target_BS, segment_BS, position_BS, weight_BS, modality_V[token_BS], modality_V[target_BS])
