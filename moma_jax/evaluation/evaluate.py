"""Held-out losses of a run under several routings, beside those of a unigram model.

The routing of training ("choice") sees the future (paper section 2.4): its loss is comparable between runs, but it is
no likelihood. Under the causal routings the loss is one, and exact: every token finds a slot wherever it goes, however
the documents mix modalities. Its exponential is the perplexity. All routings are asked about the same packed rows.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moma_jax import hosts, sharding
from moma_jax.batch import Batch, Packed
from moma_jax.config import Config, EvalSet, HostsConfig, MeshConfig
from moma_jax.cost import total_steps
from moma_jax.data.stream import open_stream, vocabulary_of
from moma_jax.errors import InputError, RunError
from moma_jax.evaluation.conditions import Kinds
from moma_jax.evaluation.documents import DocumentLosses, to_bytes
from moma_jax.evaluation.telemetry import Telemetry
from moma_jax.ffn import SHARED
from moma_jax.geometry import rule_of
from moma_jax.model.decoder import causal_decoder, evaluation_decoder
from moma_jax.model.depth import SELECTED
from moma_jax.model.parameters import unembedding_of
from moma_jax.storage.directory import Directory
from moma_jax.training import objective
from moma_jax.training.load import load
from moma_jax.training.step import Program, put, replicate, run_decoder
from moma_jax.vocab import Vocabulary

UNIGRAM_POSITIONS = 1_000_000
"""Training positions that the unigram model is counted on, at most."""

Figures = dict[str, float | int | None]
"""Of one routing on one held-out set: `Kinds.figures`, `perplexity...` where the routing is causal, and the cost:
`experts_per_token`, routed experts that a token enters, a mean over layers (shared ones apart), each group's part of
it, `experts_per_token_<group>` (with mixture of depths in even and in odd layers), `routing_<metric>`, what the routing
rule records of itself in training, and `seconds` of computation (compiling apart)."""


def evaluate(
    run: str | Config,
    *,
    routing: tuple[str, ...] = (),
    router: Any = None,
    step: int | None = None,
    eval_set: str | None = None,
    mesh: MeshConfig | None = None,
    documents: str | None = None,
) -> dict[str, Any]:
    """Held-out losses of a run's checkpoint.

    Args:
      run: run directory, or a config whose `run.dir` is one.
      routing: routings to evaluate under, of "choice" (as in training), "causal" and "threshold"; (): all that it has.
      router: the run's own routing rule, where it was trained with one (`moma_jax.load`).
      step: which checkpoint; None: the newest.
      eval_set: name of one of the run's evaluation sets; None: the first.
      mesh: devices to lay the parameters on; None: whole on every device.
      documents: file to write losses by document to (`evaluation.documents`), Parquet.

    Returns:
      {routing: Figures, ..., "gap_percent": {causal routing: `gap_percent`'s}, "unigram": losses and tokens alone}. A
      loss of what the held-out rows have no targets of is None.

    Raises:
      InputError: no such run, checkpoint, routing or evaluation set; the run lacks what a routing needs; or the store's
        vocabulary is not the run's.
    """
    hosts.join(HostsConfig())
    loaded = load(run.run.dir if isinstance(run, Config) else run, step=step, router=router, mesh=mesh)
    decoders = {name: loaded.under(name) for name in routing or loaded.routings}
    if loaded.refused is not None and hosts.is_first():
        print(f"note: {loaded.refused}", file=sys.stderr)
    chosen = _named(loaded.config, eval_set)
    if vocabulary_of(loaded.config).hash != loaded.vocabulary.hash:
        raise InputError(f"{run}: its stores have another vocabulary now; restore the stores it was trained on")
    with sharding.use_mesh(loaded.program.mesh):
        evaluator = Evaluator(loaded.program, loaded.vocabulary, decoders)
        results = evaluator(loaded.params, loaded.routing_state, chosen)
    if documents is not None and hosts.is_first():
        where, _, name = documents.rpartition("/")
        Directory(where or ".").write(name, evaluator.documents())
    baseline = unigram(loaded.config, loaded.vocabulary, chosen)
    training = loaded.config.model.router.training_name
    return results | {"gap_percent": gap_percent(results, training), "unigram": baseline}


def _named(config: Config, name: str | None) -> EvalSet:
    sets = {s.name: s for s in config.train.eval_sets}
    if not sets:
        raise InputError("train.eval_sets: the run has none; name at least one")
    if name is None:
        return config.train.eval_sets[0]
    if name not in sets:
        raise InputError(f"eval_set: {name!r} is not one of {', '.join(sets)}")
    return sets[name]


def scheduled(program: Program, routing_state: Any) -> dict[str, Any]:
    """Decoders, by routing, that a run in training is evaluated under: `train.eval_routings`.

    Where that names none they are: the routing of training, and, if the model has routers, the causal ones of its rule
    that it is being trained for (auxiliary routers alone where they train beside it).

    Raises:
      InputError: a routing is named that the run has not.
    """
    config, rule = program.config, program.config.model.router
    rules = [(group, rule_of(config.model, group)) for group in config.routed]
    # None: still to be trained.
    states = [None if jax.tree.leaves(routing_state.get(group.name)) else {} for group, _ in rules]

    def lacks(name: str) -> str | None:
        asked = zip(rules, states, strict=True) if name != rule.training_name else ()
        return next((reason for (_, own), state in asked if (reason := own.lacks(name, state)) is not None), None)

    for name in config.train.eval_routings:
        if (reason := lacks(name)) is not None:
            raise InputError(f"train.eval_routings: {name} cannot be, as the run has {reason}; leave it out")
    # Without routers all are the same, so one is enough.
    every = tuple(name for name in (rule.training_name, *(rule.causal if rules else ())) if lacks(name) is None)
    names = config.train.eval_routings or every
    training = evaluation_decoder(program.decoder)
    return {name: training if name == rule.training_name else causal_decoder(config, name) for name in names}


# Under several routings -----------------------------------------------------------------------------------------------


class EvalReport(NamedTuple):
    """What a batch says.

    Attributes:
      nats_BS: float32, cross-entropy of every target times its weight.
      entered: int32 (token, layer, expert) triples of tokens and the routed experts that they entered.
      by_group: the same of each group of experts that has a router; with mixture of depths of tokens that entered the
        layers 0, 2, 4, ..., by modality.
      groups: int32 routing groups that have tokens. metrics: what the routing rule only records, summed over them.
      selections: as of `DecoderOutput`; {} where they were not asked for.
    """

    nats_BS: Any
    entered: Any
    by_group: dict[str, Any]
    groups: Any
    metrics: dict[str, Any]
    selections: dict[str, Any]


def make_eval_step(program: Program, selections: bool = False) -> Callable:
    """Jitted (params, routing_state, batch, first_group) -> EvalReport, without noise, whole on every device.

    The routing is that of `program.decoder`. `first_group` is the global index of the batch's first routing group, so
    that how rows are split into batches changes nothing. `selections`: report them, too.
    """
    config = program.config

    def eval_step(params, routing_state, batch: Batch, first_group) -> EvalReport:
        group_G = first_group + jnp.arange(batch.token_BS.shape[0] // config.data.group_rows)
        step = jnp.int32(0)
        output = run_decoder(program, params, batch, step, group_G, routing_state, False, return_selections=True)
        targets = (unembedding_of(params), batch.target_BS, batch.weight_BS)
        nats_BS = objective.token_nats(output.hidden_BSD, *targets, chunk=config.train.loss_chunk)
        kept = output.selections if selections else {}
        groups = jnp.sum(jnp.any(batch.segment_BS.reshape(len(group_G), -1) > 0, axis=1), dtype=jnp.int32)
        metrics = {name: value * groups for name, value in output.metrics.items()}
        return EvalReport(nats_BS, *_entered(config, output.selections, batch), groups, metrics, kept)

    return jax.jit(eval_step, out_shardings=sharding.replicated(program.mesh))


def _entered(config: Config, selections, batch: Batch):
    """`EvalReport.entered` and `by_group`; a dense layer is one expert for all tokens that enter the layer."""
    routed = {name: own for name, own in selections.items() if not name.rpartition("/")[2].startswith(SHARED)}
    of_depth = {} if SELECTED not in routed else _entered_layers(config, routed.pop(SELECTED), batch)
    filled = {name: jnp.sum(chosen.filled_EC, dtype=jnp.int32) for name, chosen in routed.items()}
    if config.experts.dense:
        layers = config.model.layers // 2 if config.depth else config.model.layers
        return layers * jnp.sum(batch.segment_BS > 0, dtype=jnp.int32) + sum(of_depth.values()), of_depth
    names = {group.name for group in config.routed}
    by_group = {name.replace("/", "_"): n for name, n in filled.items() if name.rpartition("/")[2] in names}
    return sum(filled.values()), by_group | of_depth


def _entered_layers(config: Config, chosen: Any, batch: Batch) -> dict[str, Any]:
    """(token, layer) pairs of the layers that some tokens alone enter, by modality; `chosen` of each layer, by row."""
    row_B1 = jnp.arange(len(batch.modality_BS))[:, None]
    modality_PBC = batch.modality_BS[row_B1, chosen.index_EC[:, :, 0]]
    filled_PBC = chosen.filled_EC[:, :, 0]
    return {
        f"{SELECTED}_{modality.name}": jnp.sum(filled_PBC & (modality_PBC == m), dtype=jnp.int32)
        for m, modality in enumerate(config.data.modalities)
    }


class Evaluator:
    """Evaluates parameters on held-out sets under given routings; compiles once for each and for each batch size."""

    def __init__(self, program: Program, vocabulary: Vocabulary, decoders: dict[str, Any], telemetry: bool = False):
        """Args: `decoders` by routing, as `scheduled` or `Loaded.under` gives them. `telemetry` counts experts, too."""
        self._program, self._kinds = program, Kinds(vocabulary)
        telemetry = telemetry and bool(program.config.routed)
        self._telemetry = defaultdict(lambda: Telemetry(program.config, vocabulary)) if telemetry else None
        self._telemetry_files: dict[str, dict[str, bytes]] = {}
        self._steps = {n: make_eval_step(program._replace(decoder=d), telemetry) for n, d in decoders.items()}
        self._compiled: dict[tuple, Callable] = {}
        self._documents: dict[str, Any] = {}

    def __call__(self, params, routing_state, eval_set: EvalSet) -> dict[str, Figures]:
        """Figures of one held-out set by routing; call it under `sharding.use_mesh`."""
        program, number = self._program, self._kinds.number
        sums_J = {name: np.zeros(number) for name in self._steps}
        weight_J, by_document = np.zeros(number), DocumentLosses(tuple(m.name for m in program.config.data.modalities))
        entered, seconds = {name: [] for name in self._steps}, dict.fromkeys(self._steps, 0.0)
        group, tokens = 0, 0
        telemetry = None if self._telemetry is None else self._telemetry[eval_set.name]
        for packed in held_out(program.config, eval_set, sharding.shards(program.mesh)):
            batch, kind_N = packed.batch, self._kinds.of(packed.batch).reshape(-1)
            arguments = (params, routing_state, put(batch, program.mesh, whole=True), replicate(group, program.mesh))
            nats_BS, selections = {}, {}
            for name in self._steps:
                compiled = self._compile(name, arguments)
                started = time.perf_counter()
                report = compiled(*arguments)
                nats_BS[name], *counts = jax.device_get(report[:5])
                seconds[name] += time.perf_counter() - started
                if telemetry is not None and telemetry.wants and hosts.is_first():
                    selections[name] = jax.device_get(report.selections)
                entered[name].append(counts)
                sums_J[name] += np.bincount(kind_N, np.float64(nats_BS[name].reshape(-1)), number)
            weight_J += np.bincount(kind_N, batch.weight_BS.reshape(-1), number)
            by_document.add(packed, nats_BS)
            if selections:
                telemetry.add(batch, selections)
            group += batch.token_BS.shape[0] // program.config.data.group_rows
            tokens += int(np.sum(batch.segment_BS > 0))
        self._documents[eval_set.name] = by_document.table(eval_set.name)
        if telemetry is not None and hosts.is_first():
            self._telemetry_files[eval_set.name] = telemetry.files(jax.device_get(routing_state))
        return {
            name: self._figures(name, self._kinds.figures(sums_J[name], weight_J), entered[name], tokens)
            | {"seconds": seconds[name]}
            for name in self._steps
        }

    @property
    def evaluated(self) -> bool:
        """Whether any set was."""
        return bool(self._documents)

    def telemetry(self, eval_set: str) -> dict[str, bytes]:
        """What experts did in a set's latest evaluation, `Telemetry.files`; {} where nothing was counted."""
        return self._telemetry_files.get(eval_set, {})

    def documents(self) -> bytes:
        """Losses by document of the sets that were evaluated, each by its latest evaluation: a Parquet file."""
        return to_bytes(list(self._documents.values()))

    def _compile(self, name: str, arguments: tuple) -> Callable:
        key = (name, arguments[2].token_BS.shape)
        if key not in self._compiled:
            self._compiled[key] = self._steps[name].lower(*arguments).compile()
            hosts.meet()
        return self._compiled[key]

    def _figures(self, name: str, figures: Figures, entered: list, tokens: int) -> Figures:
        config = self._program.config
        # Expert choice is no causal routing, so it has no perplexity; but where no expert has to choose it is the
        # same as the causal ones.
        if name != config.model.router.training_name or not config.routed:
            figures |= _perplexities(figures)
        total, by_group, groups, metrics = jax.tree.map(lambda *x: np.sum(np.asarray(x, np.float64)), *entered)
        counts = {"": total, **{f"_{group}": number for group, number in by_group.items()}}
        places = tokens * config.model.layers
        figures |= {f"experts_per_token{group}": float(number / places) for group, number in counts.items()}
        return figures | {f"routing_{metric}": float(value / groups) for metric, value in metrics.items()}


def _perplexities(figures: Figures) -> Figures:
    losses = {name: value for name, value in figures.items() if name.startswith("loss")}
    with np.errstate(over="ignore"):  # no number then
        return {
            name.replace("loss", "perplexity", 1): None if loss is None else float(np.exp(loss))
            for name, loss in losses.items()
        }


def gap_percent(results: dict[str, Figures], training: str = "choice") -> dict[str, dict[str, float | None]]:
    """By how many percent losses under causal routings lie above those of training: {routing: {"loss", ...}}.

    Args:
      results: Figures by routing; {} without that of training, called `training`, among them.
    """
    reference = results.get(training)
    if reference is None:
        return {}
    names = [name for name in reference if name.startswith("loss")]
    causal = {routing: figures for routing, figures in results.items() if routing != training}
    return {routing: {n: _above(figures[n], reference[n]) for n in names} for routing, figures in causal.items()}


def _above(loss: float | None, reference: float | None) -> float | None:
    return 100.0 * (loss / reference - 1.0) if loss is not None and reference else None


# Held-out rows --------------------------------------------------------------------------------------------------------


def held_out(config: Config, eval_set: EvalSet, devices: int = 1) -> Iterator[Packed]:
    """Batches of a held-out set, in its own order; whole routing groups, padding beyond `eval_set.rows` rows.

    Raises:
      RunError: the held-out split is empty.
    """
    unit = devices * config.data.group_rows
    micro_rows = config.train.batch_rows // config.train.accumulate
    rows = max(min(micro_rows, -(-eval_set.rows // unit) * unit), unit)
    left = eval_set.rows
    stores = eval_set.stores or None
    stream = open_stream(config, split=eval_set.split, seed=eval_set.seed, stores=stores, rows=rows, epochs=1)
    with contextlib.closing(stream):
        for packed in stream:
            weight_BS, segment_BS = (np.array(x) for x in (packed.batch.weight_BS, packed.batch.segment_BS))
            weight_BS[left:], segment_BS[left:] = 0, 0
            batch = packed.batch._replace(weight_BS=weight_BS, segment_BS=segment_BS)
            yield dataclasses.replace(packed, batch=batch)
            left -= rows
            if left <= 0:
                return
    if left == eval_set.rows:
        raise RunError(f"evaluation set {eval_set.name}: its stores hold no held-out documents; prepare more of them")


def unigram(config: Config, vocabulary: Vocabulary, eval_set: EvalSet) -> Figures:
    """Losses on a held-out set of the token frequencies of the run's first training batches, add-one smoothed."""
    batches = min(total_steps(config), -(-UNIGRAM_POSITIONS // config.batch_tokens))
    count_V = np.ones(config.vocabulary_size, np.float64)
    with contextlib.closing(open_stream(config)) as stream:
        for _, packed in zip(range(batches), stream, strict=False):
            targets = packed.batch.target_BS[packed.batch.weight_BS > 0]
            count_V += np.bincount(targets, minlength=config.vocabulary_size)
    nats_V, kinds = np.log(count_V.sum()) - np.log(count_V), Kinds(vocabulary)
    nats_J, weight_J = np.zeros(kinds.number), np.zeros(kinds.number)
    for packed in held_out(config, eval_set):
        batch = packed.batch
        kind_N, weight_N = kinds.of(batch).reshape(-1), batch.weight_BS.reshape(-1).astype(np.float64)
        nats_N = nats_V[batch.target_BS.reshape(-1)]
        nats_J += np.bincount(kind_N, weight_N * nats_N, minlength=kinds.number)
        weight_J += np.bincount(kind_N, weight_N, minlength=kinds.number)
    return kinds.figures(nats_J, weight_J)
