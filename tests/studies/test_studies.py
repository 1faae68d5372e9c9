"""Studies: equal budgets, runs that are made once, whatever interrupts them, and refusals that leave no trace."""

import dataclasses
import itertools
import json
import sys
from pathlib import Path

import pytest
from command_line import run
from paths import ROOT
from small_studies import DENSE, GROWN, MOMA, files, study_of, write_study
from tiny import tiny

from moma_jax.checks import resolve
from moma_jax.config import OptimizerConfig
from moma_jax.cost import flops_per_token, total_steps
from moma_jax.errors import InputError
from moma_jax.studies import Upcycled, Variant, load_study, running
from moma_jax.studies.jobs import jobs
from moma_jax.studies.matching import adjusted, match_rows, match_variants

CONFIGS = ROOT / "configs"


# Matching -------------------------------------------------------------------------------------------------------------


def wide(**fields):
    """Wide enough that hidden sizes in steps of 8 can be matched."""
    return tiny(**{"model_width": 64, "model_heads": 4, "model_hidden": 256, "model_layers": 6} | fields)


@pytest.mark.parametrize("ffn", ["4t4i", "8x", "2t2i+1x"])
def test_the_nearest_hidden_size_is_found(ffn):
    base = dataclasses.replace(wide(), model=dataclasses.replace(wide().model, ffn=ffn))
    target = flops_per_token(wide(model_ffn="dense"))

    def off(hidden):
        model = dataclasses.replace(base.model, hidden=hidden)
        return abs(flops_per_token(dataclasses.replace(base, model=model)) - target)

    found = adjusted(base, "model.hidden", target, 0.01, ffn)
    assert found.model.hidden == min(range(8, 512, 8), key=off)
    assert dataclasses.replace(found, model=base.model) == base, "nothing else changes"
    exact = adjusted(base, "model.hidden", target, 0.0, ffn)
    assert exact.model.hidden == min(range(1, 512), key=off), "single units where eights miss the tolerance"


def test_layers_are_matched_first_and_the_hidden_size_for_the_rest():
    target = flops_per_token(wide(model_ffn="dense"))
    narrow = wide(model_ffn="4t4i", model_hidden=96)

    def with_layers(layers):
        return abs(flops_per_token(wide(model_ffn="4t4i", model_hidden=96, model_layers=layers)) - target)

    found = adjusted(narrow, "model.layers", target, 0.01, "narrow").model
    assert found.layers == min(range(1, 40), key=with_layers) > 6
    assert found.hidden % 8 == 0 and abs(found.hidden - 96) < 96 / 2


def test_mixture_of_depths_is_deeper_by_whole_pairs():
    study = study_of(
        DENSE,
        Variant("mod", {"model.ffn": "mod+4t4i"}, match="model.layers"),
        base=wide(model_layers=7),
        tolerance=0.02,
    )
    dense, mod = match_variants(study)
    assert mod.config.model.layers % 2 == 0 and mod.config.model.layers >= 10 and dense.config.model.layers == 7
    assert mod.share_of_baseline == pytest.approx(1, abs=0.02)


def test_what_cannot_be_matched_is_refused():
    heavy = Variant("heavy", {"model.ffn": "dense", "model.layers": 40}, match="model.hidden")
    with pytest.raises(InputError, match="heavy: no model.hidden brings it down to the baseline's"):
        match_variants(study_of(DENSE, heavy))
    with pytest.raises(InputError, match=r"unequal budgets: 2t2i\+1x has 1\.\d+ of the FLOPs of dense"):
        match_variants(study_of(DENSE, Variant("2t2i+1x", {"model.ffn": "2t2i+1x"})))
    shared = dataclasses.replace(GROWN, upcycled=Upcycled({"model.ffn": "1t1i+1x"}, 0.3))
    with pytest.raises(InputError, match="unequal budgets: grown has 1"):
        match_variants(study_of(DENSE, shared))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"data.sequence": 32}, "data differs from that of dense"),
        ({"train.batch_rows": 4}, "train.batch_rows differs"),
        ({"train.eval-every": 1}, "train.eval_every differs"),
        ({"model.fnn": "8x"}, "other: model.fnn: no such field; did you mean model.ffn"),
        ({"model.heads": 3}, "other: model.heads: 3 heads do not divide"),
    ],
)
def test_variants_differ_in_the_model_alone(overrides, message):
    with pytest.raises(InputError, match=message):
        match_variants(study_of(DENSE, Variant("other", overrides)))


