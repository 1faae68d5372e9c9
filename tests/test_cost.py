"""cost.py against the paper's Table 1, against the initialised model, and against the training step's own jaxpr."""

import dataclasses
import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jaxprs import product_flops, program_of, step_jaxpr, tiny
from paths import ROOT
from rival_rules import RIVALS
from tiers import long_but

from moma_jax import recipes
from moma_jax.cost import cost, flops_per_token, format_cost, peak_flops, total_steps
from moma_jax.model.decoder import first_routing_state
from moma_jax.routers.choice import Choice
from moma_jax.routers.threshold import Threshold
from moma_jax.training import step as step_lib

CONFIGS = ROOT / "configs"


# Against the paper ----------------------------------------------------------------------------------------------------

TABLE_1 = [
    ("paper_90m", "dense", 92e6),
    ("paper_90m", "8x", 210e6),
    ("paper_90m", "4t4i", 210e6),
    ("paper_435m", "dense", 436e6),
    ("paper_435m", "8x", 1.9e9),
    ("paper_435m", "7t1i", 1.9e9),
    ("paper_1b4", "dense", 1.48e9),
    ("paper_1b4", "8x", 7.1e9),
    ("paper_1b4", "4t4i", 7.1e9),
]


@pytest.mark.parametrize(("name", "ffn", "parameters"), TABLE_1)
def test_paper_recipes_have_the_parameters_of_table_1(name, ffn, parameters):
    figures = cost(recipes.recipe(CONFIGS / f"{name}.py", {"model.ffn": ffn}))
    assert figures["parameters"]["total"] == pytest.approx(parameters, rel=0.025)


@pytest.mark.parametrize("name", ["paper_90m", "paper_435m", "paper_1b4"])
def test_variants_of_a_paper_recipe_cost_the_same_per_token(name):
    flops = [flops_per_token(recipes.recipe(CONFIGS / f"{name}.py", {"model.ffn": f})) for f in ("dense", "8x", "4t4i")]
    assert max(flops) / min(flops) < 1.002  # routers are what differs


def test_paper_recipes_have_the_batches_of_table_5():
    for name, tokens, steps in (("90m", 6_291_456, 160_000), ("435m", 6_291_456, 160_000), ("1b4", 8_388_608, 120_000)):
        config = recipes.recipe(CONFIGS / f"paper_{name}.py")
        assert (config.batch_tokens, config.data.sequence, total_steps(config)) == (tokens, 4096, steps)
        assert (config.optimizer.peak_lr, config.optimizer.end_lr, config.optimizer.warmup_steps) == (1e-4, 1e-6, 4000)
        assert config.vocabulary_size == 65_536


def test_paper_recipes_fit_routers_by_table_6():
    for name, steps, warmup in (("90m", 5000, 1000), ("435m", 5000, 1000), ("1b4", 10_000, 2000)):
        config = recipes.recipe(CONFIGS / f"paper_{name}.py")
        routers = config.routers
        groups = routers.batch_rows // config.data.group_rows
        assert routers.batch_rows * config.data.sequence == pytest.approx(4_194_304, rel=0.125)
        assert groups % 64 == 0, "a pod can share it"
        assert (routers.peak_lr, routers.end_lr, routers.schedule) == (1e-4, 1e-6, "linear")
        assert (routers.steps, routers.warmup_steps) == (steps, warmup)


# Against the model ----------------------------------------------------------------------------------------------------

VARIANTS = ["dense", "8x", "1t1i", "4t4i", "7t1i", "2t2i+1x", "4t4i+2x", "4t4i+1t2i", "dense+1x", "dense+1t1i"]


@pytest.mark.parametrize(
    ("ffn", "weights"), [*((ffn, "shared") for ffn in VARIANTS), ("dense", "by_modality"), ("2t2i+1x", "by_modality")]
)
def test_parameters_are_those_of_the_initialised_model(ffn, weights):
    config = tiny(ffn, attention_weights=weights)
    state = step_lib.abstract_state(program_of(config), {})
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.params))
    figures = cost(config)
    assert figures["parameters"]["active"] == cost(tiny(ffn))["parameters"]["active"]
    assert figures["parameters"]["total"] == count and figures["parameters"]["auxiliary"] == 0
    moments = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim)
    assert figures["bytes"] == {**figures["bytes"], "parameters": 4 * count, "optimizer": 4 * moments}


@pytest.mark.parametrize(("norm", "tied"), [("layer", False), ("rms", True), ("none", False)])
@pytest.mark.parametrize("weights", ["shared", "by_modality"])
def test_parameters_of_other_backbones(weights, norm, tied):
    """Heads that share keys, their norms, one table for both embeddings."""
    heads = {"heads": 6, "kv_heads": 3, "head_width": 10}
    config = tiny("2t2i", attention_weights=weights, qk_norm=norm, tied_embeddings=tied, **heads)
    leaves = jax.tree.leaves(step_lib.abstract_state(program_of(config), {}).params)
    assert cost(config)["parameters"]["total"] == sum(math.prod(leaf.shape) for leaf in leaves)


