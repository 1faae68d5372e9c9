"""What experts are counted to have done, against the Selections of a forward pass of its own, expert by expert."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
import pytest
from tiers import long_but
from tiny import tiny

from moma_jax import load, sharding, train
from moma_jax.batch import batch_of
from moma_jax.config import EvalSet
from moma_jax.evaluation import telemetry as telemetry_lib
from moma_jax.evaluation.evaluate import held_out
from moma_jax.evaluation.telemetry import COLUMNS, members, places
from moma_jax.model.depth import SELECTED
from moma_jax.routers.choice import thresholds
from moma_jax.training.step import put, run_decoder
from moma_jax.vocab import contiguous


def rows_of(path):
    table = pq.read_table(path)
    assert table.column_names == list(COLUMNS)
    return {(r["routing"], r["layer"], r["group"], r["expert"]): r for r in table.to_pylist()}


def by_hand(config, loaded, routing):
    """(layer, group, expert) -> list of (row of the set, position, gate), by loops over a batch's Selections."""
    program, found, tokens = loaded.program._replace(decoder=loaded.under(routing)), {}, 0
    (eval_set,) = config.train.eval_sets
    with sharding.use_mesh(program.mesh):
        for packed in held_out(config, eval_set):
            batch = put(packed.batch, program.mesh, whole=True)
            arguments = (batch, jnp.int32(0), jnp.int32(tokens) + jnp.arange(len(packed.batch.token_BS) // 2))
            state = loaded.routing_state
            output = run_decoder(program, loaded.params, *arguments, state, False, return_selections=True)
            chosen = jax.device_get(output.selections)
            entered = chosen.pop(SELECTED, None)
            for name, own in chosen.items():
                half, _, group = name.rpartition("/")
                for (number, g, e, c), filled in np.ndenumerate(own.filled_EC):
                    if not filled:
                        continue
                    index = own.index_EC[number, g, e, c]
                    layer = number if not half else 2 * number + (half == "odd")
                    length = entered.index_EC.shape[-1] if half == "even" else packed.batch.token_BS.shape[1]
                    row, place = g * config.data.group_rows + index // length, index % length
                    if half == "even":
                        place = entered.index_EC[number, row, 0, place]
                    taken = (batch_number := tokens, int(row), int(place))
                    found.setdefault((layer, group, e), {})[taken] = float(own.gate_EC[number, g, e, c])
                    assert batch_number == tokens
            tokens += 1
    return found


@pytest.mark.parametrize("ffn", long_but("2t2i+1x", "mod+2t2i", of=["2t2i", "4x", "mod+2t2i", "2t2i+1x"]))
def test_counts_are_those_of_a_forward_pass(tmp_path, ffn):
    config = tiny(tmp_path, model_ffn=ffn, train_steps=3, train_eval_sets=(EvalSet("heldout", rows=6),))
    train(config, quiet=True)
    found, loaded = rows_of(tmp_path / "routing" / "heldout-00000003.parquet"), load(str(tmp_path))
    batches = [packed.batch for packed in held_out(loaded.config, loaded.config.train.eval_sets[0])]
    for routing in ("choice", "threshold"):
        truth = by_hand(loaded.config, loaded, routing)
        groups = {group.name: group for group in loaded.config.experts.groups if group.routed}
        mine = {key[1:]: row for key, row in found.items() if key[0] == routing and not key[2].startswith("depth")}
        assert {key[:2] for key in mine} == {(layer, g) for layer in range(config.model.layers) for g in groups}
        for (layer, name, expert), row in mine.items():
            own = truth.get((layer, name, expert), {})
            ids = np.array([batches[b].token_BS[r, s] for b, r, s in own])
            assert row["taken"] == len(own) and (not own or row["gate_mean"] == pytest.approx(np.mean([*own.values()])))
            top = dict(zip(row["top_ids"], row["top_taken"], strict=True))
            assert top == {v: int((ids == v).sum()) for v in top}
            for other, share in enumerate(row["together"]):
                both = own.keys() & truth.get((layer, name, other), {}).keys()
                assert share is None if other == expert else share == pytest.approx(len(both) / max(len(own), 1))
            if row["place_taken"] is not None:
                place = [places(loaded.vocabulary, batches[b])[r, s] for b, r, s in own]
                assert np.array_equal(row["place_taken"], np.bincount([p for p in place if p >= 0], minlength=4)[:4])
            times = [sum(t in truth.get((layer, name, e), {}) for e in range(groups[name].experts)) for t in own]
            assert row["none"] + row["one"] + row["more"] == pytest.approx(1) and min(times, default=1) >= 1


@pytest.mark.parametrize("ffn", long_but("mod+4x", of=["2t2i", "mod+4x"]))
def test_a_row_is_told_token_by_token(tmp_path, ffn):
    config = tiny(tmp_path, model_ffn=ffn, train_steps=1)
    train(config, quiet=True)
    rows = pq.read_table(tmp_path / "routing" / "heldout-00000001.row.parquet").to_pylist()
    batch = next(held_out(config, config.train.eval_sets[0])).batch
    loaded = load(str(tmp_path))
    for routing in ("choice", "threshold"):
        own = [row for row in rows if row["routing"] == routing]
        assert [row["token"] for row in own] == batch.token_BS[0].tolist()
        assert [row["document"] for row in own] == batch.segment_BS[0].tolist()
        truth = np.zeros((config.data.sequence, config.model.layers), int)
        for (layer, _, expert), taken in by_hand(loaded.config, loaded, routing).items():
            for number, r, s in taken:
                truth[s, layer] += (number == r == 0) << expert
        assert [row["experts"] for row in own] == truth.tolist() and truth.any()


def test_depth_routers_are_groups_of_one(tmp_path):
    train(tiny(tmp_path, model_ffn="mod+2t2i", train_steps=2), quiet=True)
    found = rows_of(tmp_path / "routing" / "heldout-00000002.parquet")
    depth = {key: row for key, row in found.items() if key[2].startswith("depth")}
    assert {key[1:] for key in depth} == {(0, "depth_text", 0), (0, "depth_image", 0)}
    inside = found["choice", 0, "text", 0]["tokens"]
    assert found["choice", 0, "depth_text", 0]["taken"] == inside < found["choice", 1, "text", 0]["tokens"]
    assert all(row["threshold"] is not None for row in found.values())


def test_how_much_of_a_selection_stays_is_told_from_the_second_evaluation_on(tmp_path):
    """The same weights take the same tokens; others take others."""
    config = tiny(tmp_path, train_steps=4, train_eval_every=2, optimizer_peak_lr=3e-1, optimizer_warmup_steps=1)
    train(config, quiet=True)
    first, second = (rows_of(tmp_path / "routing" / f"heldout-0000000{n}.parquet") for n in (2, 4))
    assert all(row["kept"] is None for row in first.values())
    kept = [row["kept"] for key, row in second.items() if key[0] == "choice"]
    assert all(0 <= value <= 1 for value in kept) and 0 < np.mean(kept) < 1


def test_it_can_be_left_out_and_counts_no_more_than_it_must(tmp_path, monkeypatch):
    train(tiny(tmp_path / "off", train_steps=1, train_telemetry=False), quiet=True)
    train(tiny(tmp_path / "dense", train_steps=1, model_ffn="dense"), quiet=True)
    assert not (tmp_path / "off" / "routing").exists() and not (tmp_path / "dense" / "routing").exists()
    monkeypatch.setattr(telemetry_lib, "MOST_TOKENS", 1)
    config = tiny(tmp_path / "short", train_steps=1, train_batch_rows=4, train_eval_sets=(EvalSet("heldout", rows=12),))
    train(config, quiet=True)
    rows = rows_of(tmp_path / "short" / "routing" / "heldout-00000001.parquet").values()
    assert max(row["tokens"] for row in rows) <= config.data.group_rows * config.data.sequence, "one routing group"


@pytest.mark.parametrize("ffn", long_but("2t2i", of=["2t2i", "mod+2t2i"]))
def test_a_part_of_a_batch_is_counted_as_if_it_were_alone(tmp_path, monkeypatch, ffn):
    """Whole routing groups up to the bound, layers that some tokens enter included."""
    of_batches = {}
    for rows in (2, 8):
        config = tiny(tmp_path / str(rows), train_steps=1, train_batch_rows=8, model_ffn=ffn)
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, eval_sets=(EvalSet(rows=rows),)))
        monkeypatch.setattr(telemetry_lib, "MOST_TOKENS", 2 * config.data.sequence)
        train(config, quiet=True)
        of_batches[rows] = rows_of(tmp_path / str(rows) / "routing" / "heldout-00000001.parquet")
    assert of_batches[2].keys() == of_batches[8].keys()
    for key, row in of_batches[2].items():
        for name, value in row.items():  # gates are of programs of other shapes
            assert of_batches[8][key][name] == (pytest.approx(value) if isinstance(value, float) else value), name


