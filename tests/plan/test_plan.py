"""Planning: names of topologies, arithmetic, the choice of a mesh, the command."""

import dataclasses
import json
import math
import re
import sys

import jax
import pytest
from paths import ROOT
from planned import small

from moma_jax import recipes, sharding
from moma_jax.__main__ import main
from moma_jax.batch import Batch
from moma_jax.config import MeshConfig
from moma_jax.cost import cost
from moma_jax.errors import InputError
from moma_jax.model.decoder import first_routing_state
from moma_jax.plan import arithmetic_plan, memory, memory_use, plan, plan_search, search
from moma_jax.plan.topology import KINDS, topology_of
from moma_jax.training.step import abstract_state, make_program, make_train_step

CONFIGS = ROOT / "configs"

# Topologies -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "canonical", "devices", "hosts"),
    [
        ("v5p-128", "v5p:4x4x4", 64, 16),
        ("v5p:4x4x4", "v5p:4x4x4", 64, 16),
        ("v4-32", "v4:2x2x4", 16, 4),
        ("v5e-16", "v5e:4x4", 16, 4),
        ("v5litepod-16", "v5e:4x4", 16, 4),
        ("V6e-64", "v6e:8x8", 64, 16),
        ("2xv5e-256", "2xv5e:16x16", 512, 128),
        ("tpu7x:2x2x2", "tpu7x:2x2x2", 16, 2),
        ("h100:4x8", "h100:4x8", 32, 4),
        ("a100", "a100:1x1", 1, 1),
    ],
)
def test_names_of_topologies(name, canonical, devices, hosts):
    target = topology_of(name)
    assert (target.name, target.devices, target.hosts) == (canonical, devices, hosts)
    assert target.peak > 1e14 and target.memory > 1e10


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("v5q-8", "did you mean v5p"),
        ("v5p-7", "no slice in use"),
        ("v5p-129", "no slice in use"),
        ("v5p", "has no size"),
        ("v5p:4x4", "has 3 dimensions"),
        ("v5e:3x4", "2x2 chips"),
        ("h100-8", "GPUs are h100:8"),
        ("", "is not a name"),
        ("h100:99999999999", "at most 131072 GPUs"),
        ("99999999999xv5e-16", "64 slices"),
        ("v5p:9999999998x2x2", "at most 8960 chips"),
    ],
)
def test_what_is_no_topology_is_refused_in_one_line(name, complaint):
    with pytest.raises(InputError, match=complaint) as refused:
        topology_of(name)
    assert "\n" not in str(refused.value)


def test_the_clock_gives_the_peak_and_rings_need_whole_cubes():
    assert KINDS["v5e"].clock == pytest.approx(1.5e9, rel=0.01)
    assert KINDS["v5p"].clock == pytest.approx(1.75e9, rel=0.01)
    assert KINDS["v5p"].closes((4, 4, 8), 2) and not KINDS["v5p"].closes((2, 2, 4), 2)
    assert KINDS["v6e"].closes((8, 16), 1) and not KINDS["v6e"].closes((8, 16), 0)


# Arithmetic -----------------------------------------------------------------------------------------------------------


def test_arithmetic_by_hand_and_gpus():
    config = small("4t4i", MeshConfig(2, 2, 2, 1), batch_rows=32, accumulate=2)
    sizes = memory.arithmetic_bytes(config)
    total = cost(config)["parameters"]["total"]
    assert sizes["parameters"] == math.ceil(4 * total / 4) and sizes["optimizer"] == 2 * sizes["parameters"]
    assert sizes["gradients"] == 2 * sizes["parameters"]
    assert sizes["logits"] == 2 * 4 * 192 * 2560
    result = plan(config, "b200:8")
    assert result["method"] == "arithmetic" and result["fits"] and result["step_seconds_estimate"] is None
    assert result["bytes_per_device"]["total"] == sum(sizes.values())
    assert any("for want of a description" in w for w in result["warnings"])
    assert arithmetic_plan(config, topology_of("h100:8"))["host_checkpoint_bytes"] == 8 * 3 * sizes["parameters"]


