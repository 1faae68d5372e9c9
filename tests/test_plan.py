"""Planning: names of topologies, arithmetic, the choice of a mesh, the command."""

import json
import math
from pathlib import Path

import pytest
from planned import small

from moma_jax import recipes
from moma_jax.__main__ import main
from moma_jax.config import MeshConfig
from moma_jax.cost import cost
from moma_jax.errors import InputError
from moma_jax.plan import arithmetic_plan, memory, plan, plan_search, search
from moma_jax.plan.topology import KINDS, topology_of

CONFIGS = Path(__file__).parent.parent / "configs"

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
    assert sizes["logits"] == 2 * 4 * 768 * 2560
    result = plan(config, "h100:8")
    assert result["method"] == "arithmetic" and result["fits"] and result["step_seconds_estimate"] is None
    assert result["bytes_per_device"]["total"] == sum(sizes.values())
    assert any("arithmetic" in w for w in result["warnings"]) and any("attention" in w for w in result["warnings"])
    assert arithmetic_plan(config, topology_of("h100:8"))["host_checkpoint_bytes"] == 8 * 3 * sizes["parameters"]


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
    assert {sum(p["mesh"].values()) for p in result["plans"]} and all(p["fits"] for p in result["plans"])
    done = []

    def interrupted(setting):
        if done:
            raise KeyboardInterrupt
        done.append({"fits": True, "tokens_per_second_estimate": 1.0, "mfu_estimate": 0.1, "mesh": {}, "remat": "none"})
        return done[0] | {"accumulate": 1, "bytes_per_device": {"total": 1}, "step_seconds_estimate": 1.0}

    result = search.search(config, topology_of("h100:8"), 3, interrupted, lines.append)
    assert len(result["plans"]) == 1 and "interrupted" in lines[-1]


def test_what_does_not_fit_anywhere_is_said(capsys):
    with pytest.raises(InputError, match="take more devices"):
        plan_search(recipes.recipe(CONFIGS / "paper_1b4.py"), "l4:1", 1, print)
    with pytest.raises(InputError, match="product is 8"):
        plan(small("dense", MeshConfig(fsdp=3), batch_rows=32), "h100:8")
    with pytest.raises(SystemExit):
        main(["plan", str(CONFIGS / "paper_90m.py")])
    assert "--topology: name what to plan for" in capsys.readouterr().err


def test_without_libtpu_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'moma_jax\[plan\]'"):
        plan(small("dense", MeshConfig(), batch_rows=64), "v5e-16")


def test_the_command_prints_json_and_tables(capsys):
    main(["plan", str(CONFIGS / "paper_90m.py"), "--topology", "h100:8", "--json"])
    result = json.loads(capsys.readouterr().out)
    assert {"fits", "devices", "bytes_per_device", "flops_per_device", "mfu_estimate"} <= set(result)
    main(["plan", str(CONFIGS / "paper_90m.py"), "--topology", "h100:8", "--search", "--compiled", "2"])
    printed = capsys.readouterr()
    assert "does it fit" not in printed.out and "there is" in printed.out and "2/2" in printed.err
