"""Runs of a study: made once, in turn, whatever interrupts them, and never over something else."""

import dataclasses
import fcntl
import json
import os
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from command_line import run
from processes import spawn
from runs import changed_batches
from small_studies import DENSE, GROWN, MOMA, files, study_of, write_study
from tiny import tiny

import moma_jax
from moma_jax.config import PrepareConfig
from moma_jax.errors import InputError, RunError
from moma_jax.runs.checkpoint import Checkpoints
from moma_jax.runs.directory import RunDir
from moma_jax.studies import Upcycled, Variant, running
from moma_jax.studies.jobs import jobs, state

BASE = tiny(train_eval_sets=())
"""Evaluations would double what is compiled."""


def states(study):
    return [state(job)["state"] for job in jobs(study)]


def say_nothing(study, **options):
    return running.study(study, quiet=True, **options)


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    """A study that was run: dense, and 2t2i from a seed run."""
    study = study_of(DENSE, GROWN, directory=tmp_path_factory.mktemp("complete"), base=BASE)
    return study, say_nothing(study)


@pytest.fixture
def copy(complete, tmp_path):
    """A copy of it, to damage."""
    shutil.copytree(complete[0].dir, tmp_path / "copy")
    return dataclasses.replace(complete[0], dir=str(tmp_path / "copy"))


@pytest.mark.slow
def test_a_study_leaves_ordinary_runs(complete):
    study, outcomes = complete
    assert outcomes == {"dense-0": "complete", "grown-0": "complete"} and states(study) == ["complete"] * 2
    names = {"dense-0": 10, "grown-0": 7, "grown-0-seed": 3}
    assert {p.name for p in Path(study.dir).iterdir()} == set(names)
    for name, steps in names.items():
        directory = f"{study.dir}/{name}"
        summary, written = RunDir(directory).read_json("summary.json"), moma_jax.recipe(directory)
        assert summary["steps"] == written.train.steps == steps and moma_jax.load(directory).config == written
    ancestry = RunDir(f"{study.dir}/grown-0").read_json("ancestry.json")
    assert (ancestry["seed_run"], ancestry["seed_step"]) == (f"{study.dir}/grown-0-seed", 3)
    assert ancestry["seed_tokens"] == 3 * 128


@pytest.mark.slow
def test_what_is_complete_is_not_made_again(complete):
    study, outcomes = complete
    before = files(study.dir)
    assert say_nothing(study) == outcomes and files(study.dir) == before
    more = dataclasses.replace(study, variants=(*study.variants, Variant("1t1i", {"model.ffn": "1t1i"})))
    assert states(more) == ["complete", "complete", "new"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": 1409}, r"dense-0 holds a run with another config \(train.steps: 10 -> 12\); change the study back"),
        ({"base": tiny(train_eval_sets=(), optimizer_peak_lr=0.5)}, "optimizer.peak_lr: 0.01 -> 0.5"),
        ({"variants": (DENSE, dataclasses.replace(MOMA, name="grown"))}, "grown-0 holds a run with another config"),
        ({"variants": (dataclasses.replace(GROWN, name="dense"), dataclasses.replace(DENSE, name="first")),
          "baseline": "first"}, "dense-0 holds a run with another config"),
    ],
)  # fmt: skip
def test_another_config_is_refused_before_the_first_run(copy, change, message):
    before, newcomer = files(copy.dir), Variant("newcomer", {"model.ffn": "dense"})
    study = dataclasses.replace(copy, **change)
    study = dataclasses.replace(study, variants=(newcomer, *study.variants))
    with pytest.raises(InputError, match=message) as error:
        say_nothing(study)
    assert files(copy.dir) == before and "\n" not in str(error.value)


@pytest.mark.slow
def test_files_that_are_no_run_of_the_study_are_left_alone(copy):
    (Path(copy.dir) / "2t2i-0").mkdir()
    (Path(copy.dir) / "2t2i-0" / "metrics.jsonl").write_text("step,loss")
    (Path(copy.dir) / "grown-0" / "ancestry.json").unlink()
    before = files(copy.dir)
    with pytest.raises(InputError, match="2t2i-0 has metrics.jsonl but no run of moma"):
        say_nothing(dataclasses.replace(copy, variants=(DENSE, MOMA)))
    with pytest.raises(InputError, match="grown-0 holds a run that was not upcycled"):
        say_nothing(copy)
    assert files(copy.dir) == before


@pytest.mark.parametrize(
    ("seed", "message"),
    [
        ({"model.ffn": "3t3i"}, "3t3i -> 2t2i: 2 experts for text are no multiple of the seed's 3"),
        ({"model.ffn": "1t1i", "model.norm": "pre"}, "grown: the seed has another model"),
    ],
)
def test_a_seed_that_cannot_grow_is_refused_before_it_is_trained(tmp_path, seed, message):
    grown = dataclasses.replace(GROWN, upcycled=Upcycled(seed, 0.3))
    with pytest.raises(InputError, match=message):
        say_nothing(study_of(DENSE, grown, directory=tmp_path / "new", base=BASE, tolerance=0.5))
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_an_upcycled_run_that_another_process_made_meanwhile(copy, monkeypatch):
    """Both saw a finished seed run; the slower one goes on with what the faster one made."""
    run_dir = Path(copy.dir) / "grown-0"
    shutil.move(run_dir, f"{run_dir}-kept")

    def upcycle(*_):
        shutil.move(f"{run_dir}-kept", run_dir)
        raise InputError("run.dir: holds ancestry.json; choose a new directory")

    monkeypatch.setattr(running, "_upcycle", upcycle)
    assert say_nothing(copy, index=1) == {"grown-0": "complete"}


