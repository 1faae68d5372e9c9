"""What wrong selections cost a mixture of depths (paper section 2.4): held-out loss as errors are injected.

    python docs/results/depth_errors.py RUN [--rates 0 0.001 0.005 0.01 0.02 0.05] [--noises 0.2 0.5] [--json OUT]

A layer's true selection is that of training, which sees the whole row. With a rate of r, each decision of each token at
each layer is turned over with probability r: a token that should enter passes by, or the reverse. Experts choose as in
training, so nothing else differs. With a noise of s, logits have normal noise of s of their deviations before they are
ranked: as many tokens enter as should, but others. (A threshold is the opposite: within a row its ranks are right, its
count is not.) Beside it: the loss under the causal routings that the run has, and how many of their
decisions differ from the true ones.
"""

import argparse
import dataclasses
import json
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from moma_jax import load, sharding
from moma_jax.errors import InputError
from moma_jax.evaluation.evaluate import held_out
from moma_jax.model.auxiliary import taken_pairs
from moma_jax.model.decoder import Decoder
from moma_jax.router import Routed, take_entering
from moma_jax.routers.choice import Choice, best_of
from moma_jax.rules import options_of
from moma_jax.training import objective
from moma_jax.training.step import put, replicate, run_decoder

WRONG, ALL = "wrong", "all"


@dataclass(frozen=True)
class Judged(Choice):
    """The rule of who enters a layer, whose decisions are held against the true ones.

    Attributes: routing: a causal one; None: the true selection. rate: share of its decisions that are turned over.
      noise: of ranks, in deviations of the logits.
    """

    routing: str | None = None
    rate: float = 0.0
    noise: float = 0.0
    exact: ClassVar[bool] = False

    def select(self, score, eligible_T, quota, state, key):
        true_TE = taken_pairs(best_of(score, eligible_T, quota), len(eligible_T))
        mine_TE, gate_TE = true_TE, jax.nn.sigmoid(score.logit_TE)
        if self.routing is not None:
            mine_TE, gate_TE = self.decide(score, state, self.routing)
            mine_TE &= eligible_T[:, None]
        elif self.noise:
            spread = jnp.std(score.plain_TE, where=eligible_T[:, None])
            noisy_TE = score.rank_TE + self.noise * spread * jax.random.normal(key, score.rank_TE.shape)
            mine_TE = taken_pairs(best_of(score._replace(rank_TE=noisy_TE), eligible_T, quota), len(eligible_T))
        mine_TE ^= jax.random.bernoulli(key, self.rate, mine_TE.shape) & eligible_T[:, None]
        said = {WRONG: jnp.sum(mine_TE != true_TE) * 1.0, ALL: jnp.sum(eligible_T) * 1.0}
        return Routed(take_entering(mine_TE, gate_TE, score.order_T, len(eligible_T)), state, said)

    def slots(self, quota, tokens):
        return tokens


@dataclass(frozen=True)
class Experts(Choice):
    """The rule of experts. Attributes: routing: a causal one; None: expert choice. depth: who enters layers."""

    routing: str | None = None
    depth: Judged = Judged()
    exact: ClassVar[bool] = False

    def select(self, score, eligible_T, quota, state, key):
        if self.routing is None:
            return super().select(score, eligible_T, quota, state, key)
        enters_TE, gate_TE = self.decide(score, state, self.routing)
        enters_TE &= eligible_T[:, None]
        return Routed(take_entering(enters_TE, gate_TE, score.order_T, len(eligible_T)), state)

    def slots(self, quota, tokens):
        return quota.slots if self.routing is None else tokens

    def for_depth(self):
        return self.depth


def held_out_loss(model, decoder, eval_set):
    """{"loss", "loss_<modality>", "wrong"}: nats per token, and the share of decisions that are not the true ones."""
    program = model.program._replace(decoder=decoder)
    names = [m.name for m in model.config.data.modalities]

    @jax.jit
    def judge(params, state, batch, first_group):
        groups = first_group + jnp.arange(batch.token_BS.shape[0] // model.config.data.group_rows)
        output = run_decoder(program, params, batch, jnp.int32(0), groups, state, False)
        targets = (batch.target_BS, batch.weight_BS, batch.target_modality_BS)
        kernel_DV, chunk = params["unembedding"]["kernel_DV"], model.config.train.loss_chunk
        sums = objective.cross_entropy(output.hidden_BSD, kernel_DV, *targets, kinds=len(names), chunk=chunk)[1]
        return sums, output.losses[WRONG] * len(batch.token_BS), output.losses[ALL] * len(batch.token_BS)

    reports, group = [], 0
    with sharding.use_mesh(program.mesh):
        for packed in held_out(model.config, eval_set, sharding.shards(program.mesh)):
            batch, number = packed.batch, replicate(group, program.mesh)
            reports.append(judge(model.params, model.routing_state, put(batch, program.mesh, whole=True), number))
            group += len(batch.token_BS) // model.config.data.group_rows
    sums, wrong, decisions = jax.tree.map(lambda *x: np.sum(np.asarray(x, np.float64), axis=0), *reports)
    nats_M, weight_M = sums.cross_entropy_J, sums.weight_J
    losses = {f"loss_{n}": float(a / w) for n, a, w in zip(names, nats_M, weight_M, strict=True)}
    return {"loss": float(nats_M.sum() / weight_M.sum()), **losses, "wrong": float(wrong / decisions)}


def main():
    """Prints a table; with --json writes it."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("run")
    options.add_argument("--rates", nargs="+", type=float, default=[0.0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05])
    options.add_argument("--noises", nargs="+", type=float, default=[0.2, 0.5])
    options.add_argument("--json")
    given = options.parse_args()
    model = load(given.run)
    config = model.config
    if not config.depth:
        raise InputError(f"{given.run}: its model has no mixture of depths; give a run of mod+...")
    everyone = (config.group_tokens,) * len(config.data.modalities)

    options = options_of(config.model.router.for_evaluation())

    def decoder(experts=None, depth=None, **wrong):
        rule = Experts(**options, routing=experts, depth=Judged(**options, routing=depth, **wrong))
        own = dataclasses.replace(config.model, router=rule)
        return Decoder(own, config.data.modalities, everyone, config.data.group_rows)

    rows = {f"{rate:.1%} turned over": decoder(rate=rate) for rate in given.rates}
    rows |= {f"ranks with noise of {noise:g}": decoder(noise=noise) for noise in given.noises}
    for name in [name for name in model.routings if name != config.model.router.training_name]:
        rows[f"{name}, depth alone"] = decoder(None, name)
        rows[f"{name}, experts too"] = decoder(name, name)
    table, names = {}, ["loss", *(f"loss_{m.name}" for m in config.data.modalities), "wrong"]
    print(f"| decisions | {' | '.join(names)} | above the first row |\n|{'---|' * (len(names) + 2)}")
    for name, own in rows.items():
        table[name] = figures = held_out_loss(model, own, config.train.eval_sets[0])
        first = next(iter(table.values()))["loss"]
        values = [f"{figures[n]:.2%}" if n == "wrong" else f"{figures[n]:.4f}" for n in names]
        print(f"| {name} | {' | '.join(values)} | {figures['loss'] / first - 1:+.2%} |", flush=True)
    if given.json:
        with open(given.json, "w") as file:
            json.dump(table, file, indent=1)


if __name__ == "__main__":
    main()
