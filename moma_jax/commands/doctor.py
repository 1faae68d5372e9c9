"""What this machine has, and what is slow on it."""

from __future__ import annotations

from moma_jax.commands import print_result
from moma_jax.storage.directory import require_new_file, write_file


def doctor(report: str | None = None, json: bool = False) -> None:
    """Look at this machine: JAX's devices, the speed that they reach, versions against those that are tested, disk,
    credentials of object stores (whether there are any, not what they are), and what would be slow here and why.

    Args:
      report: Also write the page to this new file, for an issue; it holds no secrets.
      json: Print JSON.
    """
    from moma_jax import doctor as looking

    if report is not None:
        require_new_file("--report", report)
    found = looking.doctor()
    if report is not None:
        write_file(report, looking.format_doctor(found).encode())
    print_result(found, json, looking.format_doctor)
