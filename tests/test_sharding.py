"""What a mesh refuses, in one line each, and where arrays lie."""

import logging

import flax.linen as nn
import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from moma_jax import sharding
from moma_jax.config import MeshConfig
from moma_jax.errors import InputError
from moma_jax.geometry import require_shards

MESH = AbstractMesh((1, 4, 2, 2), sharding.AXES)


class Chip:
    """A device that is not here."""

    platform, slice_index = "gpu", 0

    def __init__(self, number):
        self.id = number


def shape(groups, devices, alone=True, **sizes):
    return sharding._shape(MeshConfig(**sizes), groups, devices, alone)


def test_minus_one_is_what_is_left():
    assert shape(16, 8) == (8, 1, 1, 1)
    assert shape(16, 8, fsdp=2, tensor=2) == (2, 2, 1, 2)
    assert shape(16, 8, data=1, fsdp=-1) == (1, 8, 1, 1)
    assert shape(16, 8, data=2, fsdp=1, expert=-1) == (2, 1, 4, 1)


def test_one_process_leaves_devices_idle_and_says_so(caplog):
    with caplog.at_level(logging.WARNING):
        assert shape(6, 8) == (6, 1, 1, 1)
    assert "6 of 8 devices" in caplog.text
    assert shape(6, 8, fsdp=2) == (3, 2, 1, 1)


def test_pictures_split_over_devices_or_are_refused():
    require_shards(8, 4, "pictures of train.batch")
    with pytest.raises(InputError, match="mesh: 6 pictures of train.batch do not split over the 4 devices"):
        require_shards(6, 4, "pictures of train.batch")


@pytest.mark.parametrize(
    ("devices", "alone", "sizes", "message"),
    [
        (8, True, {"data": 16}, "data 16 are 16 devices, 8 are here"),
        (8, True, {"data": 1, "fsdp": 3, "expert": 4}, "fsdp 3 x expert 4 are 12 devices, 8 are here"),
        (8, False, {"data": 4}, "data 4 are 4 devices, 8 are here; fewer are asked for"),
        (8, False, {"fsdp": 3}, "8 devices do not split over data -1 x fsdp 3"),
        (2, True, {"fsdp": 4}, "2 devices do not split over data -1 x fsdp 4"),
    ],
)
def test_sizes_that_do_not_multiply_to_the_devices(devices, alone, sizes, message):
    with pytest.raises(InputError, match=message):
        shape(16, devices, alone, **sizes)


def test_a_device_holds_whole_routing_groups():
    with pytest.raises(InputError, match="6 routing groups of a microbatch do not split over the 4 devices"):
        sharding.make_mesh(MeshConfig(data=2, expert=2), 6, [Chip(i) for i in range(4)])


def test_devices_keep_their_order_but_on_a_torus():
    mesh = sharding._arranged((2, 2, 1, 2), chips := [Chip(i) for i in range(8)])
    assert mesh.ravel().tolist() == chips and mesh.shape == (2, 2, 1, 2)


def test_slices_are_joined_along_the_first_axis_that_they_divide():
    chips = [Chip(i) for i in range(8)]
    for chip in chips:
        chip.platform, chip.slice_index = "tpu", chip.id // 4
    with pytest.raises(InputError, match="2 slices divide neither data 1 nor fsdp 1"):
        sharding._arranged((1, 1, 8, 1), chips)


def place(axes, dimensions, name="w"):
    return sharding.mesh_spec(PartitionSpec(*axes), dimensions, MESH, name)


def test_logical_axes_become_mesh_axes_of_several_devices():
    assert place(("expert", "expert_embed", "ffn"), (4, 8, 6)) == PartitionSpec("expert", "fsdp", "tensor")
    assert place((None, "embed", "ffn"), (1, 8, 6)) == PartitionSpec(None, ("fsdp", "expert"), "tensor")
    assert place(("layers", "norm"), (3, 5)) == PartitionSpec(None, None)


@pytest.mark.parametrize(
    ("axes", "dimensions", "message"),
    [
        (("expert", "embed", "ffn"), (4, 8, 6), "embed and expert of w both lie on the mesh axis expert"),
        (("embed", "ffn"), (12, 6), "mesh.fsdp x mesh.expert: 8 devices do not divide the 12 of w's axis embed"),
        (("embed", "heads"), (8, 3), "mesh.tensor: 2 devices do not divide the 3 of w's axis heads"),
        (("embd", "heads"), (8, 2), "no rule for the logical axis 'embd' of w"),
    ],
)
def test_axes_that_cannot_be_laid_out(axes, dimensions, message):
    with pytest.raises(InputError, match=message):
        place(axes, dimensions)


def test_parameters_are_named_where_they_do_not_fit():
    boxed = {"layers": {"kernel": nn.LogicallyPartitioned(np.zeros((2, 2)), ("embed", "embbed"))}}
    with pytest.raises(InputError, match="'embbed' of layers/kernel"):
        sharding.shardings_of(boxed, sharding.make_mesh(MeshConfig(), 1))


def test_groups_of_the_only_process_are_all():
    mesh = sharding.make_mesh(MeshConfig(), 6)
    assert sharding.own_groups(mesh, 6) == tuple(range(6))


def test_without_a_mesh_there_is_one_device_of_the_default_platform():
    assert sharding.size(*sharding.AXES) == 1 and sharding.platform() == jax.default_backend()
    assert sharding.experts_are_split(7) and sharding.split_axes(*sharding.AXES) == ()
