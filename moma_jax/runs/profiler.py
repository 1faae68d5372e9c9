"""A profile of some steps of a run, which TensorBoard's profiler and Perfetto open.

It lies in RUN/profile/plugins/profile/TIME/: `*.xplane.pb` for `tensorboard --logdir RUN/profile` (with the package
tensorboard-plugin-profile) and `perfetto_trace.json.gz` for https://ui.perfetto.dev.
"""

from __future__ import annotations

from typing import Any

import jax

from moma_jax import hosts
from moma_jax.errors import InputError
from moma_jax.runs.directory import RunDir


def require_local_profile(run: RunDir, steps: tuple[int, ...]) -> None:
    """InputError where the run's directory is no local one, in which alone JAX can write a profile for Perfetto."""
    if steps and run.local is None:
        raise InputError(f"train.profile_steps: {run.path} is not local; leave it out, or give a local run.dir")


def profile_warnings(steps: tuple[int, ...], step: int, total: int) -> list[str]:
    """A line where a run that stands at `step` will make none of the steps that shall be profiled."""
    if not steps or (steps[0] <= total and step < steps[1]):
        return []
    return [
        f"warning: train.profile_steps: steps {steps[0]} to {steps[1]} are not among those to come, {step + 1} to "
        f"{total}, so nothing is profiled"
    ]


class Profiler:
    """Profiles a range of steps, on process 0; of a run that goes on within the range, the rest of it."""

    def __init__(self, run: RunDir, steps: tuple[int, ...]):
        """Args: `steps` are the first and the last one (`train.profile_steps`); () profiles nothing."""
        self._path = run.join("profile")
        self._first, self._last = steps if steps and hosts.is_first() else (0, 0)
        self._annotation = None

    def before(self, step: int) -> None:
        """Update `step` is about to be made."""
        if not self._first <= step <= self._last:
            return
        if self._annotation is None:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # its calls crowd out steps: Perfetto's file holds a million events
            jax.profiler.start_trace(self._path, create_perfetto_trace=True, profiler_options=options)
        self._annotation = jax.profiler.StepTraceAnnotation("train", step_num=step)
        self._annotation.__enter__()

    def after(self, step: int, report: Any) -> None:
        """Update `step`, which gives `report`, is under way; the profile is written once the last one is made."""
        if self._annotation is None:
            return
        self._annotation.__exit__(None, None, None)
        if step == self._last:
            jax.block_until_ready(report)
            self.close()

    def close(self) -> None:
        """Writes what was profiled of a run that ends within these steps."""
        if self._annotation is not None:
            self._annotation = None
            jax.profiler.stop_trace()
