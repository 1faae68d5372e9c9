"""Records, pictures and texts to Weights & Biases, behind the same `write(record)` as all other sinks.

A run of moma is a run there: its id is kept in RUN/wandb.json, so that training that goes on goes on in the same one,
from the checkpoint's step. With WANDB_MODE=offline all stays below RUN/wandb until `wandb sync`.
"""

from __future__ import annotations

import os
import secrets
from typing import Any

from PIL import Image

from moma_jax.errors import InputError
from moma_jax.runs.directory import RunDir
from moma_jax.runs.figures import figures_of

FILE = "wandb.json"


class WandbSink:
    """A run of Weights & Biases; names of figures are kind/figure, and eval/SET/ROUTING/figure."""

    def __init__(self, run: RunDir, project: str, config: Any):
        """Args: `config`, plain values.

        Raises:
          InputError: the extra is missing, the run is on an object store, or the service refuses.
        """
        try:
            import wandb
        except ImportError as error:
            raise InputError('run.wandb: the package wandb is missing: pip install "moma_jax[wandb]"') from error
        if run.local is None:
            raise InputError(
                "run.wandb: its files want a local run.dir; leave it out, and hand train a sink of your own"
            )
        self._wandb = wandb
        before = run.read_json(FILE)  # also of a run that was killed before its first checkpoint
        known = before or {"id": secrets.token_hex(8), "project": project}
        run.write_json(FILE, known)
        where = {"project": known["project"], "id": known["id"], "dir": os.path.abspath(run.local)}
        # By itself it would send the command line, the host, the user's name and the repository's address.
        where["settings"] = wandb.Settings(quiet=True, x_disable_meta=True)
        name = run.local.rstrip("/").rpartition("/")[2]
        try:
            self._run = wandb.init(**where, name=name, config=config, resume="allow" if before else None)
        except wandb.Error as error:
            raise InputError(
                f"run.wandb: {str(error).splitlines()[0]}; log in with `wandb login`, or set WANDB_MODE=offline"
            ) from error
        self._run.define_metric("*", step_metric="update")

    def write(self, record: dict[str, Any]) -> None:
        """Adds every number of the record; of events the last one stands in the summary."""
        if "event" in record:
            self._run.summary["event"] = record["event"]
        if figures := figures_of(record):
            self._run.log({**figures, "update": record["step"]})

    def draw(self, name: str, step: int, picture: Image.Image) -> None:
        """Adds the picture."""
        self._run.log({f"sheets/{name}": self._wandb.Image(picture), "update": step})

    def seal(self, step: int) -> None:
        """Nothing to do: what is sent is sent."""

    def close(self) -> None:
        """Ends the run there; the same id goes on with it."""
        self._run.finish()