def test_more_experts_than_bits_share_the_last_one():
    taken_LNE = np.zeros((1, 2, 70), bool)
    taken_LNE[0, 0, [0, 31, 61]] = taken_LNE[0, 1, [62, 63, 69]] = True
    bits_LN = telemetry_lib._bits(taken_LNE)
    assert bits_LN.dtype == np.int64 and bits_LN.tolist() == [[1 | 1 << 31 | 1 << 61, 1 << 62]]


def test_places_of_codes_in_pictures_that_are_whole_or_cut():
    """`begin c c c c end`; a row that begins inside a picture counts back from its end."""

    class Kind:
        def __init__(self, name, letter, size, span):
            self.name, self.letter, self.size, self.span = name, letter, size, span

    vocabulary = contiguous((Kind("text", "t", 10, 0), Kind("image", "i", 4, 4)))
    image = vocabulary.modalities[1]
    code, begin, end = int(image.code_ids[0]), image.begin, image.end
    token_BS = np.array([[0, begin, code, code, code, code, end, 7], [code, code, end, begin, code, code, code, 1],
                         [code, code, 7, 8, end, begin, code, code]])  # fmt: skip
    segment_BS = np.array([[1] * 8, [1, 1, 1, 2, 2, 2, 2, 0], [1, 1, 1, 2, 2, 3, 3, 3]])
    zero_BS = np.zeros_like(token_BS)
    batch = batch_of(token_BS, token_BS, segment_BS, zero_BS, zero_BS, vocabulary.modality_V)
    assert places(vocabulary, batch).tolist() == [
        [-1, -1, 0, 1, 2, 3, -1, -1],
        [2, 3, -1, -1, 0, 1, 2, -1],
        [-1, -1, -1, -1, -1, -1, 0, 1],
    ]


