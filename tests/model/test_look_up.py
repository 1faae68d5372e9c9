"""Embedding look-up on a mesh: the table gathered, and its columns apart."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from processes import output, spawn

from moma_jax import sharding
from moma_jax.config import MeshConfig
from moma_jax.model import decoder

IDS, WIDTH, ROWS, SEQUENCE = 24, 16, 8, 6


def run(mesh: dict) -> dict:
    """Rows and gradient of the table on the devices of this process."""
    rng = np.random.default_rng(0)
    table_VD, dy_BSD = rng.normal(size=(IDS, WIDTH)).astype(np.float32), rng.normal(size=(ROWS, SEQUENCE, WIDTH))
    token_BS = rng.integers(0, IDS, (ROWS, SEQUENCE))

    def both(table_VD):
        y_BSD, backward = jax.vjp(lambda table: decoder.look_up(table, token_BS, jnp.float32), table_VD)
        return y_BSD, backward(jnp.asarray(dy_BSD, jnp.float32))[0]

    with sharding.use_mesh(sharding.make_mesh(MeshConfig(**mesh), ROWS)):
        lowered = jax.jit(both).lower(table_VD)
        y_BSD, grad_VD = lowered.compile()(table_VD)
    exchanged = "all_to_all" in lowered.as_text()
    return {"y": np.asarray(y_BSD).tolist(), "grad": np.asarray(grad_VD).tolist(), "exchanged": exchanged}


def test_both_ways_give_the_same_rows():
    meshes = {"one": {}, "stored": {"fsdp": 4, "expert": 2}, "split": {"data": 2, "fsdp": 2, "tensor": 2}}
    plain = run({})
    for mesh in ("stored", "split"):
        words = [(json.dumps(meshes[mesh]), str(gathered)) for gathered in (0, 1)]
        apart, whole = (json.loads(output(p)) for p in [spawn(__file__, *w, devices=8) for w in words])
        assert apart["exchanged"] and not whole["exchanged"]
        for found in (apart, whole):
            np.testing.assert_array_equal(found["y"], plain["y"])
            np.testing.assert_allclose(found["grad"], plain["grad"], atol=1e-6)  # sums in another order


def test_the_table_is_gathered_where_that_moves_less():
    paper_1b4 = (65536, 2048 // 64)
    assert decoder.gathering_pays(paper_1b4, 16 * 4096, 64)
    assert not decoder.gathering_pays(paper_1b4, 4096, 64), "few tokens"
    assert not decoder.gathering_pays((65536, 1024), 16 * 4096, 2), "wide columns"


if __name__ == "__main__":
    decoder.gathering_pays = lambda *_: sys.argv[2] == "1"
    print(json.dumps(run(json.loads(sys.argv[1]))))
