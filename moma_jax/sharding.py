"""Devices: the mesh, and which array axis lies on which mesh axis.

Axis letters, used as suffixes of array names everywhere: B rows, S positions in a row, G routing groups, T tokens of a
group (B*S = G*T), D model width, F expert hidden width, H heads, K head width, V vocabulary, M modalities, E experts of
one group of experts, C slots of one expert, L layers, J kinds of targets (modalities, in training).

Data parallelism is what exists today: rows are split over the mesh axis "data", whole routing groups to a device, and
parameters are replicated. Every parameter names its logical axes already, so another mesh is another table here.
"""

from __future__ import annotations

import contextlib
import logging

import flax.linen as nn
import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from moma_jax.errors import InputError

DATA = "data"

RULES = (
    ("batch", DATA),
    ("layers", None),
    ("embed", None),
    ("vocab", None),
    ("heads", None),
    ("head", None),
    ("ffn", None),
    ("expert", None),
)
"""Logical axis -> mesh axis. A parameter axis that is missing here is an error, never a silent replica."""


def make_mesh(data: int, groups: int) -> Mesh:
    """The mesh of this process: axis "data" over its local devices.

    Args:
      data: devices of data parallelism (`mesh.data`); -1 takes the largest number of local devices that divides
        `groups`, and says so where some stay idle.
      groups: routing groups of one microbatch; a device holds whole groups.

    Raises:
      InputError: fewer devices than asked for, or `groups` does not split over them.
    """
    devices = jax.local_devices()
    if data == -1:
        data = max(n for n in range(1, len(devices) + 1) if groups % n == 0)
        if data < len(devices):
            logging.getLogger(__name__).warning(
                "mesh.data: a microbatch has %d routing groups, so %d of %d devices are used",
                groups,
                data,
                len(devices),
            )
    if data > len(devices):
        raise InputError(f"mesh.data: {data} devices asked for, {len(devices)} are here; use -1 for all of them")
    if groups % data:
        raise InputError(
            f"mesh.data: {groups} routing groups of a microbatch do not split over {data} devices; use a divisor of "
            f"{groups}, or raise train.batch_rows"
        )
    return jax.make_mesh((data,), (DATA,), axis_types=(AxisType.Auto,), devices=devices[:data])


@contextlib.contextmanager
def use_mesh(mesh: Mesh):
    """Makes `mesh` and RULES the ones that traced code sees."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        yield mesh


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def rows(mesh: Mesh) -> NamedSharding:
    """The first axis (rows) is split over the devices."""
    return NamedSharding(mesh, PartitionSpec(DATA))


def shardings_of(boxed, mesh: Mesh):
    """Shardings of a tree of boxed Linen parameters (their abstract values will do), by RULES.

    Raises:
      InputError: a parameter names a logical axis that RULES does not know.
    """
    known = {name for name, _ in RULES}

    def one(spec: PartitionSpec) -> NamedSharding:
        unknown = [axis for axis in spec if axis is not None and axis not in known]
        if unknown:
            raise InputError(f"sharding: no rule for the logical axis {unknown[0]!r}; add it to sharding.RULES")
        table = dict(RULES)
        return NamedSharding(mesh, PartitionSpec(*(None if axis is None else table[axis] for axis in spec)))

    specs = nn.get_partition_spec(boxed)
    return jax.tree.map(one, specs, is_leaf=lambda s: isinstance(s, PartitionSpec))
