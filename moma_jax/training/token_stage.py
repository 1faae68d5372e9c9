"""What stages that learn from packed tokens have in common."""

from __future__ import annotations

from typing import Any

from moma_jax import sharding
from moma_jax.cost import total_steps
from moma_jax.data.stream import Stream, open_stream
from moma_jax.runs.directory import RunDir
from moma_jax.runs.resume import require_same_stores
from moma_jax.training.step import Program


class TokenStage:
    """The part of `loop.Stage` that a config's `data` and `train` sections settle."""

    meta: dict[str, Any]

    def __init__(self, program: Program):
        self.program, self.config, self.mesh = program, program.config, program.mesh
        self.steps, self.eval_sets = total_steps(program.config), program.config.train.eval_sets

    def require_same_data(self, before: dict[str, Any], where: str) -> None:
        """See `loop.Stage`."""
        require_same_stores(self.meta["hashes"], before, where)

    def open_data(self, cursor: Any) -> Stream:
        """See `loop.Stage`."""
        own = sharding.own_groups(self.mesh, self.config.train.batch_rows // self.config.data.group_rows)
        return open_stream(self.config, cursor=cursor, mine=own)

    def settle(self, run: RunDir, state: Any) -> None:
        """Nothing."""

    def sampled(self, state: Any, step: int, last: bool) -> tuple:
        """Nothing."""
        return ()

    def export(self, run: RunDir, state: Any) -> None:
        """Nothing: a checkpoint is all that there is."""
