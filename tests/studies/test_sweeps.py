"""Trials choose a field for every variant, on documents kept from training; records stand for finished runs."""

import dataclasses
import json
import shutil
import threading
import zipfile
from pathlib import Path

import pytest
from command_line import run
from processes import spawn
from small_studies import DENSE, GROWN, MOMA, files, finish, study_of
from tiny import tiny

import moma_jax
from moma_jax.config import EvalSet
from moma_jax.errors import InputError, RunError
from moma_jax.runs.directory import RunDir
from moma_jax.runs.journal import SKIPPED
from moma_jax.runs.status import read_status
from moma_jax.studies import Sweep, Upcycled, load_study, running
from moma_jax.studies.jobs import jobs, state
from moma_jax.studies.records import MOST_BYTES, keep, unpack
from moma_jax.studies.sweep import all_jobs, chosen_values, trials, tried

SWEEP = Sweep("optimizer.peak_lr", (1e-3, 2e-3, 4e-3), share=0.4, seed=99, rows=8)
LOSSES = {"dense": (1.2, 1.1, 1.3), "2t2i": (1.2, 1.1, 1.0)}
"""On the tuning split, by value: dense is best in the middle, 2t2i at the edge."""


@pytest.fixture
def study(tmp_path):
    base = tiny(model_dtype="auto", train_eval_sets=(EvalSet("heldout", rows=4),))
    return study_of(DENSE, MOMA, directory=tmp_path / "runs", base=base, sweep=SWEEP, budgets=(0.5, 2.0))


@pytest.fixture
def trained(monkeypatch):
    """Runs finish at once; which, in order."""
    made = []

    def train(config, quiet):
        with RunDir(config.run.dir).locked():
            if read_status(config.run.dir):
                return
            name = Path(config.run.dir).name
            value = config.optimizer.peak_lr
            loss = LOSSES[name.split("-")[0]][SWEEP.values.index(value)] if "trial" in name else 1.0
            finish(config, {"tuning": loss, "heldout": 1.0})
            made.append((name, value))

    monkeypatch.setattr(running, "train", train)
    monkeypatch.setattr(running, "SECONDS_BETWEEN_LOOKS", 0.05)
    return made


def test_trials_are_small_runs_that_never_see_the_held_out_split(study):
    found = trials(study)
    assert [job.name for job in found] == [f"{v}-trial-{x}" for v in ("dense", "2t2i") for x in (0.001, 0.002, 0.004)]
    for job, value in zip(found, 2 * SWEEP.values, strict=True):
        config = job.config
        assert (config.optimizer.peak_lr, config.train.steps, config.train.seed) == (value, 4, 99)
        assert config.data.tuning == SWEEP.tuning and config.run.dir == f"{study.dir}/{job.name}"
        assert [(s.name, s.split, s.rows) for s in config.train.eval_sets] == [("tuning", "tuning", 8)]
    assert all(job.waits for job in jobs(study)) and not chosen_values(study)
    assert [job.name for job in jobs(study)] == ["dense-0", "dense-x0.5-0", "dense-x2-0", "2t2i-0"]
    assert [job.config.train.steps for job in jobs(study)] == [10, 5, 20, 10]
    assert all(job.config.data.tuning == 0 for job in jobs(study)), "the runs that count train on everything"


def test_every_variant_has_its_own_best_value(study, trained):
    outcomes = running.study(study, quiet=True)
    assert set(outcomes.values()) == {"complete"} and len(outcomes) == 10
    runs = [("dense-0", 2e-3), ("dense-x0.5-0", 2e-3), ("dense-x2-0", 2e-3), ("2t2i-0", 4e-3)]
    assert trained[6:] == runs and [name for name, _ in trained[:6]] == [job.name for job in trials(study)]
    dense, moma = tried(study)
    assert (dense.best, dense.at_edge, moma.best, moma.at_edge) == (2e-3, False, 4e-3, True)
    again = running.study(study, quiet=True)
    assert again == outcomes and len(trained) == 10, "nothing twice, though its dtype was decided when it began"