@pytest.mark.parametrize("ffn", long_but("1t1i", "2t2i+1x", of=["dense", "8x", "1t1i", "7t1i", "2t2i+1x"]))
def test_auxiliary_routers_are_counted_apart(ffn):
    plain, config = cost(tiny(ffn)), tiny(ffn, router=Choice(auxiliary=True))
    figures = cost(config)
    state = step_lib.abstract_state(program_of(config), {})
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.params))
    parameters = figures["parameters"]
    assert parameters["total"] + parameters["auxiliary"] == count
    assert {**parameters, "auxiliary": 0} == plain["parameters"]
    assert (parameters["auxiliary"] > 0) == (ffn in ("8x", "7t1i", "2t2i+1x"))
    moments = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim)
    assert (figures["bytes"]["parameters"], figures["bytes"]["optimizer"]) == (4 * count, 4 * moments)
    flops, without = figures["flops_per_token"], plain["flops_per_token"]
    assert {**flops, "executed": 0} == {**without, "executed": 0}
    counted = product_flops(step_jaxpr(config)) / config.batch_tokens
    assert flops["executed"] == pytest.approx(counted, rel=1e-3)


@pytest.mark.parametrize("ffn", ["1t1i", "4t4i"])
def test_executed_flops_count_the_slack_of_threshold_routing(ffn):
    config = tiny(ffn, router=Threshold(slack=1.5))
    flops, without = (cost(c)["flops_per_token"] for c in (config, tiny(ffn)))
    counted = product_flops(step_jaxpr(config)) / config.batch_tokens
    assert flops["executed"] == pytest.approx(counted, rel=1e-3) and flops["train"] == without["train"]
    assert (flops["executed"] > 1.1 * without["executed"]) == (ffn == "4t4i")


@pytest.mark.parametrize("name", long_but("null", "deepseek", "hash", of=[*RIVALS]))
def test_flops_of_rules_whose_tokens_choose(name):
    for slack in (1.0, 1.5):
        config = tiny("4t4i", router=dataclasses.replace(RIVALS[name], slack=slack))
        counted = product_flops(step_jaxpr(config)) / config.batch_tokens
        flops = cost(config)["flops_per_token"]
        assert flops["executed"] == pytest.approx(counted, rel=1e-3)
        assert slack > 1 or flops["train"] == pytest.approx(counted, rel=0.02)
    state = step_lib.abstract_state(program_of(config), first_routing_state(config))
    assert cost(config)["parameters"]["total"] == sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.params))


SHAPES = {
    "square": {},
    "wide": {"width": 64, "layers": 3, "sequence": 32, "norm": "pre"},
    "accumulated": {"width": 48, "heads": 6, "sequence": 128, "group_rows": 1, "accumulate": 2},
    "uneven": {"ffn_width": 256, "quotas": (0.75, 0.25)},
    "own": {"attention_weights": "by_modality"},
    "heads": {"heads": 4, "kv_heads": 2, "head_width": 24, "qk_norm": "rms", "tied_embeddings": True},
}
# Every shape twice, every layer in one of the shapes that are special.
PAIRS = [
    ("dense", "square"), ("dense", "uneven"), ("8x", "wide"), ("8x", "accumulated"), ("1t1i", "wide"),
    ("4t4i", "square"), ("4t4i", "accumulated"), ("2t2i+1x", "uneven"), ("1t1i", "own"), ("4t4i", "heads"),
]  # fmt: skip


@pytest.mark.parametrize(("ffn", "shape"), PAIRS)
def test_flops_are_those_of_the_steps_jaxpr(ffn, shape):
    config = tiny(ffn, **SHAPES[shape])
    counted = product_flops(step_jaxpr(config)) / config.batch_tokens
    flops = cost(config)["flops_per_token"]
    assert flops["executed"] == pytest.approx(counted, rel=1e-3)
    assert flops["train"] == pytest.approx(counted, rel=0.02)


@pytest.mark.parametrize(
    "ffn", long_but("8x", "4t4i+1x", "4t4i+1t1i", of=["8x", "1t1i", "4t4i", "4t4i+1x", "4t4i+1t1i"])
)
def test_executed_flops_count_the_slots_of_generous_quotas(ffn):
    config = tiny(ffn, quotas=(0.75, 0.5), capacity=0.3)
    flops = cost(config)["flops_per_token"]
    assert flops["executed"] == pytest.approx(product_flops(step_jaxpr(config)) / config.batch_tokens, rel=1e-3)
    assert ffn == "8x" or flops["executed"] > 1.03 * flops["train"]


