"""GPUs as XLA's compiler wants them described, so that it can compile for one that is not here.

Figures are those of data sheets and of CUDA's tables of compute capabilities; a target file of another GPU has the same
form (XLA's GpuTargetConfigProto as text; `moma plan --target FILE`). Nothing is timed by them: XLA chooses by them.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

GB = 10**9
MAJORS = 7, 12
"""Compute capabilities that the compiler of the tested JAX takes: Volta to Blackwell."""


class Gpu(NamedTuple):
    """One GPU.

    Attributes:
      name: what JAX calls it. capability: of CUDA, (major, minor).
      cores: multiprocessors. units: float32 units of each. clock: GHz. threads: of a multiprocessor.
      memory: bytes. bandwidth: bytes/s. cache: bytes of the second level.
      shared: bytes that all programs of a multiprocessor share, and that one can have.
    """

    name: str
    capability: tuple[int, int]
    cores: int
    units: int
    memory: int
    bandwidth: int
    cache: int
    clock: float
    shared: tuple[int, int]
    threads: int


GPUS = {
    "h100": Gpu(
        "NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 84929347584, 3352 * GB, 50 << 20, 1.98, (233472, 232448), 2048
    ),
    "h200": Gpu("NVIDIA H200", (9, 0), 132, 128, 150_109_880_320, 4800 * GB, 50 << 20, 1.98, (233472, 232448), 2048),
    "a100": Gpu(
        "NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 85_094_825_984, 2039 * GB, 40 << 20, 1.41, (167936, 166912), 2048
    ),
    "l4": Gpu("NVIDIA L4", (8, 9), 58, 128, 23_797_432_320, 300 * GB, 48 << 20, 2.04, (102400, 101376), 1536),
    "t4": Gpu("Tesla T4", (7, 5), 40, 64, 15_828_320_256, 320 * GB, 4 << 20, 1.59, (65536, 65536), 1024),
}


def described(kind: str) -> str:
    """The description of a kind of GPU, "" where there is none."""
    if (gpu := GPUS.get(kind)) is None:
        return ""
    major, minor = gpu.capability
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: {gpu.threads}
  shared_memory_per_block: 49152 shared_memory_per_core: {gpu.shared[0]} shared_memory_per_block_optin: {gpu.shared[1]}
  core_count: {gpu.cores} fpus_per_core: {gpu.units} clock_rate_ghz: {gpu.clock}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {gpu.bandwidth} l2_cache_size: {gpu.cache} device_memory_size: {gpu.memory}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 12 }} runtime_version {{ major: 12 minor: 9 patch: 0 }}
device_description_str: "{gpu.name}"
"""


NEEDED = (
    "device_memory_size",
    "core_count",
    "fpus_per_core",
    "threads_per_warp",
    "threads_per_block_limit",
    "threads_per_core_limit",
    "shared_memory_per_block",
    "shared_memory_per_core",
    "clock_rate_ghz",
    "memory_bandwidth",
    "l2_cache_size",
    "registers_per_block_limit",
)
"""Figures without which XLA's compiler ends the process, or chooses by nothing."""


def figure(description: str, name: str) -> float:
    """One figure of a description; raises ValueError where it is missing or not above 0."""
    found = re.search(rf"\b{name}\s*:\s*([^\s}}]+)", description)
    if found is None:
        raise ValueError(f"{name} is missing; the form is that of moma_jax/plan/gpus.py")
    try:
        value = float(found.group(1))
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ValueError(f"{name} is {found.group(1)}; give a number above 0")
    return value


def capability(description: str) -> int | None:
    """The first number of CUDA's compute capability; None where there is none."""
    inside = re.search(r"cuda_compute_capability\s*:?\s*\{([^}]*)\}", description)
    major = inside and re.search(r"\bmajor\s*:\s*(\d+)", inside.group(1))
    return int(major.group(1)) if major else None


def checked(description: str) -> str:
    """A description that the compiler can be given; raises ValueError, which says what it lacks."""
    for name in NEEDED:
        figure(description, name)
    if (major := capability(description)) is None or not MAJORS[0] <= major <= MAJORS[1]:
        raise ValueError(f"cuda_compute_capability has major {major}; give one from {MAJORS[0]} to {MAJORS[1]}")
    return description
