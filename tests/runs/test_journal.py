"""Records: where they go, how they are cut back, how they are read."""

import fcntl
import json
import math
import os
import struct
import uuid

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from stale import StaleStore
from tensorboardX.proto import event_pb2
from tiny import tiny

import moma_jax
from moma_jax.errors import InputError
from moma_jax.runs.directory import RunDir
from moma_jax.runs.journal import SCHEMA, finite, open_journal, read_metrics, records_of
from moma_jax.runs.progress import RunProgress


def record(step, **fields):
    return {"kind": "train", "step": step, "loss": 1.0 / step, **fields}


def steps(run):
    return [r["step"] for r in read_metrics(run)]


def journal_of(path, step=0, tensorboard=False):
    return open_journal(RunDir(path), step=step, tensorboard=tensorboard)


def test_records_are_flat_and_valid_json(tmp_path):
    journal = journal_of(tmp_path)
    journal.write(record(1, grad_norm=math.inf, mfu=None))
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()  # written through at once
    read = json.loads(line, parse_constant=pytest.fail)
    assert read["schema"] == SCHEMA and read["grad_norm"] is None and read["mfu"] is None and read["time"] > 0
    journal.close()


def test_what_is_told_after_the_last_checkpoint_is_kept_also_where_the_end_is_told_twice():
    path = f"memory://{uuid.uuid4()}/run"
    for step, event in ((0, "first"), (2, "second")):  # the second is killed before its end, or finds it done
        journal = journal_of(path, step)
        if not step:
            journal.write(record(1))
            journal.seal(2)
        journal.write({"kind": "event", "step": 2, "event": event})
        journal.seal(2)
        journal.close()
    assert [r.get("event") for r in read_metrics(path)] == [None, "first", "second"]


def test_records_are_read_though_the_listing_is_old():
    run = RunDir(f"memory://{uuid.uuid4()}/run")
    StaleStore(run, 60)
    journal = open_journal(run, step=0, tensorboard=False)
    for step in (1, 2):
        journal.write(record(step))
        journal.seal(step)
    assert [r["step"] for r in records_of(run)] == [1, 2]
    run.delete("metrics/000000000001-000000000002.jsonl")
    assert [r["step"] for r in records_of(run)] == [1]


def test_a_run_that_goes_on_drops_what_came_after_its_checkpoint(tmp_path):
    journal = journal_of(tmp_path)
    for step in (1, 2, 3, 4):
        journal.write(record(step))
    journal.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "st')  # killed in the middle of a line
    assert steps(tmp_path) == [1, 2, 3, 4]
    journal = journal_of(tmp_path, step=2)
    assert steps(tmp_path) == [1, 2]
    journal.write(record(3))
    journal.close()
    assert steps(tmp_path) == [1, 2, 3]
    journal_of(tmp_path, step=0).close()
    assert steps(tmp_path) == []


def test_a_damaged_line_is_named_and_costs_no_other(tmp_path):
    journal = journal_of(tmp_path)
    for step in (1, 2, 3):
        journal.write(record(step))
    journal.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    damaged = lines[0] + lines[1].replace("{", "z", 1) + lines[2]
    (tmp_path / "metrics.jsonl").write_text(damaged)
    with pytest.raises(InputError, match=r"metrics.jsonl: line 2: not JSON .*restore the file, or remove the line"):
        journal_of(tmp_path, step=3)
    assert (tmp_path / "metrics.jsonl").read_text() == damaged
    (tmp_path / "metrics.jsonl").write_text(lines[0] + lines[2])
    assert steps(tmp_path) == [1, 3]


def test_object_stores_get_immutable_segments():
    run = f"memory://{uuid.uuid4()}/run"
    journal = journal_of(run)
    journal.write(record(1))
    with pytest.raises(InputError, match="no metrics"):
        read_metrics(run)  # nothing is there before the first checkpoint
    journal.seal(1)
    journal.write(record(2))
    journal.seal(2)
    journal.write(record(3))
    journal.close()
    assert steps(run) == [1, 2]
    journal = journal_of(run, step=1)  # the checkpoint of step 2 was never finished
    journal.write(record(2))
    journal.write(record(3))
    journal.seal(3)
    assert steps(run) == [1, 2, 3]
    assert RunDir(run).names("metrics/") == [
        "metrics/000000000000-000000000001.jsonl",
        "metrics/000000000001-000000000003.jsonl",
    ]


def test_a_full_disk_is_an_input_error_that_names_the_file(tmp_path):
    journal = journal_of(tmp_path)
    os.dup2(os.open("/dev/full", os.O_WRONLY), journal._sinks[0]._file.fileno())
    with pytest.raises(InputError, match=r"metrics.jsonl: cannot be written: No space left"):
        journal.write(record(1))


def test_lines_that_are_no_records_are_refused_and_kept(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"loss": 1.0}\n')
    for read in (journal_of, read_metrics):
        with pytest.raises(InputError, match="metrics.jsonl: line 1: kind: is missing; restore"):
            read(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"loss": 1.0}\n'


