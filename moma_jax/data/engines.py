"""Who writes the parts of a store: this process, several, or the workers of a Ray cluster.

A part is written from its number alone, is the same whoever writes it, and shows when it is whole. So an engine only
says which worker writes which part next; a worker that dies costs the part it was at, which another writes again.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, wait
from typing import Any, Protocol

from moma_jax.errors import InputError, RunError
from moma_jax.storage.directory import first_line

ANSWER_SECONDS = 10.0
MOST_DEATHS = 3
"""Times that the worker of one part may die before the work is given up."""


class Writer(Protocol):
    """Writes parts of one store."""

    def write(self, part: int) -> dict[str, Any]: ...


Done = Iterator[tuple[int, dict[str, Any]]]
"""Parts as they are done: the number of each, and what its part.json says."""


def in_processes(make: Callable[[], Writer], parts: Sequence[int], workers: int) -> Done:
    """Writes parts in so many processes of this machine.

    Raises:
      RunError: the worker of a part died again and again.
      InputError, RunError: as a writer does.
    """
    from pebble import ProcessExpired, ProcessPool

    context = multiprocessing.get_context("spawn")  # JAX's threads do not survive a fork
    with ProcessPool(min(workers, len(parts)), context=context, initializer=_begin, initargs=[make]) as pool:
        deaths = dict.fromkeys(parts, 0)
        running = {pool.schedule(_write, [part]): part for part in parts}
        try:
            while running:
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    part = running.pop(future)
                    try:
                        yield part, future.result()
                    except BrokenExecutor as error:  # none of them lives long enough to be given a part
                        raise RunError(
                            f"the {workers} workers end as they begin: {error}; try --workers 1, and in a script call "
                            'prepare below `if __name__ == "__main__":`'
                        ) from error
                    except ProcessExpired as error:
                        _count_death(deaths, part, f"exit code {error.exitcode}")
                        running[pool.schedule(_write, [part])] = part
        except BaseException:
            pool.stop()
            raise


_own: Writer | None = None


def _begin(make: Callable[[], Writer]) -> None:
    global _own
    _own = make()


def _write(part: int) -> dict[str, Any]:
    return _own.write(part)


def on_ray(make: Callable[[], Writer], parts: Sequence[int], workers: int, address: str | None) -> Done:
    """Writes parts by so many actors, each of which keeps its image tokenizer on its device.

    Args:
      workers: actors; 0: one for each GPU or TPU of the cluster, or else each processor.
      address: of the cluster; None: Ray on this machine alone, for as long as this lasts.

    Raises:
      InputError: Ray is not installed, or nobody answers at the address.
      RunError: the worker of a part died again and again.
    """
    ray = _ray(address)
    try:
        kinds = [(kind, int(ray.cluster_resources().get(kind, 0))) for kind in ("TPU", "GPU", "CPU")]
        device, there = next(((kind, count) for kind, count in kinds if count), ("CPU", 1))
        actor = ray.remote(**_share(device))(_Actor)
        crew = [actor.remote(make) for _ in range(min(workers or there, len(parts)))]
        yield from _dealt(ray, actor, make, crew, list(parts))
    finally:
        ray.shutdown()


def _ray(address: str | None):
    """Ray, connected."""
    try:
        import ray
    except ImportError as error:
        raise InputError("--engine ray: Ray is not installed; install it with: pip install 'moma_jax[ray]'") from error
    _require_answer(address)
    where = {"address": "local", "include_dashboard": False} if address is None else {"address": address}
    try:
        ray.init(**where, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        raise InputError(f"--ray-address: nobody answers at {address}: {reason}") from error
    return ray


def _require_answer(address: str | None) -> None:
    """Raises InputError where nobody listens at HOST:PORT, for which Ray itself would wait for minutes."""
    host, colon, port = (address or "").removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=ANSWER_SECONDS).close()
    except OSError as error:
        raise InputError(f"--ray-address: nobody answers at {address}: {error}") from error


def _share(device: str) -> dict[str, Any]:
    """What one actor takes of a node."""
    return {"GPU": {"num_gpus": 1}, "TPU": {"resources": {"TPU": 1}}, "CPU": {"num_cpus": 1}}[device]


class _Actor:
    """One writer on a node of the cluster."""

    def __init__(self, make: Callable[[], Writer]):
        self._writer = make()

    def write(self, part: int) -> dict[str, Any]:
        """Writes a part."""
        return self._writer.write(part)

    def process(self) -> int:
        """Its process's number."""
        return os.getpid()


def _dealt(ray, actor, make, crew: list, parts: list[int]) -> Done:
    """Gives each actor one part at a time; one that died is replaced."""
    deaths, waiting, running = dict.fromkeys(parts, 0), parts[::-1], {}

    def give(member) -> None:
        part = waiting.pop()
        running[member.write.remote(part)] = (part, member)

    for member in crew:
        give(member)
    while running:
        (ready,), _ = ray.wait(list(running), num_returns=1)
        part, member = running.pop(ready)
        try:
            found = ray.get(ready)
        except ray.exceptions.RayActorError as error:
            _count_death(deaths, part, type(error).__name__)
            member = actor.remote(make)
            waiting.append(part)
        except ray.exceptions.RayTaskError as error:
            raise (error.cause or RunError(f"part {part}: {first_line(error)}")) from error
        else:
            yield part, found
        if waiting:
            give(member)


def _count_death(deaths: dict[int, int], part: int, how: str) -> None:
    deaths[part] += 1
    if deaths[part] >= MOST_DEATHS:
        raise RunError(f"part {part}: its worker died {MOST_DEATHS} times ({how}); is there enough memory for so many?")
