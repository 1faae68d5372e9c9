"""Three training steps compiled for TPUs that are not here, and what their programs say."""

import importlib
import json
import pickle
import subprocess
import sys

import pytest
from paths import ROOT
from planned import small
from processes import output, spawn
from tiers import long_but

from moma_jax.config import MeshConfig
from moma_jax.cost import cost
from moma_jax.geometry import layer_of
from moma_jax.plan import memory

pytestmark = pytest.mark.slow  # compiles for TPUs

hlo = importlib.import_module("moma_jax.plan.hlo")

PROGRAMS = {
    "4t4i": ("v5e:4x4", MeshConfig(2, 2, 4, 1)),
    "dense": ("v6e:2x4", MeshConfig(1, 4, 1, 2)),
    "8x": ("v5p:2x2x2", MeshConfig(1, 2, 4, 1)),
}
ROWS = 512  # fewer, and the cores' own memory holds what the forward pass keeps
COMPILE = """
import importlib, json, pathlib, pickle, sys
from moma_jax.plan import plan
compiler = importlib.import_module("moma_jax.plan.compile")
compile_step, here = compiler.compile_step, pathlib.Path(sys.argv[1])
for name, (topology, config) in pickle.loads((here / "programs").read_bytes()).items():
    def keep(config, target):
        compiled = compile_step(config, target)
        (here / f"{name}.hlo").write_text(compiled.text)
        return compiled
    compiler.compile_step = keep
    (here / f"{name}.json").write_text(json.dumps(plan(config, topology)))
"""


class Programs(dict):
    """name -> (config, plan, compiled program), each compiled when first asked for, in a process of its own: what other
    tests do to JAX stays out."""

    def __init__(self, here):
        super().__init__()
        self.here = here

    def __missing__(self, name):
        topology, mesh = PROGRAMS[name]
        config = small(name, mesh, batch_rows=ROWS, accumulate=2)
        (self.here / "programs").write_bytes(pickle.dumps({name: (topology, config)}))
        subprocess.run([sys.executable, "-c", COMPILE, str(self.here)], check=True, timeout=600)
        plan, program = ((self.here / f"{name}.{end}").read_text() for end in ("json", "hlo"))
        self[name] = config, json.loads(plan), hlo.parse(program)
        return self[name]


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    pytest.importorskip("libtpu", reason="libtpu is not installed: pip install 'moma_jax[plan]'")
    return Programs(tmp_path_factory.mktemp("programs"))


each_program = pytest.mark.parametrize("name", long_but("4t4i", of=list(PROGRAMS)))


@each_program
def test_attention_is_by_kernels(programs, name):
    """Forward and backward, on v5e, v5p and v6e."""
    _, result, module = programs[name]
    names = {i.name.split(".")[0] for c in module.computations.values() for i in c.instructions}
    assert {"forward_turned", "backward_turned"} <= names and any(n.startswith("splash_mha_dkv") for n in names)
    assert not any("attention" in warning for warning in result["warnings"])


@each_program
def test_a_compiled_plan_says_everything(programs, name):
    config, result, _ = programs[name]
    assert result["fits"] and result["method"] == "compiled" and not result["mesh_chosen"]
    sizes = result["bytes_per_device"]
    assert sizes["parameters"] > 0 and sizes["optimizer"] > 0 and sizes["temporaries"] > 0
    assert sizes["activations"] > 0, "the loop over the layers was found"
    assert sum(sizes.values()) == 2 * sizes["total"]
    assert 0 < result["mfu_estimate"] < 1 and 0 <= result["exposed_communication_share"] < 1
    assert result["flops_per_device"] == cost(config)["flops_per_token"]["train"] * ROWS * 384 / result["devices"]
    assert not [w for w in result["warnings"] if "unknown" in w], "every loop says how often it turns"
    assert set(result["unestimated"]) >= ({"sort", "gather", "scatter"} if name != "dense" else set())


@each_program
def test_state_bytes_match_cost(programs, name):
    config, result, _ = programs[name]
    expected = memory.state_bytes(config)
    for category in ("parameters", "optimizer"):
        assert result["bytes_per_device"][category] == pytest.approx(expected[category], rel=0.05)


@pytest.mark.parametrize("name", long_but("4t4i", of=["4t4i", "8x"]))
def test_all_to_all_bytes_match_a_hand_formula(programs, name):
    """Per layer and microbatch the slots of a device's routing groups go to their experts and come back, and so do
    their gradients: four times slots x D in bfloat16, of which all but one part of `expert` leaves the device."""
    config, result, _ = programs[name]
    groups = ROWS // 2 // 2 // memory.row_parts(config)
    slots = groups * sum(own.group.experts * own.slots for own in layer_of(config).groups)
    expert = config.mesh.expert
    expected = 4 * 2 * 4 * slots * 256 * 2 * (expert - 1) / expert
    assert result["collective_bytes"]["all-to-all"]["expert"] == pytest.approx(expected, rel=0.05)


@each_program
def test_neither_experts_nor_logits_lie_where_they_should_not(programs, name):
    """No stack of experts is moved over the expert axis, and a device holds logits of one chunk of its own tokens, and
    of its own part of the vocabulary."""
    config, result, module = programs[name]
    assert result["expert_stacks_gathered"] == [] and result["replicated_logits"] is False
    bound = config.train.loss_chunk * config.vocabulary_size // config.mesh.tensor
    assert config.train.loss_chunk < config.batch_tokens // config.train.accumulate // memory.row_parts(config)
    every = [a for c in module.computations.values() for i in c.instructions for a in i.arrays]
    assert any(a.elements == bound for a in every), "the chunk's logits are there, or this test looks at nothing"
    if config.mesh.expert > 1:
        crossing = {axes for sent in result["collective_bytes"].values() for axes in sent if "expert" in axes}
        assert crossing, "something crosses the expert axis, or this test looks at nothing"


def test_writing_is_planned_from_its_programs(tmp_path):
    """Matrices in bfloat16 and the cache, an eighth of both; a device's parts and what a program needs beside them."""
    pytest.importorskip("libtpu", reason="libtpu is not installed: pip install 'moma_jax[plan]'")
    shape = {"layers": 2, "heads": 8, "width": 512, "hidden": 512}
    options = [word for name, size in shape.items() for word in (f"--model.{name}", str(size))]
    asked = ["plan", "configs/paper_90m.py", "--topology", "v5e-8", "--generate", "4", "--json", *options]
    found = json.loads(output(spawn("-m", "moma_jax", *asked, cwd=ROOT)))
    assert found["fits"] and found["mesh"] == {"data": 1, "fsdp": 1, "expert": 1, "tensor": 8}
    vocabulary, layers, width = 65536, shape["layers"], shape["width"]
    matrices = 2 * vocabulary * width + layers * (4 * width**2 + 8 * 3 * width * shape["hidden"])
    sizes = found["bytes_per_device"]
    assert 1 <= sizes["weights"] / (2 * matrices / 8) < 1.1  # norms and routers are whole
    cache = layers * 2 * 4 * found["positions"] * width * 2 / 8
    assert cache <= sizes["cache"] < 1.01 * cache
    assert sizes["parameters"] == pytest.approx(2 * sizes["weights"], rel=0.1)
    assert sizes["total"] == max(found["programs"].values()) > sizes["parameters"] + sizes["weights"] + sizes["cache"]