@pytest.mark.slow
def test_a_run_of_another_process_is_left_to_it(copy, capsys):
    shutil.rmtree(f"{copy.dir}/dense-0")
    with RunDir(f"{copy.dir}/dense-0").locked():
        outcomes = running.study(copy)
    assert outcomes == {"dense-0": "trained by another process", "grown-0": "complete"}
    assert "study: dense-0: trained by another process" in capsys.readouterr().out
    assert not (Path(copy.dir) / "dense-0" / "config.json").exists()


@pytest.mark.slow
def test_an_upcycled_run_whose_seed_another_process_trains_is_left_to_it(copy):
    shutil.rmtree(f"{copy.dir}/grown-0")
    shutil.rmtree(f"{copy.dir}/grown-0-seed")
    with RunDir(f"{copy.dir}/grown-0-seed").locked():
        assert say_nothing(copy, index=1) == {"grown-0": "trained by another process"}
    assert not (Path(copy.dir) / "grown-0").exists()


@pytest.mark.slow
def test_an_upcycled_run_that_was_half_begun_is_begun_again(copy):
    """Killed before `upcycle` had written everything: the seed run is there, and must not be replaced by noise."""
    run_dir = Path(copy.dir) / "grown-0"
    for name in ("config.json", "status.json", "summary.json", "metrics.jsonl", "documents.parquet", "thresholds.json"):
        (run_dir / name).unlink(missing_ok=True)
    for step in Checkpoints(RunDir(str(run_dir))).steps():
        shutil.rmtree(run_dir / "checkpoints" / str(step))
    seed = files(f"{copy.dir}/grown-0-seed")
    assert state(jobs(copy)[1]) == {"state": "stopped", "step": 3, "total": 10}
    assert say_nothing(copy, index=1) == {"grown-0": "complete"}
    assert files(f"{copy.dir}/grown-0-seed") == seed and states(copy) == ["complete"] * 2


@pytest.mark.parametrize(("error", "kind"), [(RunError("lost"), RunError), (InputError("no"), InputError),
                                             (MemoryError("full"), RunError)])  # fmt: skip
def test_a_failed_run_is_named_and_the_others_go_on(tmp_path, monkeypatch, error, kind):
    trained = []

    def train(config, **options):
        if config.model.ffn == "dense":
            raise error
        trained.append(config.run.dir)

    monkeypatch.setattr(running, "train", train)
    with pytest.raises(kind, match=rf"^study: 1 of 2 runs failed: dense-0: {error}$"):
        say_nothing(study_of(DENSE, MOMA, directory=tmp_path))
    assert trained == [f"{tmp_path}/2t2i-0"]


@pytest.mark.slow
@pytest.mark.parametrize(("batch", "left"), [(2, "stopped"), (6, "complete")])
def test_a_signal_ends_the_study_even_where_it_comes_at_a_runs_last_step(tmp_path, monkeypatch, batch, left):
    def send(number, content):
        if number == batch:
            os.kill(os.getpid(), signal.SIGTERM)
        return content

    changed_batches(monkeypatch, send)
    study = study_of(DENSE, directory=tmp_path, base=BASE, seeds=(0, 1), tokens=6 * 128)
    with pytest.raises(SystemExit) as exit_:
        say_nothing(study)
    assert exit_.value.code == 128 + signal.SIGTERM
    assert states(study) == [left, "new"] and signal.set_wakeup_fd(-1) == -1


def test_missing_stores_are_made_by_one_process(tmp_path, monkeypatch):
    """The others wait for it."""
    made = []
    monkeypatch.setattr(running, "prepare_missing_stores", lambda config, progress: made.append(config.data.seed))
    monkeypatch.setattr(running, "train", lambda config, quiet: made.append(config.run.dir))
    base = tiny(data_prepare=PrepareConfig(), train_eval_sets=())
    (tmp_path / "runs").mkdir()
    with open(tmp_path / "runs" / ".lock", "a") as lock, ThreadPoolExecutor() as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process makes them
        study = pool.submit(say_nothing, study_of(DENSE, directory=tmp_path / "runs", base=base))
        with pytest.raises(TimeoutError):
            study.result(timeout=0.5)
        assert made == []
        fcntl.flock(lock, fcntl.LOCK_UN)
        study.result(timeout=60)
    assert made == [0, f"{tmp_path}/runs/dense-0"]


def after_step(process, journal, step):
    """Waits until the journal has a record of at least this step."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        lines = journal.read_text().splitlines() if journal.exists() else []
        if len(lines) > 1 and json.loads(lines[-2])["step"] >= step:
            return
        time.sleep(0.01)
    process.kill()
    raise AssertionError(process.communicate()[1][-3000:])


@pytest.mark.slow
def test_a_study_that_is_killed_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = write_study(tmp_path / "small.py", f"tokens={128 * 240}")
    study = dataclasses.replace(moma_jax.studies.load_study(path), dir=str(tmp_path / "runs" / "small"))
    journal = tmp_path / "runs" / "small" / "dense-0" / "metrics.jsonl"
    process = spawn("-m", "moma_jax", "study", path, cwd=tmp_path)
    after_step(process, journal, 40)
    assert states(study) == ["running", "new"]
    process.kill()
    _, err = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, err[-3000:]
    assert states(study) == ["stopped", "new"]
    code, out, _ = run(capsys, "study", path)
    assert code == 0 and "dense-0: goes on from step" in out and "1t1i-0: starts at step 0" in out
    assert states(study) == ["complete", "complete"]
    steps = [r["step"] for r in moma_jax.read_metrics(str(journal.parent)) if r["kind"] == "train"]
    assert steps == list(range(2, 241, 2)), "every record once"