@pytest.mark.parametrize(
    ("line", "refusal"),
    [
        (b"", "not JSON"),
        (b'{"kind": "train", "st', "not JSON"),
        (b'{"kind": "\xff", "step": 1}', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"kind": "train", "step": ' + b"1" * 5000 + b"}", "not JSON"),
        (b"[]", r"expected Record, found \[\]"),
        (b'{"kind": "train", "step": 1e3}', "step: expected int, found 1000.0"),
        (b'{"kind": "eval", "step": 1, "eval_set": "heldout"}', "no routing"),
        (b'{"kind": "train", "step": 1, "loss": NaN}', "'loss' is no number: nan"),
        (b'{"kind": "train", "step": 1, "loss": [1.0]}', r"'loss' is no number: \[1.0\]"),
    ],
)
def test_a_damaged_line_before_others_hides_none(tmp_path, line, refusal):
    """Only the last line may be cut short. All others once ended the reading, and a run that went on lost the rest."""
    whole = json.dumps(record(2)).encode() + b"\n"
    (tmp_path / "metrics.jsonl").write_bytes(whole + line + b"\n" + whole)
    for read in (journal_of, read_metrics):
        with pytest.raises(InputError, match=rf"metrics.jsonl: line 2: {refusal}.*; restore the file") as caught:
            read(tmp_path)
        assert len(str(caught.value)) < 300
    (tmp_path / "metrics.jsonl").write_bytes(whole + line[:-1])
    assert len(read_metrics(tmp_path)) == 1


def test_numbers_that_json_cannot_say_are_null():
    value = {"a": math.nan, "b": [math.inf, 1.5, "x"], "c": {"d": -math.inf, "e": None}, "f": True}
    assert finite(value) == {"a": None, "b": [None, 1.5, "x"], "c": {"d": None, "e": None}, "f": True}


def test_tensorboard_gets_numbers_by_kind(tmp_path):
    pytest.importorskip("tensorboardX")
    journal = journal_of(tmp_path, tensorboard=True)
    journal.write(record(1, mfu=None))
    journal.write({"kind": "eval", "step": 1, "eval_set": "heldout", "routing": "choice", "loss": 2.0})
    journal.close()
    (events,) = (tmp_path / "tensorboard").iterdir()
    content = events.read_bytes()
    assert b"train/loss" in content and b"eval/heldout/choice/loss" in content and b"mfu" not in content


def test_pictures_are_kept_in_the_run_and_in_tensorboard(tmp_path):
    journal, picture = journal_of(tmp_path, tensorboard=True), Image.new("RGB", (6, 4), "red")
    journal.draw("heldout", 20, picture)
    journal.close()
    kept = Image.open(tmp_path / "sheets" / "heldout-00000020.png")
    assert np.array_equal(np.asarray(kept), np.asarray(picture))
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"sheets/heldout" in events.read_bytes()


def test_reading_a_directory_without_records_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="no metrics"):
        read_metrics(tmp_path)


def test_plain_lines_where_there_is_no_terminal(capsys):
    view = RunProgress(10, 0)
    view.write(record(5, loss_text=None, loss_image=3.0, step_seconds=2.0, tokens_per_second=1234.5, mfu=None))
    view.write({"kind": "event", "step": 5, "event": "something"})
    view.close()
    out = capsys.readouterr().out
    assert "step 5/10  loss 0.2000  text -  image 3.0000  1,234 tokens/s  0:00:10 left" in out
    assert "something" in out and "\x1b" not in out
    RunProgress(10, 0, quiet=True).write(record(5, step_seconds=1, tokens_per_second=1, mfu=None))
    assert capsys.readouterr().out == ""


def test_status_files_are_whole(tmp_path):
    run = RunDir(tmp_path / "a" / "b")
    assert run.read_json("status.json") is None
    run.write_json("status.json", {"state": "running"})
    assert RunDir(tmp_path / "a" / "b").read_json("status.json") == {"state": "running"}
    with run.locked(), pytest.raises(InputError, match="is writing here; stop it"), RunDir(run.path).locked():
        pass
    lock = tmp_path / "a" / "b" / ".lock"
    assert lock.read_bytes() == b""
    with open(lock, "wb") as file, pytest.raises(InputError, match="another process is writing here"):
        file.write(b"process 1\n\x1b[2J")
        file.flush()
        fcntl.flock(file, fcntl.LOCK_SH)
        with RunDir(run.path).locked():
            pass


def test_a_lock_writes_through_no_link(tmp_path):
    (tmp_path / "kept").write_text("a user's")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "kept")
    with pytest.raises(InputError, match="run.dir: cannot write to"), RunDir(tmp_path / "run").locked():
        pass
    assert (tmp_path / "kept").read_text() == "a user's"


def test_tensorboard_has_the_config_and_histograms_of_gates(tmp_path):
    """Read back by tensorboardX's own protocol buffers."""
    moma_jax.train(tiny(tmp_path, train_steps=2, run_tensorboard=True), quiet=True)
    found = {}
    for path in (tmp_path / "tensorboard").glob("events*"):
        content, at = path.read_bytes(), 0
        while at < len(content):
            (length,) = struct.unpack("<Q", content[at : at + 8])
            event = event_pb2.Event.FromString(content[at + 12 : at + 12 + length])
            found |= {value.tag: value for value in event.summary.value}
            at += length + 16
    assert "_hparams_/session_start_info" in found
    assert "model.ffn" in str(found["_hparams_/session_start_info"].metadata)
    (rows,) = (tmp_path / "routing").glob("heldout-*2.parquet")
    rows = [
        r for r in pq.read_table(rows).to_pylist() if (r["routing"], r["group"], r["layer"]) == ("choice", "text", 0)
    ]
    histogram = found["gates/heldout/choice/text/0"].histo
    assert histogram.num == sum(sum(row["gates"]) for row in rows) == sum(row["taken"] for row in rows)
