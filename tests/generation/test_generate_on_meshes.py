"""Generation on eight virtual devices: the same tokens as on one, and no device holds more than its part."""

import json
import os

import pytest
from processes import output, spawn
from tiny import tiny

import moma_jax
from moma_jax.generation import Guidance, Sampling, generate_ids
from moma_jax.model.decode import DEEP
from moma_jax.training.pretrain import train

SHAPE = {
    **{"model_ffn": "mod+2t2i+1x", "model_width": 32, "model_heads": 8, "model_hidden": 16, "model_ffn_width": 32},
    **{"train_steps": 2, "train_batch_rows": 64},
}
PROMPTS = [[0], [0, 9, 30, 12], [0, 4, 41, 50, 63, 40, 5, 20]]
WRITE = """
import json, sys
import jax
import moma_jax
from moma_jax.config import MeshConfig
from moma_jax.generation.generating import generator_of
from moma_jax.model import decode
from test_generate_on_meshes import written
found, decode.DEEP = {}, int(sys.argv[3])
for name, sizes in json.loads(sys.argv[2]).items():
    model = moma_jax.load(sys.argv[1], mesh=MeshConfig(*sizes))
    tokens = written(model)
    arrays = jax.tree.leaves(generator_of(model)._weights)
    parts = [sum(shard.data.nbytes for shard in x.addressable_shards if shard.device.id == 0) for x in arrays]
    found[name] = (tokens, sum(parts), sum(x.nbytes for x in arrays))
print("FOUND", json.dumps(found))
"""
MESHES = {"some of both": (2, 2, 1, 2)}
MORE = {"tensor": (1, 1, 1, 8), "all": (1, 2, 2, 2)}


def written(model) -> list[list[int]]:
    """Greedy tokens, without and with guidance."""
    greedy = {"text": Sampling(temperature=0.0), "image": Sampling(temperature=0.0), "routing": "threshold"}
    free = generate_ids(model, PROMPTS, **greedy)
    guided = generate_ids(model, PROMPTS, mode="image", guidance=Guidance(2.0, 1.5), **greedy)
    return [output.ids.tolist() for output in free + guided]


@pytest.mark.parametrize(
    "deep, meshes",
    [
        (DEEP, MESHES),
        pytest.param(DEEP, MORE, marks=pytest.mark.long),
        pytest.param(2, MESHES, marks=pytest.mark.long),  # so two layers are written by calls from the host
    ],
)
def test_tokens_are_those_of_one_device(tmp_path, deep, meshes):
    config = tiny(tmp_path / "run", **SHAPE)
    train(config, quiet=True)
    alone = written(moma_jax.load(config.run.dir))
    assert len({tuple(ids) for ids in alone}) > 3, "documents differ"
    there = {"PYTHONPATH": os.pathsep.join([os.environ["PYTHONPATH"], os.path.dirname(__file__)])}
    said = output(spawn("-c", WRITE, config.run.dir, json.dumps(meshes), deep, devices=8, **there))
    found = json.loads(said.partition("FOUND ")[2])
    assert found.keys() == meshes.keys()
    for name, (tokens, held, whole) in found.items():
        assert tokens == alone, name
        assert held <= 1.35 * whole * meshes[name][0] / 8, name  # routers and norms of so small a model are everywhere
