"""List routing rules; fit auxiliary routers to a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import tyro

import moma_jax
from moma_jax import rules
from moma_jax.commands import DEVICES, Run, print_list
from moma_jax.config import MeshConfig, RoutersConfig
from moma_jax.errors import InputError


@dataclass(frozen=True)
class FitOptions:
    """A run, and how routers are fitted to it."""

    options: Annotated[RoutersConfig, tyro.conf.arg(name="")] = RoutersConfig()
    run: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="RUN")]] = ""
    """Run directory."""
    mesh: MeshConfig = MeshConfig()
    """Devices to lay the model on."""
    router: str | None = None
    """The run's own routing rule, FILE.py:ATTRIBUTE, where it was trained with one."""
    EXAMPLE: ClassVar[str | None] = "runs/quickstart"

    @classmethod
    def named(cls, run: str | None) -> FitOptions:
        """What the run's own config says."""
        if run is None:
            return cls()
        from moma_jax.training.load import config_of

        return cls(config_of(run).routers, run)


def fit(run: Annotated[FitOptions, tyro.conf.arg(name="", help="")]) -> None:
    """Fit auxiliary routers to the newest checkpoint of a run, `moma routers fit RUN`, so that it can be used causally.

    The model stays as it is; the routers go to RUN/routers. Settings are the run's own unless given here.
    """
    moma_jax.fit_routers(run.run, run.options, mesh=run.mesh, router=run.router)


def calibrate(
    run: Run, batches: int = 16, step: int | None = None, mesh: MeshConfig = DEVICES, router: str | None = None
) -> None:
    """Set the thresholds of a run by its final weights, `moma routers calibrate RUN`, for --routing threshold.

    The model stays as it is; the thresholds go to RUN/thresholds.json.

    Args:
      run: Run directory.
      batches: Batches of training that are read, each as large as an update.
      step: Which checkpoint; the newest where None.
      mesh: Devices to lay the model on.
      router: The run's own routing rule, FILE.py:ATTRIBUTE, where it was trained with one.
    """
    found = moma_jax.calibrate(run, batches=batches, step=step, router=router, mesh=mesh)
    for name, load_LE in found["load_before"].items():
        loads = [load for layer in load_LE for load in layer]
        mean = sum(loads) / len(loads)
        spread = f"{min(loads):.2f} to {max(loads):.2f}"
        print(f"{name}: of the tokens that experts choose, thresholds let in {mean:.2f} ({spread}); set to 1")


def list(json: bool = False, markdown: bool = False) -> None:
    """List the routing rules that `--model.router` knows by name.

    Args:
      json: Print JSON: each rule's paper, causal routings, losses, state and options, too.
      markdown: Print the table of docs/routers.md.
    """
    if json and markdown:
        raise InputError("--json --markdown: one or the other")
    if markdown:
        print(rules.as_table())
    else:
        print_list(rules.described(), json)


SUBCOMMANDS = {"list": list, "fit": fit, "calibrate": calibrate}
