"""What a compiled step must not do, in hand-made programs that do it, and in such as look like it."""

import importlib

import pytest
from planned import small

from moma_jax.config import MeshConfig

hlo, placement = (importlib.import_module(f"moma_jax.plan.{name}") for name in ("hlo", "placement"))

CROSSING = """HloModule m

ENTRY %main (x: f32[8]) -> f32[8] {{
  %x = f32[8]{{0}} parameter(0)
  %part = bf16[{part}]{{0}} bitcast(%x)
  %moved = bf16[{shape}]{{0}} {opcode}(%part), {groups}
  ROOT %y = f32[8]{{0}} bitcast(%moved)
}}
"""
OVER_EXPERT, OVER_FSDP = "replica_groups=[2,4]<=[8]", "replica_groups=[4,2]<=[2,4]T(1,0)"
RING = "source_target_pairs={{0,1},{1,2},{2,3},{3,0}}"


@pytest.mark.parametrize(
    ("opcode", "part", "shape", "groups", "wrong"),
    [
        ("all-gather", "1,256,896", "4,256,896", OVER_EXPERT, True),
        ("all-gather", "1,128,896", "4,128,896", OVER_EXPERT, True),  # the part of a stack that fsdp leaves
        ("all-gather", "256,896", "1024,896", OVER_EXPERT, True),
        ("all-gather-start", "896,1,256", "896,4,256", OVER_EXPERT, True),
        ("all-reduce", "917504", "917504", OVER_EXPERT, True),  # of a dynamic-update-slice, flat
        ("reduce-scatter", "4,256,896", "1,256,896", OVER_EXPERT, True),
        ("collective-permute", "1,256,896", "1,256,896", RING, True),
        ("all-gather", "1,128,896", "1,256,896", OVER_FSDP, False),
        ("all-to-all", "4,256,896", "4,256,896", OVER_EXPERT, False),
        ("all-gather", "64,2560", "256,2560", OVER_EXPERT, False),  # the vocabulary's table
        ("all-gather", "64,2,128", "256,2,128", OVER_EXPERT, False),  # attention
    ],
)
def test_weights_of_experts_that_are_moved_over_expert_are_found(opcode, part, shape, groups, wrong):
    config = small("4t4i", MeshConfig(1, 2, 4, 1), batch_rows=64)
    module = hlo.parse(CROSSING.format(opcode=opcode, part=part, shape=shape, groups=groups))
    found = placement.expert_stacks_gathered(module, config)
    assert bool(found) == wrong and all(f.startswith(opcode.removesuffix("-start")) for f in found)
    assert placement.expert_stacks_gathered(module, small("dense", MeshConfig(1, 2, 4, 1), batch_rows=64)) == []


@pytest.mark.parametrize(
    ("shape", "wrong"),
    [
        ("192,1280", False),  # a chunk's, over tensor 2
        ("192,2560", True),  # all ids
        ("6144,1280", True),  # all tokens of a device
        ("16,384,1280", True),
        ("12288,1280", True),  # all tokens of a microbatch
        ("7864320", True),  # flat
        ("30720,256", False),  # as many elements, but hidden states
    ],
)
def test_logits_that_are_too_many_are_found(shape, wrong):
    config = small("dense", MeshConfig(1, 2, 1, 2), batch_rows=32)
    text = CROSSING.format(opcode="copy", part=shape, shape=shape, groups="").replace("bf16", "f32")
    assert placement.replicated_logits(hlo.parse(text), config) == wrong
