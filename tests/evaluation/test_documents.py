"""Losses by document: the parts whose sum is a held-out loss, and which document each is of."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from fake_views import MODALITIES, FakeStore, config, corpus
from tiny import tiny

from moma_jax import evaluate, train
from moma_jax.data import stream as stream_lib
from moma_jax.data.stream import open_stream
from moma_jax.evaluation.documents import DOCUMENTS, DocumentLosses, to_bytes


def test_a_run_and_a_command_write_parts_of_the_loss(tmp_path):
    config = tiny(tmp_path / "run", train_steps=2)
    figures = train(config, quiet=True)["eval"]["heldout"]
    evaluate(config.run.dir, documents=str(tmp_path / "again.parquet"))
    table, again = (pq.read_table(path) for path in (tmp_path / "run" / DOCUMENTS, tmp_path / "again.parquet"))
    assert again.equals(table) and set(table["eval_set"].to_pylist()) == {"heldout"}
    columns = {name: np.array(table[name]) for name in table.column_names}
    for routing in ("choice", "threshold"):
        own = columns["routing"] == routing
        for modality in ("text", "image"):
            nats, tokens = (columns[f"{what}_{modality}"][own].sum() for what in ("nats", "tokens"))
            assert tokens == figures[routing][f"tokens_{modality}"]
            assert nats / tokens == pytest.approx(figures[routing][f"loss_{modality}"], rel=1e-5)


def test_a_finished_run_that_lost_them_gets_them_again(tmp_path):
    """As after a kill between the last checkpoint and the summary."""
    config = tiny(tmp_path, train_steps=2)
    train(config, quiet=True)
    path = Path(tmp_path, DOCUMENTS)
    before = path.read_bytes()
    for lost in (path, tmp_path / "summary.json"):
        lost.unlink()
    train(config, quiet=True)
    assert path.read_bytes() == before


@pytest.mark.parametrize("step", [1, 2])
def test_thresholds_of_other_weights_are_not_judged_by(tmp_path, step):
    """A run that goes on from its very end calibrates again where thresholds.json is of another model or step."""
    config = tiny(tmp_path, train_steps=2)
    train(config, quiet=True)
    before = {path: path.read_bytes() for path in (tmp_path / DOCUMENTS, tmp_path / "thresholds.json")}
    found = json.loads(before[tmp_path / "thresholds.json"])
    other = {name: (np.array(values) - 3).tolist() for name, values in found["thresholds"].items()}
    edited = found | {"step": step, "model": "another", "thresholds": other}
    (tmp_path / "thresholds.json").write_text(json.dumps(edited))
    for lost in (tmp_path / DOCUMENTS, tmp_path / "summary.json"):
        lost.unlink()
    train(config, quiet=True)
    assert (tmp_path / DOCUMENTS).read_bytes() == before[tmp_path / DOCUMENTS]
    again = json.loads((tmp_path / "thresholds.json").read_text())
    assert again["thresholds"] == found["thresholds"] and again["model"] == found["model"]


def test_pieces_of_a_document_are_one_row(monkeypatch):
    """Long documents are cut over rows and batches; stores are apart by their number."""
    views = corpus(1, (40, 90, 30))
    store = FakeStore(MODALITIES, {(name, "validation"): view for name, view in views.items()})
    monkeypatch.setattr(stream_lib, "open_store", lambda path, **options: store)
    losses, expected, pieces = DocumentLosses(("text", "image")), {}, 0
    with open_stream(config(), split="validation", epochs=1, rows=4) as stream:
        for packed in stream:
            batch = packed.batch
            nats_BS = np.random.default_rng(pieces).uniform(size=batch.token_BS.shape) * batch.weight_BS
            losses.add(packed, {"choice": nats_BS})
            pieces += len(packed.piece_N6)
            place = [0] * len(batch.token_BS)
            for number, document, start, stop, _, row in packed.piece_N6.tolist():
                own = np.arange(place[row], place[row] + stop - start)
                place[row] += stop - start
                for m in range(2):
                    mine = own[batch.target_modality_BS[row, own] == m]
                    sums = expected.setdefault((number, document), np.zeros((2, 2)))
                    sums[m] += nats_BS[row, mine].sum(), batch.weight_BS[row, mine].sum()
    rows = pq.read_table(io.BytesIO(to_bytes([losses.table("heldout")]))).to_pylist()
    assert len(rows) == len({(r["store"], r["document"]) for r in rows}) < pieces
    for row in rows:
        found = [[row[f"{what}_{m}"] for what in ("nats", "tokens")] for m in ("text", "image")]
        np.testing.assert_allclose(found, expected.pop((row["store"], row["document"])), rtol=1e-6)
    assert all(not sums[:, 1].any() for sums in expected.values()), "those without targets alone have no row"