def test_a_single_run_makes_the_trials_that_it_waits_for(study, trained):
    (number,) = [n for n, job in enumerate(all_jobs(study)) if job.name == "2t2i-0"]
    assert running.study(study, index=number, quiet=True)["2t2i-0"] == "complete"
    assert [name for name, _ in trained] == [f"2t2i-trial-{x}" for x in (0.001, 0.002, 0.004)] + ["2t2i-0"]


def test_runs_wait_for_a_trial_of_another_process(study, trained):
    held, other = threading.Event(), trials(study)[0].config

    def train_slowly():
        with RunDir(other.run.dir).locked():
            held.set()
            threading.Event().wait(1)
            finish(other, {"tuning": 0.5})

    thread = threading.Thread(target=train_slowly)
    thread.start()
    held.wait()
    running.study(study, quiet=True)
    thread.join()
    assert ("dense-trial-0.001", 1e-3) not in trained and ("dense-0", 1e-3) in trained


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budgets": (1, 2)}, "study.budgets: 1 is no share of the budget beside 1"),
        ({"budgets": (0.01,)}, "study.budgets: 0.01 of 10 updates leaves none"),
        ({"budgets": (2, 2)}, "study.budgets: one is repeated"),
        ({"sweep": dataclasses.replace(SWEEP, field="data.sequence")}, "data.sequence is not for a variant to choose"),
        ({"sweep": dataclasses.replace(SWEEP, field="train.seed")}, "train.seed is not for a variant to choose"),
        ({"sweep": dataclasses.replace(SWEEP, field="optimizer.peak")}, "no such field|optimizer.peak"),
        ({"sweep": dataclasses.replace(SWEEP, values=())}, "study.sweep: give values"),
        ({"sweep": dataclasses.replace(SWEEP, share=0)}, "study.sweep: a share of 0 of the budget"),
        ({"sweep": dataclasses.replace(SWEEP, seed=0)}, "study.sweep: 0 is a seed of the study"),
        ({"sweep": dataclasses.replace(SWEEP, seed=1.5)}, "study.sweep: 1.5 is no seed"),
        ({"sweep": dataclasses.replace(SWEEP, rows=0)}, "study.sweep: rows are a whole number above 0"),
        ({"sweep": dataclasses.replace(SWEEP, tuning=0.7)}, "study.sweep: a tuning share of 0.7"),
        ({"sweep": dataclasses.replace(SWEEP, values=(1e-3, 0.001))}, "study.sweep: a value is repeated"),
        ({"sweep": dataclasses.replace(SWEEP, values=("a/b",))}, "study.sweep: 'a/b' cannot be part of a directory"),
        ({"sweep": dataclasses.replace(SWEEP, field="train.batch-rows")}, "batch-rows is not for a variant to choose"),
        ({"sweep": dataclasses.replace(SWEEP, field="train.eval_sets")}, "eval_sets is not for a variant to choose"),
        (
            {"variants": (DENSE, dataclasses.replace(MOMA, overrides={"optimizer.peak-lr": 1e-3}))},
            "study.variants: 2t2i sets optimizer.peak_lr, for which trials choose a value",
        ),
        (
            {"variants": (DENSE, dataclasses.replace(GROWN, upcycled=Upcycled({"optimizer.peak_lr": 1e-3}, 0.5)))},
            "study.variants: grown sets optimizer.peak_lr, for which trials choose a value",
        ),
        ({"budgets": 2.0}, r"study.budgets: 2.0; give several, as in \(0.5, 2\)"),
        ({"records": 3}, "study.records: 3 names no directory"),
    ],
)
def test_what_cannot_be_meant_is_refused(study, change, message):
    with pytest.raises(InputError, match=message):
        all_jobs(dataclasses.replace(study, **change))


# Trials that fail or diverge ------------------------------------------------------------------------------------------