def test_without_recomputation_heads_are_padded_to_128_lanes():
    config = small("4t4i", MeshConfig(2, 2, 2, 1), batch_rows=32, accumulate=2)
    assert memory.kept_beyond_cost(config) == 0, "with remat dots"
    wide, narrow = (
        dataclasses.replace(config, model=dataclasses.replace(config.model, remat="none", heads=heads))
        for heads in (2, 4)
    )
    assert memory.kept_beyond_cost(wide) > 0
    padding = 256 * (6 * 4 + 4 * 2)  # six arrays of float32, four of bfloat16
    assert memory.kept_beyond_cost(narrow) - memory.kept_beyond_cost(wide) == 16 * 384 * 4 * padding


def test_a_mesh_is_chosen_and_fits():
    config = recipes.recipe(CONFIGS / "paper_1b4.py", ["--model.ffn", "4t4i"])
    target = topology_of("v5p-128")
    chosen = search.choose(config, target)
    parts = chosen.mesh.data * chosen.mesh.fsdp * chosen.mesh.expert
    assert parts * chosen.mesh.tensor == 64 and search.fits(chosen, target)
    assert (2048 // chosen.train.accumulate // 4) % parts == 0, "whole routing groups"
    assert not search.fits(memory.with_mesh(config, 64, "v5p-128"), target), "a copy on every device would not fit"


def test_search_ranks_reports_and_can_be_interrupted():
    config = small("4t4i", MeshConfig(), batch_rows=32)
    lines = []
    result = plan_search(config, "h100:8", 3, lines.append)
    assert len(result["plans"]) == 3 and len(lines) == 4 and result["considered"] >= result["fit_by_arithmetic"] > 3
    assert {math.prod(p["mesh"].values()) for p in result["plans"]} == {8} and all(p["fits"] for p in result["plans"])
    assert not result["interrupted"] and result["refused"] == []
    done = []

    def interrupted(setting):
        if done:
            raise KeyboardInterrupt
        done.append({"fits": True, "tokens_per_second_estimate": 1.0, "mfu_estimate": 0.1, "mesh": {}, "remat": "none"})
        return done[0] | {"accumulate": 1, "bytes_per_device": {"total": 1}, "step_seconds_estimate": 1.0}

    result = search.search(config, topology_of("h100:8"), 3, interrupted, lines.append)
    assert len(result["plans"]) == 1 and "interrupted" in lines[-1] and result["interrupted"]


def test_search_goes_on_after_a_setting_that_is_refused_and_varies():
    config, target, asked, lines = small("4t4i", MeshConfig(), batch_rows=32), topology_of("h100:8"), [], []

    def planned(setting):
        asked.append((setting.model.remat, setting.train.accumulate))
        if len(asked) < 3:
            raise (InputError, RuntimeError)[len(asked) - 1]("no\nsuch thing")
        return plan(setting, target.name)

    result = search.search(config, target, 6, planned, lines.append)
    assert [len(result["refused"]), len(result["plans"]), len(lines)] == [2, 4, 7]
    assert all(reason.endswith(": no such thing") for reason in result["refused"]) and "no such thing" in lines[1]
    assert max(asked.count(kind) for kind in asked) == 2

    def never(setting):
        raise InputError("never")

    with pytest.raises(InputError, match="none of 6 settings could be planned, the last because .*never"):
        search.search(config, target, 6, never, lines.append)


def test_what_the_compiler_does_not_fit_is_tried_with_more_microbatches_then_with_less_kept(monkeypatch):
    tried = []

    def compiled_plan(config, target):
        tried.append((config.model.remat, config.train.accumulate))
        return arithmetic_plan(config, target) | {"fits": config.model.remat == "full"}

    monkeypatch.setattr(sys.modules["moma_jax.plan"], "compiled_plan", compiled_plan)
    config = small("4t4i", MeshConfig(), batch_rows=64)
    result = plan(dataclasses.replace(config, model=dataclasses.replace(config.model, remat="none")), "v5e-16")
    assert result["fits"] and result["mesh_chosen"] and result["remat"] == "full"
    policies = [remat for remat, _ in tried]
    assert policies == sorted(policies, key=list(search.REMAT_FLOPS).index) and set(policies) == set(search.REMAT_FLOPS)
    for policy in ("none", "dots"):
        counts = [count for remat, count in tried if remat == policy]
        assert counts[0] == 1 and counts == sorted(counts) and len(counts) > 1
    assert policies.count("full") == 1


def test_a_policy_that_keeps_less_is_chosen_where_it_is_faster(monkeypatch):
    config, target = small("4t4i", MeshConfig(), batch_rows=64), topology_of("v5e-16")
    asked = dataclasses.replace(config, model=dataclasses.replace(config.model, remat="none"))
    assert search.choose(asked, target).model.remat == "none"
    monkeypatch.setitem(search.REMAT_FLOPS, "dots", 0.5)
    assert search.choose(asked, target).model.remat == "dots"
    monkeypatch.setitem(search.REMAT_FLOPS, "none", 0.1)
    assert search.choose(config, target).model.remat == "dots", "what the config recomputes stays"


def test_every_candidate_splits_over_the_slices():
    found = list(search.candidates(small("8x", MeshConfig(), batch_rows=64), topology_of("2xv5e-16")))
    assert found and all(c.mesh.data % 2 == 0 or c.mesh.fsdp % 2 == 0 for c in found)


@pytest.mark.parametrize(
    ("mesh", "topology", "complaint"),
    [
        (MeshConfig(1, 1, 1, 4), "h100:4", "mesh.tensor: 4 devices do not divide model.heads 2"),
        (MeshConfig(1, 3, 1, 1), "h100:3", "mesh.fsdp x mesh.expert: 3 devices do not divide model.width 256"),
        (MeshConfig(28, 1, 1, 1), "h100:4x7", "16 routing groups of a microbatch do not split over the 28 devices"),
    ],
)
def test_a_mesh_that_does_not_divide_is_refused(mesh, topology, complaint):
    config = small("4t4i", mesh, batch_rows=32)
    with pytest.raises(InputError, match=complaint) as refused:
        plan(config, topology)
    assert "\n" not in str(refused.value)


def test_the_training_step_refuses_such_a_mesh_before_it_is_traced():
    config = small("4t4i", MeshConfig(1, 1, 1, 4), batch_rows=32)
    with pytest.raises(InputError, match="mesh.tensor: 4 devices do not divide model.heads 2"):
        make_program(config, devices=jax.devices() * 4)


def test_what_does_not_fit_anywhere_is_said(capsys):
    with pytest.raises(InputError, match="take more devices"):
        plan_search(recipes.recipe(CONFIGS / "paper_1b4.py"), "l4:1", 1, print)
    with pytest.raises(InputError, match="product is 8"):
        plan(small("dense", MeshConfig(fsdp=3), batch_rows=32), "h100:8")
    for words, complaint in (
        ([], "--topology: name what to plan for"),
        (["--topology", "h100:8", "--search", "--compiled", "0"], "--compiled: must be positive, is 0"),
        (["--topology", "v5e-16", "--mesh.tensor", "16", "--mesh.data", "1"], "mesh.tensor: 16 devices do not divide"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["plan", str(CONFIGS / "paper_90m.py"), *words])
        assert ended.value.code == 2 and complaint in capsys.readouterr().err


def test_without_libtpu_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'moma_jax\[plan\]'"):
        plan(small("dense", MeshConfig(), batch_rows=64), "v5e-16")


def test_the_command_prints_json_and_tables(capsys):
    main(["plan", str(CONFIGS / "paper_90m.py"), "--topology", "b200:8", "--json"])
    result = json.loads(capsys.readouterr().out)
    promised = {"fits", "devices", "bytes_per_device", "flops_per_device", "collective_bytes", "mfu_estimate"}
    assert promised | {"step_seconds_estimate", "expert_stacks_gathered", "replicated_logits"} <= set(result)
    sizes = result["bytes_per_device"]
    assert sum(sizes.values()) == 2 * sizes["total"]
    main(["plan", str(CONFIGS / "paper_90m.py"), "--topology", "b200:8", "--search", "--compiled", "2"])
    printed = capsys.readouterr()
    assert "fits (arithmetic alone)" in printed.out and "there is" in printed.out and "2/2" in printed.err


# What is kept ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ffn", ["4t4i", "mod+4t4i"])
def test_the_loop_over_the_layers_is_known_by_its_name(ffn):
    config = dataclasses.replace(small(ffn, MeshConfig(), batch_rows=8), mesh=MeshConfig())
    program = make_program(config)
    state = abstract_state(program, first_routing_state(config))
    batch = Batch(*(jax.ShapeDtypeStruct((8, 384), kind) for kind in ("int32",) * 4 + ("float32", "int8", "int8")))
    with sharding.use_mesh(program.mesh):
        text = jax.jit(make_train_step(program)).lower(state, batch).as_text(debug_info=True)
    loops = set(re.findall(r'"([^"]*/while)"', text))
    assert len([name for name in loops if memory_use.LAYERS.search(name)]) == 1, loops
