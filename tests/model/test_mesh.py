"""The mesh changes nothing: every layout of eight devices gives the losses and the choices of one device."""

import dataclasses
import functools
import json
import shutil
import sys
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest
from processes import output, spawn
from rival_rules import RIVALS
from tiers import long_but
from tiny import tiny

import moma_jax
from moma_jax import sharding
from moma_jax.config import Config, MeshConfig, RoutersConfig, with_router
from moma_jax.data.stream import open_stream
from moma_jax.model import dispatch
from moma_jax.model.decoder import first_routing_state
from moma_jax.training.step import compile_step, create_state, make_program, put, run_decoder

LAYOUTS = ["dense", "8x", "1t1i", "4t4i", "7t1i", "4t4i+1x", "mod+2t2i"]
MESHES = {
    "one": {"data": 1},
    "data": {"data": 8},
    "fsdp": {"data": 1, "fsdp": 8},
    "expert": {"data": 1, "expert": 8},
    "tensor": {"data": 1, "tensor": 8},
    "data_fsdp_expert": {"data": 2, "fsdp": 2, "expert": 2},
    "fsdp_expert_tensor": {"data": 1, "fsdp": 2, "expert": 2, "tensor": 2},
    "expert_tensor": {"data": 1, "expert": 4, "tensor": 2},
    "data_expert": {"data": 2, "expert": 4},
}
WHOLE = "4t4i"
"""The layout that is tried on every mesh; the others on those of `SOME`, which have every axis between them."""
SOME = ("fsdp_expert_tensor", "data_expert")
RULED = [f"{WHOLE}:{name}" for name in RIVALS]
"""The same layout under other rules, on those of `SOME`."""
OWN = ["4t4i:own", "mod+2t2i:own"]
"""Attention weights of each modality's own."""
SHARED = ["4t4i:kv"]
"""Heads that share keys, of a width of their own, another norm of them, one table for both embeddings."""
FAST = ("4t4i", "data_fsdp_expert")
"""The layout and mesh of the fast tier: each axis but tensor, and microbatches."""
STEPS = 12


def config(ffn: str, sizes: dict[str, int]) -> Config:
    """A tiny model whose every axis eight devices divide; `ffn` may name a rule, FFN:RULE."""
    ffn, _, rule = ffn.partition(":")
    layers = 2 if ffn.startswith("mod+") else 1
    small = tiny(model_ffn=ffn, model_heads=8, model_width=64, model_hidden=32, model_layers=layers)
    weights = "by_modality" if rule == "own" else "shared"
    model = dataclasses.replace(small.model, depth_capacity=0.5, attention_weights=weights)
    if rule == "kv":
        heads = {"heads": 4, "kv_heads": 2, "head_width": 12, "qk_norm": "rms"}
        model = dataclasses.replace(model, tied_embeddings=True, **heads)
    if rule == "remoe":  # whose gates can be next to nothing, which a swin norm divides by: rounding would decide
        model = dataclasses.replace(model, norm="pre")
    data = dataclasses.replace(small.data, sequence=8, group_rows=1)
    accumulate = 2 if sizes["data"] == 2 else 1
    train = dataclasses.replace(small.train, steps=STEPS, batch_rows=16, accumulate=accumulate, loss_chunk=24)
    small = dataclasses.replace(small, model=model, data=data, train=train, mesh=MeshConfig(**sizes))
    return with_router(small, RIVALS[rule]) if rule in RIVALS else small


def curve(config: Config) -> dict:
    """Losses by modality and gradient norms of some updates, who was taken in each, and the first selections."""
    program = make_program(config)
    records, taken = [], []
    with sharding.use_mesh(program.mesh), open_stream(config) as batches:
        state = create_state(program, first_routing_state(config))
        selections, slots = _selections(program, state, next(iter(open_stream(config))).batch)
        step = compile_step(program, state)
        for _, packed in zip(range(config.train.steps), batches, strict=False):
            state, report = step(state, put(packed.batch, program.mesh))
            sums = report.sums
            records.append([*np.asarray(sums.cross_entropy_J / sums.weight_J).tolist(), float(report.grad_norm)])
            taken.append(np.asarray(report.taken_M3).tolist())
        thresholds = [np.asarray(x, np.float64).ravel().tolist() for x in jax.tree.leaves(state.routing_state)]
    found = {"devices": program.mesh.size, "records": records, "taken": taken, "thresholds": sum(thresholds, [])}
    return found | {"selections": selections, "slots": slots}


