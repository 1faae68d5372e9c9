"""This process on its host: the cores it may use, memory that ends, and settings that make JAX's CPU backend faster."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re

# glibc's <malloc.h>
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
_ACCELERATOR_PLUGINS = ("libtpu", "jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin")


def cores() -> int:
    """Cores that this process may use; where the system does not say (macOS, Windows), all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_EXHAUSTED = re.compile("RESOURCE_EXHAUSTED|out of memory|OUT_OF_MEMORY", re.IGNORECASE)
"""In what XLA says when memory is out: its code; a CPU's program says it in words, a GPU's driver by its own code."""


def is_exhausted(error: BaseException) -> bool:
    """Whether an error is JAX's and says that a device's memory was not enough; JAX need not be imported."""
    return type(error).__name__ == "JaxRuntimeError" and _EXHAUSTED.search(str(error)) is not None


def keep_freed_memory() -> bool:
    """Lets malloc keep what is freed, so that a training step does not fault its arrays in again and again.

    By default glibc maps every large array afresh and returns it to the kernel when it is freed: at CPU sizes a quarter
    of a step's processor time goes into page faults. One arena that is never trimmed reuses the same pages; the
    process then stays as large as it ever was. To be called before JAX starts its threads, by the program that owns
    the process.

    Returns:
      True where it was done; False where an accelerator is likely to be used or the C library is not glibc.
    """
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms != "cpu" and any(importlib.util.find_spec(name) for name in _ACCELERATOR_PLUGINS):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return all(mallopt(option, value) for option, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_ARENA_MAX, 1)))