def test_executed_flops_count_the_slots_of_projections():
    config = tiny("1t1i", quotas=(0.75, 0.5), attention_weights="by_modality")
    flops, shared = (cost(c)["flops_per_token"] for c in (config, tiny("1t1i", quotas=(0.75, 0.5))))
    assert flops["executed"] == pytest.approx(product_flops(step_jaxpr(config)) / config.batch_tokens, rel=1e-3)
    assert flops["train"] == shared["train"] and flops["executed"] > 1.01 * shared["executed"]


def test_remat_costs_a_forward_pass_of_the_layers():
    plain, again = tiny("4t4i"), tiny("4t4i", remat="full")
    assert cost(again)["flops_per_token"] == cost(plain)["flops_per_token"]
    extra = (product_flops(step_jaxpr(again)) - product_flops(step_jaxpr(plain))) / plain.batch_tokens
    parts = cost(plain)["flops_per_token"]["by_part"]
    assert 0 < extra <= 1.01 * (sum(parts.values()) - parts["unembedding"])


def test_the_walker_multiplies_loops_and_takes_the_dearest_branch():
    def looped(x):
        def body(x, _):
            return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x), None

        return jax.checkpoint(lambda x: jax.lax.scan(body, x, None, length=5)[0])(x)

    assert product_flops(jax.make_jaxpr(jax.jit(looped))(jnp.ones((4, 4))).jaxpr) == 5 * 2 * 2 * 4**3


# The convention -------------------------------------------------------------------------------------------------------


def test_the_figures_add_up():
    config = tiny("4t4i+1x")
    figures = cost(config)
    flops, parameters = figures["flops_per_token"], figures["parameters"]
    assert sum(flops["by_part"].values()) == pytest.approx(flops["forward"])
    assert flops["train"] == 3 * flops["forward"] == flops_per_token(config)
    assert parameters["active"] == parameters["active_non_embedding"] + parameters["embedding"] < parameters["total"]
    assert figures["run"]["flops"] == pytest.approx(flops["train"] * 10 * config.batch_tokens)
    padded = cost(config, padding=0.2)["flops_per_token"]
    assert padded["executed"] == pytest.approx(flops["executed"] / 0.8) and padded["train"] == flops["train"]


def test_dense_forward_is_the_textbook_formula():
    figures = cost(tiny("dense"))
    d, hidden, layers, vocabulary, sequence = 32, 128, 2, 160, 64
    textbook = 2 * (layers * (4 * d * d + 3 * d * hidden) + d * vocabulary) + layers * 4 * sequence * d
    assert figures["flops_per_token"]["forward"] == textbook


def test_length_is_rounded_up_to_whole_updates():
    config = tiny("4t4i")

    def steps(**length):
        train = dataclasses.replace(config.train, steps=None, **length)
        return total_steps(dataclasses.replace(config, train=train))

    assert steps(tokens=config.batch_tokens * 7.0) == 7
    assert steps(tokens=config.batch_tokens * 7.0 + 1) == 8
    assert steps(flops=flops_per_token(config) * config.batch_tokens * 6.5) == 7


def test_remat_keeps_less():
    kept = [cost(tiny("4t4i", layers=8, remat=remat))["bytes"]["activations"] for remat in ("full", "dots", "none")]
    assert kept == sorted(kept) and kept[0] < kept[2] / 2


def test_peaks_are_known_by_device_kind():
    assert peak_flops("TPU v4") == 275e12
    assert peak_flops("TPU v5 lite") == peak_flops("TPU v5e") == 197e12
    assert peak_flops("TPU v5") == peak_flops("TPU v5p") == 459e12
    assert peak_flops("TPU v6 lite") == 918e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("NVIDIA H100 80GB HBM3") == peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("cpu") is None and peak_flops("Tesla T4") is None


def test_the_table_shows_every_part():
    text = format_cost(cost(tiny("4t4i")))
    assert all(word in text for word in ("total", "active", "experts", "attention scores", "activations", "steps"))


# Memory ---------------------------------------------------------------------------------------------------------------

ONE_STEP = """
import resource, sys
from moma_jax import recipes, sharding, vocab
from moma_jax.bench.step import synthetic_batch
from moma_jax.training import step
one_row = {"data.kind": "synthetic", "data.group_rows": 1, "train.batch_rows": 1}
config = step.with_dtype(recipes.recipe(sys.argv[1], one_row))
program = step.make_program(config)
with sharding.use_mesh(program.mesh):
    state = step.create_state(program, {})
    batch = step.put(synthetic_batch(config), program.mesh)
    state, report = step.compile_step(program, state)(state, batch)
    assert bool(report.finite)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.long
def test_a_step_of_paper_90m_on_one_row_fits_8_gib_on_a_cpu():
    command = [sys.executable, "-c", ONE_STEP, str(CONFIGS / "paper_90m.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    peak = int(done.stdout.split()[-1])
    print(f"peak {peak / 2**30:.2f} GiB")
    assert peak < 8 * 2**30