def test_a_trial_that_fails_keeps_nobody_else_from_training(study, trained, monkeypatch):
    finishing = running.train

    def train(config, quiet):
        if config.run.dir.endswith("dense-trial-0.002"):
            raise RunError("the disk is full")
        finishing(config, quiet)

    monkeypatch.setattr(running, "train", train)
    with pytest.raises(RunError, match=r"^study: 4 of 10 runs failed: dense-trial-0.002: the disk is full; dense"):
        running.study(study, quiet=True)
    assert [name for name, _ in trained[5:]] == ["2t2i-0"] and trained[5][1] == 4e-3
    monkeypatch.setattr(running, "train", finishing)
    assert set(running.study(study, quiet=True).values()) == {"complete"}
    assert [value for name, value in trained if name == "dense-0"] == [2e-3]


@pytest.mark.parametrize(("on_nan", "best"), [("stop", 4e-3), ("skip", 2e-3)])
def test_a_value_that_diverged_is_not_chosen_unless_runs_skip_updates(study, trained, on_nan, best):
    base = dataclasses.replace(study.base, train=dataclasses.replace(study.base.train, on_nan=on_nan))
    study = dataclasses.replace(study, base=base)
    skipping, *others = trials(study)[1:3]
    assert skipping.config.train.on_nan == "skip" and skipping.config.optimizer.peak_lr == 2e-3
    for job, loss in zip(trials(study)[:3], (1.2, 1.1, 1.15), strict=True):
        finish(job.config, {"tuning": loss})
    with open(f"{skipping.config.run.dir}/metrics.jsonl", "a") as file:
        file.write(json.dumps({"schema": 1, "step": 4, "time": 0.0, "kind": "event", "event": SKIPPED}) + "\n")
    assert chosen_values(study)["dense", ""] == best


def test_nothing_is_trained_where_no_value_gave_a_loss(study, trained, monkeypatch):
    monkeypatch.setitem(LOSSES, "dense", (None, None, None))
    with pytest.raises(InputError, match="3 of 10 runs failed: dense-0: not begun, as no trial ended with a finite"):
        running.study(study, quiet=True)
    assert [name for name, _ in trained[6:]] == ["2t2i-0"]


# Records --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def recorded(study, trained, tmp_path):
    study = dataclasses.replace(study, records=str(tmp_path / "records"))
    running.study(study, quiet=True)
    trained.clear()
    return study


def test_a_study_goes_on_from_records_alone(recorded, trained, tmp_path):
    assert len(list(Path(recorded.records).glob("*.zip"))) == 10
    elsewhere = dataclasses.replace(recorded, dir=str(tmp_path / "elsewhere"), seeds=(0, 1))
    running.study(elsewhere, quiet=True)
    assert [name for name, _ in trained] == ["dense-1", "dense-x0.5-1", "dense-x2-1", "2t2i-1"]
    for path in Path(recorded.dir).iterdir():
        here = files(path)
        here.pop(".lock", None)
        assert {k: v for k, v in files(tmp_path / "elsewhere" / path.name).items() if k != ".lock"} == here


def test_equal_runs_have_equal_records(recorded, tmp_path):
    before = files(recorded.records)
    shutil.rmtree(recorded.records)
    running.study(recorded, quiet=True)
    assert files(recorded.records) == before


def test_a_record_of_another_config_or_a_damaged_one_is_refused(recorded, tmp_path, trained):
    elsewhere = dataclasses.replace(recorded, dir=str(tmp_path / "elsewhere"), tokens=recorded.tokens * 2)
    with pytest.raises(InputError, match=r"trial-0.001.zip holds a run with another config \(train.steps: 4 -> 8\)"):
        running.study(elsewhere, quiet=True)
    elsewhere = dataclasses.replace(elsewhere, tokens=recorded.tokens)
    path = Path(recorded.records) / "dense-trial-0.001.zip"
    whole = path.read_bytes()
    for content, message in (
        (whole[:100], "is damaged or no record"),
        (whole[:60] + b"\0" * 40 + whole[100:], "is damaged or no record"),
        (b"", "is damaged or no record"),
    ):
        path.write_bytes(content)
        with pytest.raises(InputError, match=f"dense-trial-0.001.zip: {message}"):
            running.study(elsewhere, quiet=True)
    for name, size, message in (
        ("../outside", 1, "holds '../outside', which is no part of a run's record"),
        ("metrics.jsonl", MOST_BYTES + 1, "no record is so large"),
        ("metrics.jsonl", 1, "has no config.json"),
    ):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as record:
            record.writestr(name, b" " * size)
        with pytest.raises(InputError, match=message):
            running.study(elsewhere, quiet=True)
    assert not trained and not (tmp_path / "elsewhere").exists() and not (tmp_path / "outside").exists()


