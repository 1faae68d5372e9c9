"""Read everything in stores and runs, and say what is whole."""

from __future__ import annotations

from typing import Annotated

import tyro

from moma_jax.commands import print_list
from moma_jax.errors import RunError
from moma_jax.whole import verified


def verify(
    paths: tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="STORE|RUN ...")]], json: bool = False
) -> None:
    """Read every file of token stores, and of the checkpoints of runs, and hold it against the list of sizes and
    CRC-32C sums that was made when it was written; and every record of runs, which has its own sum (one that is missing
    is not noticed). What was written before there were such lists is held against the checksums of the manifest.

    Ends with 0 where all is whole, and with 1 where something is damaged or gone, which is named.

    Args:
      paths: Stores and runs: local, gs:// or s3://.
      json: Print JSON.

    Raises:
      InputError: a path holds neither.
      RunError: something is not whole.
    """
    found = [piece for path in paths for piece in verified(path)]
    print_list([{name: value for name, value in piece._asdict().items() if name != "remedy"} for piece in found], json)
    if bad := [piece for piece in found if not piece.whole]:
        raise RunError(f"{bad[0].name}: {bad[0].about}; {bad[0].remedy}")