def test_rules_may_fill_slots_twice_and_leave_some_empty():
    config = tiny(model_ffn="2t2i")
    batch = batch_of(*(np.zeros((2, 4), np.int32) for _ in range(2)), np.ones((2, 4), np.int32), None, None,
                     np.zeros(64, np.int8))  # fmt: skip
    selection = telemetry_lib.Selection(
        np.array([[[[1, 1, 5], [0, 2, 7]]]] * config.model.layers, np.int32),
        np.full((config.model.layers, 1, 2, 3), 0.5, np.float32),
        np.array([[[[True, True, False], [True, True, True]]]] * config.model.layers),
    )
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, group_rows=2))
    found = {own.group: own for own in members(config, {"text": selection, "image": selection}, batch)}
    assert np.nonzero(found["text"].taken_LNE[0, :, 0])[0].tolist() == [1]
    assert np.nonzero(found["text"].taken_LNE[0, :, 1])[0].tolist() == [0, 2, 7]
    assert len(found["text"].at_K) == len(found["text"].gate_K) == 4 * config.model.layers


def test_thresholds_are_those_that_inference_applies(tmp_path):
    """Between calibrations they are not the state's own number."""
    config = tiny(tmp_path, train_steps=5, train_calibrate=0)
    train(config, quiet=True)
    found, state = rows_of(tmp_path / "routing" / "heldout-00000005.parquet"), load(str(tmp_path)).routing_state
    for name, own in state.items():
        used_LE = np.asarray(thresholds(jax.device_get(own)))
        assert not np.allclose(used_LE, own["threshold_E"])
        for (layer, expert), value in np.ndenumerate(used_LE):
            assert found["threshold", layer, name, expert]["threshold"] == pytest.approx(float(value))
