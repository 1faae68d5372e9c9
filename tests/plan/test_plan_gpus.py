"""Steps compiled for GPUs that are not here."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from moma_jax.config import Config
from moma_jax.errors import InputError
from moma_jax.plan import described, gpus, plan_search, with_dtype
from moma_jax.plan.gpus import GPUS
from moma_jax.plan.topology import topology_of


def planned(*words):
    """What the command says, in a process of its own: the plugin reads its environment once."""
    command = [sys.executable, "-m", "moma_jax", "plan", "configs/corpus_cpu.py", "--json", *words]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_every_description_is_of_a_topology():
    for kind, gpu in GPUS.items():
        target = topology_of(f"{kind}:1")
        assert gpu.name in target.target and target.memory == pytest.approx(gpu.memory, rel=0.08)
    assert with_dtype(Config(), topology_of("t4:1")).model.dtype == "float32"
    assert with_dtype(Config(), topology_of("l4:1")).model.dtype == "bfloat16"


def test_a_file_goes_before_our_description(tmp_path):
    text = gpus.described("h100").replace("84929347584", "40e9")
    (tmp_path / "gpu").write_text(text)
    target = described(topology_of("b200:8"), str(tmp_path / "gpu"))
    assert (target.target, target.memory) == (text, 40e9)
    with pytest.raises(InputError, match="--target: describes GPUs, and v5p:4x4x4 are TPUs"):
        described(topology_of("v5p-128"), str(tmp_path / "gpu"))
    with pytest.raises(InputError, match="--target: .*none"):
        plan_search(Config(), "b200:8", target_file=str(tmp_path / "none"))
    with pytest.raises(InputError, match="--target: .*none"):
        described(topology_of("b200:8"), str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("core_count: 132", "core_count: -132", "core_count is -132; give a number above 0"),
        ("threads_per_warp: 32", "", "threads_per_warp is missing"),
        ("1.98", "nan", "clock_rate_ghz is nan"),
        ("device_memory_size: 84929347584", "device_memory_size: 0", "device_memory_size is 0"),
        ("major: 9 minor: 0", "minor: 0 major: 99", "cuda_compute_capability has major 99; give one from 7 to 12"),
        ("cuda_compute_capability { major: 9 minor: 0 }", "", "cuda_compute_capability has major None"),
    ],
)
def test_a_description_that_would_end_the_compiler_is_refused(tmp_path, old, new, said):
    text = gpus.described("h100")
    assert old in text
    (tmp_path / "gpu").write_text(text.replace(old, new))
    with pytest.raises(InputError, match=f"--target: .*{said}"):
        described(topology_of("h100:8"), str(tmp_path / "gpu"))


def test_an_old_gpu_is_known_however_it_is_written():
    new, old = gpus.described("h100"), "cuda_compute_capability { major: 9 minor: 0 }"
    assert old in new
    text = new.replace(old, "cuda_compute_capability: { minor: 5 major: 7 }")
    assert not topology_of("h100:8")._replace(target=gpus.checked(text)).narrow


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is None,
    reason="JAX's CUDA plugin is not installed: pip install 'moma_jax[plan-gpu]'",
)
def test_the_real_step_is_compiled(tmp_path):
    result = planned("--topology", "h100:2", "--model.ffn", "4t4i")
    sizes = result["bytes_per_device"]
    assert result["method"] == "compiled" and result["fits"]
    assert sizes["total"] > sizes["parameters"] + sizes["optimizer"] > 0
    assert not any("attention" in warning for warning in result["warnings"]), "the kernel is used"
    assert any("not estimated" in warning for warning in result["warnings"])
    old = planned("--topology", "t4:1", "--model.ffn", "dense")
    assert old["method"] == "compiled" and any("too old" in warning for warning in old["warnings"])
    (tmp_path / "gpu").write_text(gpus.described("h100") + "no description {")
    command = [sys.executable, "-m", "moma_jax", "plan", "configs/corpus_cpu.py", "--topology", "h100:2"]
    bad = subprocess.run([*command, "--target", str(tmp_path / "gpu")], capture_output=True, text=True, env=os.environ)
    assert bad.returncode == 2 and "from its description" in bad.stderr.splitlines()[-1]