@pytest.mark.parametrize("budget", [{"tokens": 1200.0}, {"flops": 4.1e7, "tokens": None}])
def test_every_variant_spends_the_budget(budget):
    variants = (DENSE, MOMA, GROWN, Variant("swin", {"model.ffn": "dense", "model.norm": "pre"}))
    matched = match_variants(study_of(*variants, **budget))
    dense = matched[0].config
    bought = budget["flops"] / flops_per_token(dense) if budget["tokens"] is None else budget["tokens"]
    steps = [sum(map(total_steps, each.stages)) for each in matched]
    assert steps == [-(-bought // dense.batch_tokens)] * 4 and 0 <= steps[0] * dense.batch_tokens - bought < 128
    for each in matched:
        spent = sum(total_steps(c) * c.batch_tokens * flops_per_token(c) for c in each.stages)
        assert spent == pytest.approx(steps[0] * dense.batch_tokens * flops_per_token(dense), rel=0.01)
        assert spent == pytest.approx(each.share_of_baseline * steps[0] * dense.batch_tokens * flops_per_token(dense))
        assert (each.config.data, each.config.train.batch_rows) == (dense.data, dense.train.batch_rows)


def test_stages_of_an_upcycled_variant():
    base = tiny(optimizer_warmup_steps=30)
    grown = match_variants(study_of(DENSE, GROWN, base=base, tokens=128 * 100))[1]
    assert [c.train.steps for c in grown.stages] == [30, 70]
    assert [c.optimizer.warmup_steps for c in grown.stages] == [3, 7], "a tenth of a stage at most"
    assert grown.seed_run.model == dataclasses.replace(grown.config.model, ffn="1t1i")
    short = match_variants(study_of(DENSE, GROWN, tokens=128 * 100))[1]
    assert [c.optimizer for c in short.stages] == [OptimizerConfig(peak_lr=1e-2, end_lr=1e-4, warmup_steps=2)] * 2
    with pytest.raises(InputError, match="grown: a share of 0.3 of 1 updates leaves one stage without any"):
        match_variants(study_of(DENSE, GROWN, tokens=100))


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tokens": None}, "study.flops: give exactly one of flops and tokens; given: none"),
        ({"flops": 1e9}, "exactly one of flops and tokens; given: flops, tokens"),
        ({"tokens": -1}, "study.tokens: must be positive"),
        ({"tolerance": 1.0}, "study.tolerance: must be at least 0 and below 1"),
        ({"baseline": "8x"}, "study.baseline: '8x' is none of the variants dense, 2t2i"),
        ({"baseline": "2t2i"}, "study.baseline: 2t2i is what others are matched to"),
        ({"seeds": ()}, "study.seeds: give at least one"),
        ({"seeds": (0, 1, 0)}, "study.seeds: one is repeated"),
        ({"seeds": (0.5,)}, "study.seeds: 0.5 is no seed"),
        ({"sizes": {}}, "study.sizes"),
        ({"sizes": {"": {}, "big": {}}}, "study.sizes: '' is no name for files"),
        ({"sizes": {"big": {"train.steps": 9}}}, "study.sizes: big overrides train.steps"),
        ({"variants": (DENSE, DENSE)}, "two have the name dense"),
        ({"variants": (DENSE, Variant("a/b", {}))}, "'a/b' is no name for files"),
        ({"variants": (DENSE, Variant("..", {}))}, r"'\.\.' is no name for files"),
        ({"variants": (DENSE, {"model.ffn": "8x"})}, "is no Variant"),
        ({"variants": (DENSE, Variant("a", {"train.seed": 1}))}, "a overrides train.seed, which the study sets"),
        ({"variants": (DENSE, Variant("a", {"data.seed": 1}))}, "overrides data.seed"),
        ({"variants": (DENSE, Variant("a", {"run.init-from": "b"}))}, "overrides run.init-from"),
        ({"variants": (DENSE, Variant("a", {"run.dir": "b"}))}, "overrides run.dir"),
        ({"variants": (DENSE, Variant("a", {"train.flops": 1e9}))}, "overrides train.flops"),
        ({"variants": (DENSE, Variant("a", {}, match="model.width"))}, "a matches 'model.width'; give one of"),
        ({"variants": (DENSE, Variant("a", {}, upcycled=Upcycled({}, 1.0)))}, "a seed with share 1.0"),
        (
            {"variants": (DENSE, Variant("a", {}, upcycled=Upcycled({"run.dir": "b"}, 0.5)))},
            "its seed overrides run.dir",
        ),
        ({"variants": (DENSE, Variant("a", {}, upcycled={"share": 0.5}))}, "a: upcycled is no Upcycled"),
        ({"dir": None}, "study.dir: name the directory"),
        ({"dir": 3}, "study.dir: name the directory"),
        ({"base": {}}, "study.base: give a Config"),
    ],
)
def test_contradictions_are_refused(fields, message):
    with pytest.raises(InputError, match=message) as error:
        match_variants(dataclasses.replace(study_of(), **fields))
    assert "\n" not in str(error.value)


