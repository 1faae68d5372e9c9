"""The processes of one run, one per host: how they join, what they tell each other, how they leave.

Every process computes and reads its own part of the data. Process 0, the first, alone writes records and talks to the
terminal. With one process nothing here does anything.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moma_jax.errors import InputError, RunError

JOIN_SECONDS = 300
"""How long processes wait for each other to start."""
NOBODY_CAME = 75
"""Exit code where they did not; launchers try again (the code of `sysexits.h` for what may pass)."""
LEAVE_SECONDS = 5
"""How long a process that ends waits for the others to end too."""

# Joining and leaving --------------------------------------------------------------------------------------------------


def join(hosts: Any) -> None:
    """Makes this process one of a run's, before any device is used; harmless where it is already.

    Args:
      hosts: `config.hosts`. What its fields leave open is found by JAX: in the metadata of a Cloud TPU pod, in the
        environment of GKE, Slurm, Open MPI, or of a Kubernetes Job (which needs the package kubernetes).

    Raises:
      InputError: `start` is "on" and nothing says who the others are; some fields are missing; or devices are in use.
      SystemExit: by way of the runtime, code NOBODY_CAME, where the others do not come within JOIN_SECONDS.
    """
    given = {name: getattr(hosts, name) for name in ("coordinator", "count", "index")}
    auto = hosts.start == "auto" and set(given.values()) == {None}
    said = _said_by_environment()
    if hosts.start == "off" or jax.distributed.is_initialized() or (auto and not (said or _maybe_a_pod())):
        return
    # Its handler would swallow a SIGTERM; `Stops` is how processes agree on one.
    jax.config.update("jax_enable_preemption_service", False)
    waiting = threading.Timer(JOIN_SECONDS, _nobody_came, (hosts.coordinator,))
    waiting.daemon = True
    waiting.start()
    try:
        jax.distributed.initialize(
            coordinator_address=hosts.coordinator,
            num_processes=hosts.count,
            process_id=hosts.index,
            local_device_ids=_local_devices(),
            cluster_detection_method=None if None in given.values() else "deactivate",
            initialization_timeout=2 * JOIN_SECONDS,  # the runtime's own end is a stack trace
            heartbeat_timeout_seconds=hosts.heartbeat_seconds,
            shutdown_timeout_seconds=3 * hosts.heartbeat_seconds,
        )
    except (ValueError, RuntimeError, OSError) as error:
        alone = (
            "coordinator_address should be defined",
            "must be called before any JAX",
        )  # it is in use, by one process
        if auto and not said and any(text in str(error) for text in alone):
            return
        remedy = (
            "give hosts.coordinator (ADDRESS:PORT of process 0), hosts.count and hosts.index, before any device is used"
        )
        if None not in given.values():
            remedy = f"is {hosts.coordinator} an address of process 0, and its port free?"
        elif said:
            remedy += ", install what JAX needs to find them (pip install kubernetes), or set hosts.start off"
        raise InputError(f"hosts: cannot join the other processes ({str(error).splitlines()[0]}); {remedy}") from error
    finally:
        waiting.cancel()


def _said_by_environment() -> bool:
    """Whether the environment says that there are other processes."""
    number = lambda name: int(os.environ.get(name) or 1)  # noqa: E731
    workers = os.environ.get("TPU_PROCESS_ADDRESSES") or os.environ.get("TPU_WORKER_HOSTNAMES")
    if workers is not None and os.environ.get("TPU_WORKER_ID", "").isdigit():  # GKE
        return "," in workers or number("MEGASCALE_NUM_SLICES") > 1
    return (
        "JAX_COORDINATOR_ADDRESS" in os.environ
        or ("SLURM_STEP_NODELIST" in os.environ and number("SLURM_NTASKS") > 1)  # not in a shell of `salloc`
        or number("OMPI_COMM_WORLD_SIZE") > 1
        or "JOB_COMPLETION_INDEX" in os.environ
    )


def _maybe_a_pod() -> bool:
    """Whether only a TPU's metadata can say: JAX asks them, and finds nothing where there is one worker."""
    alone_in_gke = os.environ.get("TPU_WORKER_ID", "").isdigit()
    # JAX sets the variable when it finds no TPU.
    return not alone_in_gke and "TPU_SKIP_MDS_QUERY" not in os.environ and jax.config.jax_platforms != "cpu"


