"""Devices: the mesh, and which array axis lies on which mesh axis.

Axis letters, used as suffixes of array names everywhere: B rows, S positions in a row, G routing groups, T tokens of a
group (B*S = G*T), D model width, F expert hidden width, H heads, K head width, V vocabulary, M modalities, E experts of
one group of experts, C slots of one expert, L layers, J kinds of targets (modalities, in training).

The mesh has four axes. The rows of a batch are split over the first three, whole routing groups to a device:

    data    copies of the model; between TPU slices and GPU nodes first, because it communicates least
    fsdp    parameters are stored split over it and gathered layer by layer
    expert  experts live on it, tokens travel to them; everything else is stored split over it, as over fsdp
    tensor  heads, hidden width and vocabulary are split over it
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from moma_jax.errors import InputError
from moma_jax.geometry import require_shards

DATA, FSDP, EXPERT, TENSOR = AXES = ("data", "fsdp", "expert", "tensor")
BATCH = (DATA, FSDP, EXPERT)
"""Mesh axes that the rows of a batch are split over."""

RULES = (
    ("batch", BATCH),
    ("layers", None),
    ("norm", None),
    ("embed", (FSDP, EXPERT)),
    ("expert", EXPERT),
    ("expert_embed", FSDP),
    ("vocab", TENSOR),
    ("heads", TENSOR),
    ("head", None),
    ("ffn", TENSOR),
)
"""Logical axis -> mesh axes. A parameter axis that is missing here is an error, never a silent replica; so are two axes
of one array on the same mesh axis."""

STORED = ("embed", "expert_embed")
"""Logical axes that parameters are only stored split along; computation sees them whole."""


# The mesh -------------------------------------------------------------------------------------------------------------


def make_mesh(
    sizes: Any, groups: int, devices: Sequence[Any] | None = None, what: str = "routing groups of a microbatch"
) -> Mesh:
    """The mesh over the devices of all processes.

    Args:
      sizes: `config.mesh`, devices along each axis; one of them may be -1 for what is left. Where that is `data` and
        its devices are more than routing groups can be dealt to, one process leaves some idle, and says so.
      groups: routing groups of one microbatch, or pictures of a batch; a device holds whole ones.
      devices: those of another place, such as a topology to compile for; None: the ones that are here.
      what: `groups` are, in words.

    Raises:
      InputError: the sizes do not multiply to the number of devices, or `groups` does not split over them.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = _shape(sizes, groups, len(devices), jax.process_count() == 1, what)
    shards = math.prod(shape[:3])
    require_shards(groups, shards, what)
    return Mesh(_arranged(shape, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _shape(sizes: Any, groups: int, devices: int, alone: bool, what: str = "groups") -> tuple[int, ...]:
    """Devices along each axis."""
    asked = {axis: getattr(sizes, axis) for axis in AXES}
    fixed = math.prod(size for size in asked.values() if size != -1)
    open_axes = [axis for axis, size in asked.items() if size == -1]
    if open_axes:
        left = devices // fixed
        if open_axes == [DATA] and alone:
            split = groups // math.gcd(groups, asked[FSDP] * asked[EXPERT])
            left = max((n for n in range(1, left + 1) if split % n == 0), default=0)
        if left * fixed > devices or not left or (left * fixed < devices and not alone):
            raise InputError(
                f"mesh: {devices} devices do not split over {_written(asked)}; give sizes whose product divides "
                f"{devices}"
            )
        asked[open_axes[0]] = left
    used = math.prod(asked.values())
    if used > devices or (used < devices and not alone):
        fewer = "fewer are asked for than there are, and every process needs some" if used < devices else "use -1"
        raise InputError(f"mesh: {_written(asked)} are {used} devices, {devices} are here; {fewer}")
    if used < devices:
        message = "mesh: there are %d %s, so %d of %d devices are used"
        logging.getLogger(__name__).warning(message, groups, what, used, devices)
    return tuple(asked.values())


def _written(sizes: dict[str, int]) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size != 1) or "one device"


def _arranged(shape: tuple[int, ...], devices: list[Any]) -> np.ndarray:
    """Devices in the shape of the mesh: neighbours along the later axes are near each other.

    Several TPU slices are joined by a slow network, so only the first axis that all of them divide crosses it.
    """
    used = devices[: math.prod(shape)]
    if len(used) < len(devices):  # no torus any more
        return np.array(used).reshape(shape)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if devices[0].platform != "tpu" or len(devices) == 1:
        return np.array(devices).reshape(shape)  # in the order of processes: tensor stays inside one
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    across = next((i for i, size in enumerate(shape[:2]) if size % slices == 0), None)
    if across is None:
        raise InputError(f"mesh: {slices} slices divide neither data {shape[0]} nor fsdp {shape[1]}; use -1 for data")
    between = [slices if i == across else 1 for i in range(len(shape))]
    within = [size // number for size, number in zip(shape, between, strict=True)]
    return mesh_utils.create_hybrid_device_mesh(within, between, devices, allow_split_physical_axes=True)


@contextlib.contextmanager
def use_mesh(mesh: Mesh):
    """Makes `mesh` the one that traced code sees."""
    with jax.set_mesh(mesh):
        yield mesh


def platform() -> str:
    """What the traced program is for: the mesh's devices, which need not be here; without a mesh the default ones."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def device_kind() -> str:
    """What JAX calls a device that the traced program is for."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.devices()[0].device_kind if device is None else device.device_kind


def size(*axes: str) -> int:
    """Devices along axes of the mesh that traced code sees; 1 without a mesh."""
    shape = jax.sharding.get_abstract_mesh().shape
    return math.prod(shape.get(axis, 1) for axis in axes)


def shards(mesh: Mesh) -> int:
    """Parts that the rows of a batch are split into."""
    return math.prod(mesh.shape[axis] for axis in BATCH)


def experts_are_split(experts: int) -> bool:
    """Whether a group of so many experts is dealt to the mesh axis "expert" that traced code sees."""
    return experts % size(EXPERT) == 0


# Arrays ---------------------------------------------------------------------------------------------------------------


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def rows(mesh: Mesh) -> NamedSharding:
    """The first axis (rows) is split over the devices."""
    return NamedSharding(mesh, PartitionSpec(BATCH))


def shard_bytes(tree) -> int:
    """Bytes that one device holds of arrays with shardings, abstract ones too."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def placed_by(place: PartitionSpec) -> NamedSharding | None:
    """Where `place` is on the mesh that is in use; None on a single device."""
    return None if size(*AXES) == 1 else NamedSharding(jax.sharding.get_mesh(), place)


def own_groups(mesh: Mesh, groups: int) -> tuple[int, ...]:
    """Which of a batch's `groups` routing groups lie on devices of this process, ascending."""
    held = rows(mesh).addressable_devices_indices_map((groups,)).values()
    return tuple(sorted({i for (part,) in held for i in range(*part.indices(groups))}))


def unboxed(params):
    """Plain arrays of a tree of boxed Linen parameters."""
    is_box = lambda x: isinstance(x, nn.meta.AxisMetadata)  # noqa: E731
    # Linen's own `unbox` would constrain each array to axes of the mesh with the names of its logical ones.
    return jax.tree.map(lambda x: x.unbox(apply_constraint=False) if is_box(x) else x, params, is_leaf=is_box)


def shardings_of(boxed, mesh: Mesh):
    """Shardings of a tree of boxed Linen parameters (their abstract values will do), by RULES.

    Raises:
      InputError: a parameter names a logical axis that RULES does not know, two of its axes lie on the same mesh axis,
        or a mesh axis does not divide its dimension.
    """

    def one(path, spec: PartitionSpec, leaf) -> NamedSharding:
        return NamedSharding(
            mesh, mesh_spec(spec, leaf.shape, mesh, jax.tree_util.keystr(path, simple=True, separator="/"))
        )

    specs = nn.get_partition_spec(boxed)
    return jax.tree_util.tree_map_with_path(one, specs, unboxed(boxed), is_leaf=lambda s: isinstance(s, PartitionSpec))


def mesh_spec(spec: PartitionSpec, shape: tuple[int, ...], mesh: Mesh, name: str) -> PartitionSpec:
    """Logical axes to mesh axes for an array called `name`; errors as `shardings_of`."""
    table, used, result = dict(RULES), {}, []
    for axis, dimension in zip(spec, shape, strict=True):
        if axis is not None and axis not in table:
            raise InputError(f"sharding: no rule for the logical axis {axis!r} of {name}; add it to sharding.RULES")
        places = tuple(place for place in _names(table.get(axis)) if mesh.shape[place] > 1)
        for place in places:
            if place in used:
                raise InputError(
                    f"sharding: {axis} and {used[place]} of {name} both lie on the mesh axis {place}; change "
                    "sharding.RULES"
                )
            used[place] = axis
        if dimension % (parts := math.prod(mesh.shape[place] for place in places)):
            raise InputError(
                f"{' x '.join('mesh.' + place for place in places)}: {parts} devices do not divide the {dimension} of "
                f"{name}'s axis {axis}; use a divisor of {dimension}"
            )
        result.append(places if len(places) > 1 else places[0] if places else None)
    return PartitionSpec(*result)


# Inside the program ---------------------------------------------------------------------------------------------------

# What communicates is written out, each device's share of the work inside `shard_map`; the compiler's partitioner has
# only element-wise operations and small sums (reports, gradients of norms) to place. So what moves weights, tokens and
# activations stands here and in the callers.


def shard_map(function: Callable, in_specs: Any, out_specs: Any, check: bool = True) -> Callable:
    """`function` of every device's own parts of its arguments; itself where traced code sees a single device.

    `check` tracks which values differ between devices, so that gradients of those that do not are summed once. It can
    be left out where there are no gradients, or only of arguments that are split over the whole mesh.
    """
    if size(*AXES) == 1:
        return function
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=check)


def spec(*axes: str | None) -> PartitionSpec:
    """Where an array of these logical axes lies; mesh axes of one device are left out."""
    table = dict(RULES)
    return PartitionSpec(*(None if axis is None else split_axes(*_names(table[axis])) or None for axis in axes))


def gather_weight(weight, axes: Sequence[str | None], dtype, stored: Sequence[str] = STORED):
    """A device's part of a parameter of these logical axes, in `dtype`, gathered along those it is only stored along.

    The gradient is scattered back as it is summed, in `dtype`; then the copies on the other axes are summed in float32.
    """
    apart = {name for place in spec(*axes) for name in _names(place)}
    weight = pvary(weight, *(axis for axis in BATCH if axis not in apart)).astype(dtype)
    for dimension, axis in enumerate(axes):
        if axis in stored and (places := _names(spec(axis)[0])):
            weight = jax.lax.all_gather(weight, places, axis=dimension, tiled=True)
    return weight


def split_axes(*axes: str) -> tuple[str, ...]:
    """Those of the mesh axes that have several devices."""
    return tuple(axis for axis in axes if size(axis) > 1)


def _names(place: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes of an entry of RULES or of a PartitionSpec."""
    return (place,) if isinstance(place, str) else place or ()


def pvary(x, *axes: str):
    """The same value, free to differ between devices along mesh axes where it was equal; its gradients are summed."""
    return jax.lax.pcast(x, places, to="varying") if (places := split_axes(*axes)) else x


def psum(tree: Any, *axes: str) -> Any:
    """The sum over devices along mesh axes."""
    return jax.lax.psum(tree, places) if (places := split_axes(*axes)) else tree


def all_gather(x, dimension: int, *axes: str):
    """The parts that devices along mesh axes have of one dimension, joined."""
    places = split_axes(*axes)
    return jax.lax.all_gather(x, places, axis=dimension, tiled=True) if places else x


def pmean(tree: Any, *axes: str) -> Any:
    """The mean over devices along mesh axes."""
    return jax.lax.pmean(tree, places) if (places := split_axes(*axes)) else tree