def test_a_record_of_another_run_is_not_taken_for_one_that_is_kept(recorded, trained, tmp_path):
    shorter = dataclasses.replace(recorded, dir=str(tmp_path / "shorter"), tokens=recorded.tokens / 2, records=None)
    running.study(shorter, quiet=True)
    before = files(recorded.records)
    with pytest.raises(InputError, match=r"trial-0.001.zip holds a run with another config .*give it another records"):
        running.study(dataclasses.replace(shorter, records=recorded.records), quiet=True)
    assert files(recorded.records) == before


def test_the_record_of_a_seed_run_alone_is_not_unpacked(tmp_path):
    """Its weights are not in it, so a run that grows from it has to train it again."""
    study = study_of(DENSE, GROWN, directory=tmp_path / "runs", records=str(tmp_path / "records"))
    (job,) = (job for job in jobs(study) if job.variant == "grown")
    for config in job.runs:
        finish(config)
    keep(study.records, job)
    whole = Path(study.records, "grown-0.zip")
    aside = whole.rename(tmp_path / "aside.zip")
    shutil.rmtree(study.dir)
    unpack(study.records, job)
    assert not Path(study.dir).exists()
    aside.rename(whole)
    unpack(study.records, job)
    assert state(job)["state"] == "complete" and Path(job.seed_run.run.dir, "status.json").is_file()


# For real -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_workers_that_are_killed_go_on_and_records_are_enough(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("small.py").write_text(
        "from tiny import tiny\nfrom moma_jax.studies import Study, Sweep, Variant\n\n\ndef study():\n"
        "    variants = (Variant('dense', {'model.ffn': 'dense'}), Variant('1t1i', {'model.ffn': '1t1i'}))\n"
        "    base = tiny(model_dtype='auto', train_checkpoint_every=20, train_eval_every=1000)\n"
        "    sweep = Sweep('optimizer.peak_lr', (1e-2, 1e-1), share=0.5, rows=4)\n"
        f"    return Study(base, variants, tokens={128 * 200}, budgets=(0.5,), sweep=sweep, records='records')\n"
    )
    workers = [spawn("-m", "moma_jax", "study", "small.py", cwd=tmp_path) for _ in range(2)]
    study, patience = load_study("small.py"), threading.Event()
    while not any(state(job)["step"] >= 40 for job in trials(study)):
        assert not patience.wait(0.1) and all(worker.poll() is None for worker in workers)
    for worker in workers:
        worker.kill()
        worker.communicate(timeout=120)
    code, out, _ = run(capsys, "study", "small.py")
    assert code == 0 and "goes on from step" in out and {state(job)["state"] for job in all_jobs(study)} == {"complete"}
    losses = {job.name: json.loads(Path(job.config.run.dir, "summary.json").read_text()) for job in all_jobs(study)}
    shutil.rmtree("runs")
    monkeypatch.setattr(moma_jax.training.pretrain, "compile_step", None)
    code, out, _ = run(capsys, "study", "small.py")
    assert code == 0 and "starts at step" not in out
    assert losses == {
        job.name: json.loads(Path(job.config.run.dir, "summary.json").read_text()) for job in all_jobs(study)
    }
    code, out, _ = run(capsys, "study", "small.py", "--report")
    page = Path("runs/small/report-small/report.md").read_text()
    assert code == 0 and "5 of 5 runs" not in out and "## Chosen on trials" in page and "Edge:" in page
    assert "| 1t1i | dense | heldout, choice | overall |" in page, "losses by document are in the records"