def _local_devices() -> list[int] | None:
    """All devices (an empty list) where Slurm has one task to a node; JAX would give each task one."""
    tasks, nodes = os.environ.get("SLURM_NTASKS"), os.environ.get("SLURM_STEP_NUM_NODES")
    return [] if tasks is not None and tasks == nodes else None


def _nobody_came(coordinator: str | None) -> None:
    where = coordinator or "the coordinator that the environment names"
    print(
        f"moma: hosts.coordinator: not all processes met at {where} within {JOIN_SECONDS} seconds; start hosts.count "
        "processes that can reach it",
        file=sys.stderr,
        flush=True,
    )
    os._exit(NOBODY_CAME)  # the main thread is inside the runtime


def leave(code: int) -> NoReturn:
    """Ends the process.

    One of several waits LEAVE_SECONDS for the others to end as well, and for nothing else: not for threads that wait
    for others, so that these notice soon.
    """
    if not jax.distributed.is_initialized():
        sys.exit(code)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    parting = threading.Thread(target=jax.distributed.shutdown, daemon=True)
    parting.start()
    parting.join(LEAVE_SECONDS)
    os._exit(code)


# Telling each other ---------------------------------------------------------------------------------------------------


def several() -> bool:
    """Whether this process is one of several."""
    return jax.process_count() > 1


def is_first() -> bool:
    """Whether this process is process 0, which writes."""
    return jax.process_index() == 0


def gathered(value: Any) -> list[Any]:
    """Every process's `value`, a plain one (JSON), in the order of processes. All have to call it."""
    if not several():
        return [value]
    content = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size_P = multihost_utils.process_allgather(np.array(len(content), np.int32))
    padded = np.zeros(1 << int(size_P.max() - 1).bit_length(), np.uint8)  # few sizes, so few compilations
    padded[: len(content)] = content
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(bytes(row[:size])) for row, size in zip(rows, size_P.tolist(), strict=True)]


def meet() -> None:
    """Waits for all processes, such as after compiling: connections, once begun, do not wait long to be made."""
    gathered(None)


def by_first(work: Callable[[], Any]) -> Any:
    """What `work` returns on process 0, a plain value (JSON), on every process; and its errors too, as our own.

    Args:
      work: is called on process 0 alone; the others wait, however long it takes. All have to call `by_first`.

    Raises:
      InputError: `work` raised one. RunError: it raised anything else.
    """
    if not several():
        return work()
    meet()
    outcome, failure = {}, None
    if is_first():
        try:
            outcome = {"value": work()}
        except Exception as error:
            failure, kind = error, "input" if isinstance(error, InputError) else "run"
            outcome = {kind: str(error) or type(error).__name__}
    outcome = gathered(outcome)[0]
    if failure is not None:
        raise failure
    if "input" in outcome:
        raise InputError(outcome["input"])
    if "run" in outcome:
        raise RunError(f"process 0: {outcome['run']}")
    return outcome["value"]


class Stops:
    """Carries a signal that some process got to all of them, so that all stop after the same step.

    Each step sends a tiny array after it and reads that of the step before, for which the device need not wait.
    """

    def __init__(self, mesh: Mesh):
        self._devices, self._place = mesh.size, NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._most = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._before = None

    def __call__(self, number: int) -> int:
        """The highest number that any process gave one call ago; with one process, `number`. 0: none."""
        if not several():
            return number
        number_N = jax.make_array_from_callback(
            (self._devices,), self._place, lambda _: np.full(1, number, np.int32), dtype=np.int32
        )
        before, self._before = self._before, self._most(number_N)
        return 0 if before is None else int(before)