def _selections(program, state, batch) -> tuple[dict, int]:
    """Who takes whom before the first update, and slots of routed experts that one device computes."""
    shapes, swiglu = [], dispatch.swiglu

    def seen(x_END, *rest):
        shapes.append(x_END.shape[:2])
        return swiglu(x_END, *rest)

    groups = np.arange(len(batch.token_BS) // program.config.data.group_rows)
    run = jax.jit(
        lambda params, batch: (
            run_decoder(
                program, params, batch, 0, groups, state.routing_state, False, return_selections=True
            ).selections
        )
    )
    with mock.patch.object(dispatch, "swiglu", seen):
        chosen = run(state.params, put(batch, program.mesh))
    selections = {name: np.asarray(selection.index_EC).tolist() for name, selection in chosen.items()}
    return selections, sum(experts * slots for experts, slots in shapes)


def meshes_of(ffn: str) -> list[str]:
    return [name for name in MESHES if name != "one" and (ffn == WHOLE or name in SOME)]


@pytest.fixture(scope="module")
def curves(tmp_path_factory):
    """The curves of a layout by mesh, made when first asked for."""
    folder = tmp_path_factory.mktemp("curves")
    return functools.cache(lambda ffn: on_eight_devices(folder / f"{ffn}.json", ffn, "one", *meshes_of(ffn)))


def on_eight_devices(path: Path, what: str, *meshes: str) -> dict:
    """What `main` writes where there are eight virtual devices."""
    output(spawn(__file__, path, what, *meshes, devices=8))
    return json.loads(path.read_text())


def test_a_mesh_gives_the_curve_of_one_device(tmp_path):
    ffn, mesh = FAST
    found = on_eight_devices(tmp_path / "curves.json", ffn, "one", mesh)
    assert_same_curves(found["one"], found[mesh])


EVERY = [(ffn, mesh) for ffn in LAYOUTS + RULED + OWN + SHARED for mesh in meshes_of(ffn)]
OTHERS = [(f"{WHOLE}:{rule}", "fsdp_expert_tensor") for rule in ("deepseek", "null", "sinkhorn", "own", "kv")]


@pytest.mark.slow
@pytest.mark.parametrize(("ffn", "mesh"), long_but(*((WHOLE, mesh) for mesh in meshes_of(WHOLE)), *OTHERS, of=EVERY))
def test_every_mesh_does(curves, ffn, mesh):
    assert_same_curves(curves(ffn)["one"], curves(ffn)[mesh])


def assert_same_curves(one: dict, many: dict):
    assert (one["devices"], many["devices"]) == (1, 8)
    assert many["selections"] == one["selections"]
    assert many["taken"] == one["taken"]
    np.testing.assert_allclose(many["records"], one["records"], rtol=1e-5)
    np.testing.assert_allclose(many["thresholds"], one["thresholds"], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("ffn", long_but(WHOLE, of=LAYOUTS))
def test_devices_share_the_slots_equally(curves, ffn):
    one = curves(ffn)["one"]["slots"]
    assert (one > 0) == (ffn != "dense")
    for name, found in curves(ffn).items():
        assert found["slots"] * found["devices"] == one * MESHES[name].get("tensor", 1)


def evaluations(folder: Path) -> dict:
    """Held-out figures of a run by the mesh that they were computed on, routers fitted on two meshes included."""
    meshes = {"training": MeshConfig(2, 2, 2, 1), "whole": None, "other": MeshConfig(1, 2, 2, 2)}
    small = tiny(folder / "run", model_heads=4, model_width=32, train_batch_rows=16, train_steps=4)
    summary = moma_jax.train(dataclasses.replace(small, mesh=meshes["training"]), quiet=True)
    found = {"training": summary["eval"]["heldout"]}
    stage = RoutersConfig(steps=2, batch_rows=16, warmup_steps=1)
    for name, mesh in list(meshes.items())[1:]:
        run = shutil.copytree(folder / "run", folder / name)
        moma_jax.fit_routers(str(run), stage, quiet=True, mesh=mesh)
        found[name] = moma_jax.evaluate(str(run), mesh=mesh)
    return found


@pytest.mark.slow
def test_a_run_is_evaluated_and_fitted_on_any_mesh(tmp_path):
    found = on_eight_devices(tmp_path / "found.json", "evaluations")
    for routing, names in (("choice", found), ("threshold", found), ("causal", ("whole", "other"))):
        for figure in ("loss", "loss_text", "loss_image", "experts_per_token"):
            one, *others = (found[name][routing][figure] for name in names)
            assert others == pytest.approx([one] * len(others), rel=1e-5), (routing, figure)


def main(path: str, what: str, *meshes: str):
    if what == "evaluations":
        found = evaluations(Path(path).parent)
    else:
        found = {name: curve(config(what, MESHES[name])) for name in meshes}
    Path(path).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