def test_two_runs_in_one_directory_are_refused():
    seeds = (DENSE, GROWN, Variant("grown-0", {"model.ffn": "dense"}))
    assert len(jobs(study_of(*seeds))) == 3
    variants = (DENSE, Variant("dense-1", {"model.ffn": "dense"}))
    sizes = {"1": {}, "1-1": {}}
    with pytest.raises(InputError, match="two runs would live in runs/tiny/dense-1-1-0"):
        jobs(study_of(*variants, sizes=sizes))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "study.py: no such study"),
        ("def study(", "study.py: SyntaxError"),
        ("x = 1", "study.py: has no study(); write"),
        ("raise SystemExit", "study.py: SystemExit"),
        ("def study():\n    return 1", "study.py: study() returned int; return a moma_jax.studies.Study"),
        ("import nowhere", "study.py: ModuleNotFoundError"),
        ("from moma_jax import recipes\ndef study():\n    return recipes.load('no.py')", "study.py: no.py: no such"),
    ],
)
def test_bad_study_files_are_one_line(tmp_path, monkeypatch, capsys, text, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    if text is not None:
        Path("study.py").write_text(text)
    before = files(tmp_path)
    code, out, err = run(capsys, "study", "study.py")
    assert code == 2 and out == "" and message in err and err.count("\n") == 1
    assert files(tmp_path) == before


# The order, the command -----------------------------------------------------------------------------------------------


def test_jobs_by_seed_then_size_then_variant():
    sizes = {"s": {}, "l": {"model.layers": 4}}
    found = jobs(study_of(DENSE, GROWN, seeds=(3, 5), sizes=sizes, tolerance=0.02))
    expected = [f"{v}-{size}-{seed}" for seed, size, v in itertools.product((3, 5), ("s", "l"), ("dense", "grown"))]
    assert [job.name for job in found] == expected
    for job in found:
        assert (job.config.run.dir, job.config.model.layers) == (f"runs/tiny/{job.name}", {"s": 2, "l": 4}[job.size])
        for config in job.runs:
            assert config.train.seed == config.data.seed == job.seed and config == resolve(config)
    assert found[1].seed_run.run.dir == "runs/tiny/grown-s-3-seed" and found[0].seed_run is None
    assert [job.name for job in jobs(study_of())] == ["dense-0", "2t2i-0"]


@pytest.fixture
def study_file(tmp_path, monkeypatch):
    """A study file, in the working directory, of dense and 2t2i."""
    monkeypatch.chdir(tmp_path)
    return write_study(tmp_path / "small.py", "seeds=(0, 1), tokens=1280")


@pytest.mark.parametrize(
    ("words", "environment", "expected"),
    [
        ([], {}, ["dense-0", "1t1i-0", "dense-1", "1t1i-1"]),
        (["--index", 2], {}, ["dense-1"]),
        (["--index", 0], {"SLURM_ARRAY_TASK_ID": "3"}, ["dense-0"]),
        ([], {"SLURM_ARRAY_TASK_ID": "3"}, ["1t1i-1"]),
        ([], {"JOB_COMPLETION_INDEX": "1"}, ["1t1i-0"]),
        ([], {"SLURM_ARRAY_TASK_ID": "1", "JOB_COMPLETION_INDEX": "2"}, ["1t1i-0"]),
    ],
)
def test_the_index_of_an_array_job(study_file, monkeypatch, capsys, words, environment, expected):
    selected = []
    monkeypatch.setattr(running, "run_study", lambda study, chosen: selected.extend(chosen))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    code, out, _ = run(capsys, "study", study_file, *words)
    assert code == 0 and [job.name for job in selected] == expected
    alone = words == [] and "SLURM_ARRAY_TASK_ID" not in environment and "JOB_COMPLETION_INDEX" in environment
    assert {job.config.hosts.start for job in selected} == {"off" if alone else "auto"}, "no pod waits for the others"
    assert "of baseline" in out and "1.0000" in out, "the match is printed"


@pytest.mark.parametrize(
    ("words", "variable", "message"),
    [
        (["--index", 4], None, "--index: 4 is no job of this study; give 0 to 3"),
        (["--index", -1], None, "--index: -1 is no job"),
        ([], "9", "SLURM_ARRAY_TASK_ID: 9 is no job"),
        ([], "x", "SLURM_ARRAY_TASK_ID: 'x' is no number of a run"),
        (["--json"], None, "--json: goes with --list or --report"),
        (["--out", "there"], None, "--out, --add, --html: go with --report alone"),
        (["--list", "--report"], None, "give one of the two"),
        (["--list", "--index", 1], None, "--index: trains one run"),
        (["--report", "--add", "runs/a"], None, "--add: 'runs/a' is not NAME=PATH"),
        (["--report", "--add", "a=b,"], None, "--add: 'a=b,' is not NAME=PATH or NAME=PATH,PATH"),
        (["--report", "--add", "a=b", "a=c"], None, "--add: two runs have the name a"),
        (["--lits"], None, "--lits: no such option; did you mean --list"),
    ],
)
def test_bad_words_are_one_line(study_file, monkeypatch, capsys, words, variable, message):
    if variable is not None:
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", variable)
    code, out, err = run(capsys, "study", study_file, *words)
    assert code == 2 and out == "" and message in err and err.count("\n") == 1
    assert not Path("runs").exists()


def test_list_prints_the_match_and_the_jobs_and_writes_nothing(study_file, monkeypatch, capsys):
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "77")  # of no concern here
    code, out, _ = run(capsys, "study", study_file, "--list", "--json")
    listed = json.loads(out)
    assert code == 0 and listed["match"] == json.loads(json.dumps(match_rows(match_variants(load_study(study_file)))))
    assert [(j["index"], j["name"], j["state"], j["step"], j["total"]) for j in listed["jobs"]] == [
        (0, "dense-0", "new", 0, 10), (1, "1t1i-0", "new", 0, 10),
        (2, "dense-1", "new", 0, 10), (3, "1t1i-1", "new", 0, 10),
    ]  # fmt: skip
    code, out, _ = run(capsys, "study", study_file, "--list", "--dir", "elsewhere")
    assert code == 0 and "elsewhere/1t1i-1" in out
    assert not Path("runs").exists() and not Path("elsewhere").exists()


