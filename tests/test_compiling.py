"""What the compiler is asked for, and where its programs are kept."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moma_jax import compiling, sharding
from moma_jax.config import MeshConfig
from moma_jax.errors import InputError


class FakeDevice:
    platform, device_kind = "tpu", "TPU v5"


class FakeMesh:
    def __init__(self, experts):
        self.devices, self.shape = np.array([FakeDevice()]), {sharding.EXPERT: experts}
        self.size = experts


def test_options_by_device_and_config():
    table = compiling.OPTIONS["TPU v5"]
    assert compiling.options_for(FakeMesh(1)) == table
    assert compiling.options_for(FakeMesh(4)) == table | compiling.APART
    own = compiling.options_for(FakeMesh(4), {compiling.VMEM: "", "xla_other": "7"})
    assert own == compiling.APART | {"xla_other": "7"}, "an empty one takes the table's out"
    assert compiling.options_for(sharding.make_mesh(MeshConfig(), 1)) == {}


@pytest.mark.parametrize("kind", ["TPU v5", "TPU v5 lite", "TPU v6 lite"])
def test_kinds_are_called_as_libtpu_calls_them(monkeypatch, kind):
    monkeypatch.setattr(FakeDevice, "device_kind", kind)
    assert compiling.options_for(FakeMesh(1)) == {compiling.VMEM: "49152"}
    asked = compiling.options_for(FakeMesh(4))
    assert ("xla_tpu_enable_async_all_to_all" in asked) == (kind != "TPU v5 lite"), "its links do not allow it"


def test_several_gpus_are_asked_to_gather_ahead(monkeypatch):
    monkeypatch.setattr(FakeDevice, "platform", "gpu")
    monkeypatch.setattr(FakeDevice, "device_kind", "NVIDIA H100 80GB HBM3")
    assert compiling.options_for(FakeMesh(1)) == {}
    assert compiling.options_for(FakeMesh(8)) == compiling.SEVERAL_GPUS


def test_a_cache_of_an_unknown_scheme_is_refused():
    with pytest.raises(InputError, match="run.compilation_cache: foo://x: give a folder"):
        compiling.use_cache("foo://x")


def test_what_a_compiler_does_not_know_is_left_out_and_said(caplog):
    lowered = jax.jit(lambda x: x + 1).lower(jnp.ones(3))
    asked = {"xla_no_such_option": "1", "xla_cpu_enable_fast_math": "maybe", "xla_backend_optimization_level": "1"}
    compiled = compiling.compiled_for(lowered, sharding.make_mesh(MeshConfig(), 1), asked)
    np.testing.assert_array_equal(compiled(jnp.ones(3)), [2, 2, 2])
    assert "without xla_no_such_option" in caplog.text and "without xla_cpu_enable_fast_math" in caplog.text
    assert "optimization_level" not in caplog.text


CACHED = """
import json, sys
import jax, jax.numpy as jnp
from moma_jax.compiling import use_cache
use_cache(None if sys.argv[1] == "None" else sys.argv[1])
jax.jit(lambda x: jnp.sin(x) * 3)(jnp.ones(7)).block_until_ready()
print(json.dumps(jax.config.jax_compilation_cache_dir))
"""


def test_a_folder_that_cannot_be_made_keeps_nothing(tmp_path, caplog, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(jax.config, "update", lambda name, value: found.setdefault(name, value))
    found = {}
    compiling.use_cache(str(tmp_path / "file" / "cache"))
    assert found["jax_compilation_cache_dir"] is None and "are not kept" in caplog.text


@pytest.mark.parametrize("asked", ["None", "off", "own"])
def test_where_programs_are_kept(tmp_path, asked):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_COMPILATION", "JAX_PERSISTENT"))}
    environment["XDG_CACHE_HOME"] = str(tmp_path / "home")
    words = [sys.executable, "-c", CACHED, str(tmp_path / "own") if asked == "own" else asked]
    found = subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout
    folder = json.loads(found)
    places = {"None": str(tmp_path / "home" / "moma_jax" / "compiled"), "own": str(tmp_path / "own"), "off": None}
    assert folder == places[asked]
    if folder is None:
        assert not (tmp_path / "home").exists()
    else:
        assert any(name.endswith("-cache") for name in os.listdir(folder))


def test_the_oldest_programs_go_and_those_that_are_empty(tmp_path, monkeypatch):
    monkeypatch.setattr(compiling, "CACHE_BYTES", 25)
    for age, (name, size) in enumerate(
        {"c-cache": 10, "a-cache": 10, "empty-cache": 0, "b-cache": 10, "else": 90}.items()
    ):
        (tmp_path / name).write_bytes(bytes(size))
        os.utime(tmp_path / name, (1000 + age, 1000 + age))
    compiling._sweep(str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == ["a-cache", "b-cache", "else"]


def test_nothing_is_written_where_nothing_can_be(tmp_path, caplog, monkeypatch):
    found = {}
    monkeypatch.setattr(jax.config, "update", lambda name, value: found.setdefault(name, value))
    monkeypatch.setattr(os, "access", lambda *_: False)
    compiling.use_cache(str(tmp_path))
    assert found["jax_compilation_cache_dir"] == str(tmp_path) and "not kept" in caplog.text
    assert found["jax_persistent_cache_min_compile_time_secs"] > 1e6


INITIAL = """
import hashlib, sys
import jax, numpy as np
from tiny import tiny
from moma_jax import compiling, sharding
from moma_jax.checks import resolve
from moma_jax.model.decoder import first_routing_state
from moma_jax.training import step
if sys.argv[1] == "plain":
    compiling.ONCE = {}
config = step.with_dtype(resolve(tiny("unused")))
program = step.make_program(config)
with sharding.use_mesh(program.mesh):
    state = step.create_state(program, first_routing_state(config))
print(hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(state))).hexdigest())
"""


def test_little_effort_draws_the_same_initial_values():
    """With the compiler's optimisations, which tests do without."""
    environment = {k: v for k, v in os.environ.items() if k != "JAX_DISABLE_MOST_OPTIMIZATIONS"}
    words = [sys.executable, "-c", INITIAL]
    hashes = {
        subprocess.run([*words, how], env=environment, capture_output=True, text=True, check=True).stdout
        for how in ("plain", "once")
    }
    assert len(hashes) == 1