def test_report_is_told_where(study_file, monkeypatch, capsys):
    from moma_jax.studies import report

    told = []
    result = {"runs": 4, "finished": 2}
    monkeypatch.setattr(report, "write_report", lambda *arguments: told.append(arguments) or result)
    code, out, _ = run(capsys, "study", study_file, "--report")
    assert (code, out) == (0, "runs/small/report-small/report.md: 2 of 4 runs are finished\n")
    words = ["--out", "there", "--add", "a=b", "c=d=e", "--json"]
    code, out, _ = run(capsys, "study", study_file, "--report", *words)
    assert code == 0 and json.loads(out) == result
    assert [(study.dir, *rest) for study, *rest in told] == [
        ("runs/small", "runs/small/report-small", {}), ("runs/small", "there", {"a": "b", "c": "d=e"})
    ]  # fmt: skip


def test_studies_of_this_repository_are_matched_and_agree_on_runs_they_share():
    places, shared = {}, 0
    for path in sorted((CONFIGS / "studies").glob("*.py")):
        study = load_study(path)
        matched = match_variants(study)
        assert all(abs(each.share_of_baseline - 1) <= 0.01 for each in matched), path
        for job in jobs(study, matched):
            shared += job.config.run.dir in places
            assert places.setdefault(job.config.run.dir, job) == job, path
    assert len(places) >= 19 and shared >= 8
