"""`moma study --report` on runs whose losses are known functions, so that eta is known."""

import csv
import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tiny import tiny

from moma_jax.__main__ import main
from moma_jax.config_json import to_json
from moma_jax.cost import flops_per_token, total_steps
from moma_jax.errors import InputError
from moma_jax.evaluation.documents import to_bytes
from moma_jax.page.study import study_page
from moma_jax.studies import figures, report
from moma_jax.studies.jobs import jobs
from moma_jax.studies.records import keep
from moma_jax.studies.report import write_report
from moma_jax.studies.study import Study, Upcycled, Variant
from moma_jax.training.pretrain import train

PER_UPDATE = 128
"""Tokens of an update of the tiny config."""
UPDATES, LOG, EVAL = 400, 4, 20
MEASURES = ("loss", "loss_text", "loss_image")


def power(speed=1.0, shift=0.0):
    """The loss (speed * C)^-0.2 + shift, C in millions of FLOPs: its mean from one C to another, or at a point."""

    def mean(begin, end):
        if begin == end:
            return 10 * (speed * end / 1e6) ** -0.2 + shift
        whole = [(speed * c / 1e6) ** 0.8 / 0.8 for c in (begin, end)]
        return 10 * (whole[1] - whole[0]) / (speed * (end - begin) / 1e6) + shift

    return mean


def study_of(directory, *names, seeds=(0,), **fields):
    """Variants of equal FLOPs: dense, and `names`, which are all 1t1i."""
    variants = (Variant("dense", {"model.ffn": "dense"}), *(Variant(name, {"model.ffn": "1t1i"}) for name in names))
    length = {} if "flops" in fields else {"tokens": UPDATES * PER_UPDATE}
    return Study(tiny(), variants, seeds=seeds, dir=str(directory / "runs"), **(length | fields))


def write_run(path, config, laws, routings=("choice",), shares=1.0, seed=None):
    """A finished run with exact losses; `laws` by measure, `seed` what its seed run spent."""
    path, updates, rate = Path(path), total_steps(config), flops_per_token(config) * shares
    begun = seed or {"seed_real_tokens": 0, "seed_real_flops": 0.0}
    records = []
    for step in range(1, updates + 1):
        tokens, about = step * PER_UPDATE, {"schema": 1, "step": step, "time": 0.0}
        before = (step - 1) // LOG * LOG * PER_UPDATE * rate
        total = begun["seed_real_flops"] + tokens * rate
        if step % LOG == 0 or step == updates:
            losses = {m: laws[m](begun["seed_real_flops"] + before, total) for m in MEASURES}
            counts = {"tokens": tokens, "tokens_text": tokens // 2, "tokens_image": tokens // 2}
            spent = {"flops": tokens * rate, "wall_seconds": 0.5 * step, "tokens_per_second": 2.0 * PER_UPDATE}
            records.append({**about, "kind": "train", **losses, **counts, **spent})
        if step % EVAL == 0 or step == updates:
            losses = {m: laws[m](total, total) for m in MEASURES}
            for routing in routings:
                causal = {} if routing in ("choice", "training") and len(routings) > 1 else {"perplexity": 1.0}
                held_out = {"kind": "eval", "eval_set": "heldout", "routing": routing, **losses, **causal}
                records.append({**about, **held_out, "tokens": 99})
    path.mkdir(parents=True, exist_ok=True)
    (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    write_json(path / "config.json", to_json(config))
    write_json(path / "status.json", {"state": "complete", "step": updates, "total": updates})
    machine = {"device": {"kind": "cpu", "count": 1}, "versions": {"jax": "0.10"}, "commit": "c0ffee" * 4}
    write_json(path / "summary.json", {"command": f"moma train {path.name}", "steps": updates, **machine})
    if seed:
        write_json(path / "ancestry.json", seed)


def write_json(path, value):
    path.write_text(json.dumps(value))


def same(law):
    return dict.fromkeys(MEASURES, law)


def write_study(study, laws, **how):
    """Writes every job; `laws` by variant, each by measure or (seed -> by measure)."""
    for job in jobs(study):
        law = laws[job.variant]
        write_run(job.config.run.dir, job.config, law(job.seed) if callable(law) else law, **how.get(job.variant, {}))


def etas(result, variant, loss="training"):
    return {s["modality"]: s["eta"] for s in result["speedups"] if (s["variant"], s["loss"]) == (variant, loss)}


@pytest.fixture
def fast(tmp_path):
    """A finished study: the variant is 2 times as fast in all, 1.5 times in text, 4 times in image."""
    study = study_of(tmp_path, "fast")
    laws = {"loss": power(2.0), "loss_text": power(1.5), "loss_image": power(4.0)}
    write_study(study, {"dense": same(power()), "fast": laws})
    return study


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    """They take longer than all else; `test_figures_are_there_and_shown` has them drawn."""
    monkeypatch.setattr(report, "draw", lambda *_: b"")


# What it says ---------------------------------------------------------------------------------------------------------


def test_the_true_eta_by_every_loss_and_modality(fast, tmp_path):
    result = write_report(fast, str(tmp_path / "out"), {})
    assert (result["runs"], result["finished"]) == (2, 2)
    truth = {"overall": 2.0, "text": 1.5, "image": 4.0}
    assert etas(result, "fast") == pytest.approx(truth, rel=5e-3)
    assert etas(result, "fast", "heldout, choice") == pytest.approx(truth, rel=2e-3)
    page = (tmp_path / "out" / "report.md").read_text()
    assert "| fast | overall | **2.00** | 2.00 | 1.00 | 2.00 |" in page
    assert len(re.findall(r"\| fast \| image \| \*\*(3.9[89]|4.0[01])\*\*", page)) == 2
    assert "None: the baseline has no two finished budgets" in page
    assert "None: a power law needs at least 3 sizes" in page and "Nothing: every run is finished." in page
    final = power(2.0)(0.9 * (end := flops_per_token(jobs(fast)[0].config) * UPDATES * PER_UPDATE), end)
    assert f"| fast | {final:.4f} |" in page and f"| {1.0:.4f} | {UPDATES * PER_UPDATE:,} |" in page
    assert "`moma train fast-0`" in page and "c0ffee" in page and "Versions (1): jax 0.10." in page


def test_figures_are_there_and_shown(fast, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "draw", figures.draw)
    write_report(fast, str(tmp_path / "out"), {})
    shown = re.findall(r"\]\((loss-.*?)\)", (tmp_path / "out" / "report.md").read_text())
    assert shown == ["loss-flops.png", "loss-tokens.png", "loss-seconds.png"]
    for name in shown:
        pixels = np.asarray(Image.open(tmp_path / "out" / name).convert("RGB")).reshape(-1, 3)
        assert len(pixels) > 100_000 and (tmp_path / "out" / name).stat().st_size < 100_000
        assert (np.abs(pixels.astype(int) - (0, 114, 178)).sum(axis=1) < 40).sum() > 100  # the second line's blue


def test_a_worse_variant_has_eta_below_one(tmp_path):
    study = study_of(tmp_path, "slow")
    write_study(study, {"dense": same(power()), "slow": same(power(0.5))})
    result = write_report(study, str(tmp_path / "out"), {})
    assert etas(result, "slow")["overall"] == pytest.approx(0.5, rel=5e-3)
    assert etas(result, "slow", "heldout, choice")["text"] == pytest.approx(0.5, rel=2e-3)


def test_verdicts_off_finished_runs_of_the_baseline(tmp_path):
    """Losses of seeds differ, what is in their data is shared, and the truth is 1.5 over the baseline's curve."""
    study = study_of(tmp_path, "fast", "also", seeds=(0, 1, 2), budgets=(0.5, 2.0))
    speeds, shifts = {"dense": (1, 1, 1), "fast": (1.4, 1.5, 1.6), "also": (1.2, 0.8, 1.0)}, (0.0, 0.1, -0.2)
    for job in jobs(study):
        law = power(speeds[job.variant][job.seed], shifts[job.seed])
        write_run(job.config.run.dir, job.config, same(law), routings=("choice", "threshold"))
    result = write_report(study, str(tmp_path / "out"), {})
    found = {(v["variant"], v["against"], v["modality"]): v for v in result["verdicts"]}
    fast = found["fast", "dense", "overall"]
    assert list(fast["by_seed"].values()) == pytest.approx(speeds["fast"], rel=0.02), "the law is no line"
    logs = np.log(list(fast["by_seed"].values()))
    half = 4.3027 * logs.std(ddof=1) / 3**0.5
    assert np.log(fast["interval"]) == pytest.approx((logs.mean() - half, logs.mean() + half), rel=1e-3)
    assert (fast["word"], found["also", "dense", "text"]["word"]) == ("ahead", "undecided")
    ratio = found["also", "fast", "image"]
    assert ratio["ratio"] == pytest.approx((1.2 * 0.8 / 1.4 / 1.5 / 1.6) ** (1 / 3), rel=0.02)
    assert found["fast", "its text", "image"]["by_seed"] == pytest.approx({0: 1, 1: 1, 2: 1})
    page = (tmp_path / "out" / "report.md").read_text()
    shown = study_page(study, *report.compared_runs(study, {})).decode()
    assert f"<td>{fast['ratio']:.2f}</td>" in shown and "<td>ahead</td>" in shown and "9 of 9 runs" in shown
    low, high = fast["interval"]
    assert f"| fast | dense | overall | **{fast['ratio']:.2f}** | {low:.2f} to {high:.2f} | ahead |" in page
    assert "Budgets of the baseline: 0.5, 1, 2 of the study's." in page and result["finished"] == 15
    rows = csv.DictReader((tmp_path / "out" / "runs.csv").read_text().splitlines())
    budgets = {row["path"]: row["budget"] for row in rows}
    assert sorted(set(budgets.values())) == ["0.5", "1.0", "2.0"] and len(budgets) == 15


def test_verdicts_of_each_size_are_of_its_own_runs(tmp_path):
    sizes = {"small": {"model.layers": 2}, "large": {"model.layers": 4}}
    study = study_of(tmp_path, "fast", sizes=sizes, seeds=(0, 1), budgets=(0.5, 2.0))
    speeds = {"small": 1.2, "large": 1.6}
    for job in jobs(study):
        law = power() if job.variant == "dense" else power(speeds[job.size])
        write_run(job.config.run.dir, job.config, same(law), routings=("choice", "threshold"))
    found = write_report(study, str(tmp_path / "out"), {})["verdicts"]
    of_size = {v["size"]: v["ratio"] for v in found if (v["against"], v["modality"]) == ("dense", "overall")}
    assert of_size == pytest.approx(speeds, rel=0.02)


def write_documents(path, loss, routings=("choice",), modalities=("text", "image")):
    """Twenty documents of three tokens of each modality; `loss` by document and modality."""
    keys = [(routing, d) for routing in routings for d in range(20)]
    columns = {"eval_set": ["heldout"] * len(keys), "routing": [r for r, _ in keys], "store": [0] * len(keys)}
    columns["document"] = [d for _, d in keys]
    for modality in modalities:
        columns |= {f"nats_{modality}": [3 * loss(d, modality) for _, d in keys], f"tokens_{modality}": [3] * len(keys)}
    Path(path, "documents.parquet").write_bytes(to_bytes([pa.table(columns)]))


def test_documents_are_paired_by_routing_and_modality_whatever_their_order(tmp_path):
    """dense and plain have one routing; routed has two, and its file names modalities the other way round."""
    study = study_of(tmp_path, "plain", "routed", seeds=(0, 1))
    routed = {"routings": ("choice", "threshold")}
    write_study(study, {name: same(power()) for name in ("dense", "plain", "routed")}, routed=routed)
    gains = {"dense": (0, 0), "plain": (0.1, 0.1), "routed": (0.2, 0.4)}
    for job in jobs(study):
        text, image = gains[job.variant]
        more = {"routings": routed["routings"], "modalities": ("image", "text")} if job.variant == "routed" else {}
        write_documents(job.config.run.dir, lambda d, m, t=text, i=image: d % 5 + 2 - (t if m == "text" else i), **more)
    write_report(study, str(tmp_path / "out"), {})
    page = (tmp_path / "out" / "report.md").read_text().partition("## The same documents")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:6]] for line in page.splitlines() if "heldout" in line]
    expected = [("plain", "dense", "choice", (-0.1, -0.1, -0.1)), ("routed", "dense", "threshold", (-0.3, -0.2, -0.4)),
                ("routed", "plain", "threshold", (-0.2, -0.1, -0.3))]  # fmt: skip
    assert rows == [
        [variant, against, f"heldout, {routing}", modality, f"{difference:+.4f}"]
        for variant, against, routing, differences in expected
        for modality, difference in zip(("overall", "text", "image"), differences, strict=True)
    ]


def test_documents_of_unrouted_runs_stand_once_whatever_their_rules_are_called(tmp_path):
    study = study_of(tmp_path, "plain", seeds=(0, 1))
    write_study(study, {name: same(power()) for name in ("dense", "plain")}, plain={"routings": ("training",)})
    for job in jobs(study):
        routing = "training" if job.variant == "plain" else "choice"
        write_documents(job.config.run.dir, lambda d, m: d % 5 + 2.0, routings=(routing,))
    write_report(study, str(tmp_path / "out"), {})
    page = (tmp_path / "out" / "report.md").read_text().partition("## The same documents")[2].partition("\n## ")[0]
    assert [line.split("|")[4].strip() for line in page.splitlines() if "heldout" in line] == [
        "overall",
        "text",
        "image",
    ]


def test_documents_of_a_run_without_a_causal_routing_are_not_compared(tmp_path):
    study = study_of(tmp_path, "plain", seeds=(0, 1))
    seeing = {"routings": ("choice", "training")}
    write_study(study, {name: same(power()) for name in ("dense", "plain")}, plain=seeing)
    for job in jobs(study):
        how = seeing if job.variant == "plain" else {}
        write_documents(job.config.run.dir, lambda d, m: d % 5 + 2.0, **how)
    write_report(study, str(tmp_path / "out"), {})
    page = (tmp_path / "out" / "report.md").read_text().partition("## The same documents")[2].partition("\n## ")[0]
    assert "None: no two variants" in page


def test_an_upcycled_run_is_charged_for_its_seed(tmp_path):
    study = study_of(tmp_path)
    upcycled = Variant("up", {"model.ffn": "1t1i"}, upcycled=Upcycled({"model.ffn": "dense"}, share=0.25))
    study = dataclasses.replace(study, variants=(*study.variants, upcycled))
    dense, up = jobs(study)
    write_run(dense.config.run.dir, dense.config, same(power()))
    tokens = UPDATES // 4 * PER_UPDATE
    seed = {"seed_step": UPDATES // 4, "seed_real_tokens": tokens, "seed_wall_seconds": 0.5 * UPDATES / 4}
    seed["seed_real_flops"] = tokens * flops_per_token(up.seed_run)
    write_run(up.config.run.dir, up.config, same(power(2.0)), seed=seed)
    result = write_report(study, str(tmp_path / "out"), {})
    assert etas(result, "up")["overall"] == pytest.approx(2, rel=5e-3)
    assert etas(result, "up", "heldout, choice")["overall"] == pytest.approx(2, rel=2e-3)
    page = (tmp_path / "out" / "report.md").read_text()
    assert f"{UPDATES // 4:,} of the seed run" in page and "| 2.00 |" in page  # by wall time too


def test_routings_stand_side_by_side_and_a_dense_run_is_causal(tmp_path):
    study = study_of(tmp_path, "fast")
    routed = {"routings": ("choice", "threshold", "causal")}
    write_study(study, {"dense": same(power()), "fast": same(power(2.0))}, fast=routed)
    result = write_report(study, str(tmp_path / "out"), {})
    titles = list(dict.fromkeys(s["loss"] for s in result["speedups"]))
    assert titles == ["training", "heldout, threshold", "heldout, causal"]  # choice sees the future
    dense = {f["loss"]: f["overall"] for f in result["final"] if f["variant"] == "dense"}
    assert dense["heldout, choice"] == dense["heldout, threshold"] == dense["heldout, causal"]


def test_loads_of_rules_by_token_stand_beside_what_they_aim_at(tmp_path):
    """Means over the last tenth of the updates, 364 to 400, and over seeds."""
    fields = {"model.ffn": "2t2i", "model.router": "null", "model.router.zero": 1}
    study = study_of(tmp_path, seeds=(0, 1))
    study = dataclasses.replace(study, variants=(*study.variants, Variant("routed", fields)), tolerance=0.5)
    for job in jobs(study):
        write_run(job.config.run.dir, job.config, same(power()))
        if job.variant == "routed":
            path = Path(job.config.run.dir, "metrics.jsonl")
            records = [json.loads(line) for line in path.read_text().splitlines()]
            for record in (r for r in records if r["kind"] == "train"):
                record["routing_experts_chosen_text"] = record["step"] / 100 + job.seed
                record["routing_dropped_text"] = None if record["step"] == 364 else 0.25
                record |= {"taken_text_0": 0.1 * (1 + job.seed), "taken_text_1": 0.8, "taken_image_0": 0.0}
            path.write_text("".join(json.dumps(r) + "\n" for r in records))
    write_report(study, str(tmp_path / "out"), {})
    page = (tmp_path / "out" / "report.md").read_text()
    assert "| routed | text | 1.33333 | 4.320 | 0.250 | - | - | 2 |" in page and "| dense | text |" not in page
    assert "| routed | text | 15.0% | 10.0%, 20.0% |" in page and "| image | 0.0%" not in page


def test_rules_without_a_common_causal_routing_are_compared_by_each_ones_own(tmp_path):
    """As expert choice, whose thresholds are causal, and token choice, which is causal by nature."""
    study = study_of(tmp_path, "plain", "chosen", "tokens", seeds=(0, 1), budgets=(0.5, 2.0))
    routings = {"chosen": ("choice", "threshold"), "tokens": ("training", "causal")}
    gains = {"dense": 0.0, "plain": 0.1, "chosen": 0.2, "tokens": 0.3}
    for job in jobs(study):
        how = {"routings": routings[job.variant]} if job.variant in routings else {}
        write_run(job.config.run.dir, job.config, same(power(1 + gains[job.variant])), **how)
        write_documents(job.config.run.dir, lambda d, m, g=gains[job.variant]: d % 5 + 2 - g, **how)
    result = write_report(study, str(tmp_path / "out"), {})
    assert {v["loss"] for v in result["verdicts"]} == {"heldout, own"}
    found = {(v["variant"], v["against"]): v["ratio"] for v in result["verdicts"] if v["modality"] == "overall"}
    assert found["tokens", "chosen"] == pytest.approx(1.3 / 1.2, rel=0.02) and len(found) == 6
    assert list(dict.fromkeys(s["loss"] for s in result["speedups"])) == ["training", "heldout, own"]
    page = (tmp_path / "out" / "report.md").read_text()
    assert "| tokens | chosen | heldout, own | overall | -0.1000 |" in page
    assert "| tokens | plain | heldout, causal | overall | -0.2000 |" in page
    assert "**heldout, threshold**" in page and "**heldout, causal**" in page  # of each variant that has it


def test_a_power_law_over_three_sizes(tmp_path):
    sizes = {name: {"model.layers": layers} for name, layers in (("small", 2), ("medium", 4), ("large", 8))}
    study = study_of(tmp_path, "fast", sizes=sizes, seeds=(0, 1))
    noise = (0.01, -0.01)
    for job in jobs(study):
        law = power(2.0 if job.variant == "fast" else 1.0, noise[job.seed])
        write_run(job.config.run.dir, job.config, same(law))
    write_report(study, str(tmp_path / "out"), {})
    page = (tmp_path / "out" / "report.md").read_text()
    laws = re.findall(
        r"\| fast \| heldout, choice \| overall \| (\S+) \(.*?\) \| (\S+) \((\S+) to (\S+)\) \|(.*)", page
    )
    ((_, b, low, high, rest),) = laws
    assert float(b) == pytest.approx(0.2, abs=0.01) and float(low) < 0.2 < float(high) and "not fitted" in rest
    assert (tmp_path / "out" / "loss-flops-medium.png").is_file() and "| fast medium |" in page


def test_sizes_of_one_budget_give_no_power_law(tmp_path):
    sizes = {name: {"model.layers": layers} for name, layers in (("small", 2), ("medium", 4), ("large", 8))}
    study = study_of(tmp_path, sizes=sizes, flops=1e9, tolerance=0.05)
    write_study(study, {"dense": same(power())})
    write_report(study, str(tmp_path / "out"), {})
    assert (
        "needs at least 3 sizes of different budgets, and the baseline has 1"
        in (tmp_path / "out" / "report.md").read_text()
    )


# Files ----------------------------------------------------------------------------------------------------------------


def test_runs_csv(fast, tmp_path):
    write_report(fast, str(tmp_path / "out"), {})
    with open(tmp_path / "out" / "runs.csv") as file:
        dense, row = csv.DictReader(file)
    assert (row["variant"], row["seed"], row["state"], row["steps"]) == ("fast", "0", "complete", str(UPDATES))
    assert int(row["tokens"]) == UPDATES * PER_UPDATE and row["path"].endswith("runs/fast-0")
    assert float(row["flops"]) == pytest.approx(flops_per_token(jobs(fast)[1].config) * UPDATES * PER_UPDATE)
    end = float(row["flops"])
    assert float(row["heldout_choice_loss_image"]) == pytest.approx(power(4.0)(end, end))
    assert float(row["training_loss"]) == pytest.approx(power(2.0)(0.9 * end, end))
    assert float(row["wall_seconds"]) == 0.5 * UPDATES and float(row["tokens_per_second"]) == 2 * PER_UPDATE
    assert int(row["parameters"]) > int(dense["parameters"]) and row["command"] == "moma train fast-0"
    assert len(row["config_hash"]) == 12 != dense["config_hash"]


def test_curves_parquet_holds_every_record(fast, tmp_path):
    write_report(fast, str(tmp_path / "out"), {})
    table = pq.read_table(tmp_path / "out" / "curves.parquet").to_pydict()
    rows = [dict(zip(table, values, strict=True)) for values in zip(*table.values(), strict=True)]
    lines = Path(jobs(fast)[1].config.run.dir, "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    for kind in ("train", "eval"):
        recorded = [(r["step"], r["loss_image"]) for r in records if r["kind"] == kind]
        found = [r for r in rows if (r["variant"], r["kind"], r["modality"]) == ("fast", kind, "image")]
        assert [(r["step"], r["loss"]) for r in found] == recorded and len(found) == UPDATES / (LOG, EVAL)[
            kind == "eval"
        ]
        assert all(r["tokens"] == r["step"] * PER_UPDATE and r["seconds"] == r["step"] / 2 for r in found)
    assert {r["eval_set"] for r in rows} == {"", "heldout"} and {r["run"] for r in rows} == {
        job.config.run.dir for job in jobs(fast)
    }


def test_a_report_is_replaced_and_nothing_else_is(fast, tmp_path):
    out = tmp_path / "out"
    write_report(fast, str(out), {})
    (out / "notes.txt").write_text("mine")
    (out / "report.md").write_text("old")
    write_report(fast, str(out), {})
    assert (out / "notes.txt").read_text() == "mine" and "**2.00**" in (out / "report.md").read_text()
    other = dataclasses.replace(fast, dir=str(tmp_path / "others"))
    before = (out / "report.md").read_bytes()
    with pytest.raises(InputError, match="not of this study"):
        write_report(other, str(out), {})
    assert (out / "report.md").read_bytes() == before


def test_a_directory_of_something_else_is_refused(fast, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "runs.csv").write_text("mine")
    with pytest.raises(InputError, match="not empty and holds no report"):
        write_report(fast, str(tmp_path / "out"), {})
    assert os.listdir(tmp_path / "out") == ["runs.csv"] and (tmp_path / "out" / "runs.csv").read_text() == "mine"


def test_an_out_that_is_no_directory_is_refused(fast, tmp_path):
    (tmp_path / "out").write_text("mine")
    for out in ("out", "out/below"):
        with pytest.raises(InputError, match="--out: .* is no directory"):
            write_report(fast, str(tmp_path / out), {})
    assert (tmp_path / "out").read_text() == "mine"


# What is missing, and what is refused ---------------------------------------------------------------------------------


def test_unfinished_runs_are_listed(tmp_path):
    study = study_of(tmp_path, "fast", "late", seeds=(0, 1, 2))
    laws = {"dense": same(power()), "fast": same(power(2.0)), "late": same(power(3.0))}
    write_study(study, laws)
    places = {job.name: Path(job.config.run.dir) for job in jobs(study)}
    write_json(places["fast-1"] / "status.json", {"state": "failed", "step": 40, "total": UPDATES})
    write_json(places["fast-2"] / "status.json", {"state": "running", "step": 44, "total": UPDATES})  # was killed
    for seed in range(3):
        for file in places[f"late-{seed}"].iterdir():
            file.unlink()
    (places["dense-2"] / "summary.json").unlink()
    write_json(places["dense-2"] / "status.json", {"state": "stopped", "step": 4, "total": UPDATES})
    result = write_report(study, str(tmp_path / "out"), {})
    assert result["finished"] == 3 and [s["seeds"] for s in result["speedups"]] == [[0]] * 6
    page = (tmp_path / "out" / "report.md").read_text()
    assert f"- `{places['fast-1']}`: failed, 40 of {UPDATES} updates" in page
    assert f"- `{places['fast-2']}`: stopped, 44 of {UPDATES} updates" in page
    assert f"- `{places['late-0']}`: new, 0 of {UPDATES} updates" in page
    assert "- fast: 2 of 3 seeds missing: 1, 2" in page and "- late: 3 of 3 seeds missing: 0, 1, 2" in page


def test_added_runs_are_compared_too(fast, tmp_path):
    config = jobs(fast)[1].config
    write_run(tmp_path / "elsewhere", config, same(power(3.0)))
    seed_9 = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=9))
    write_run(tmp_path / "nine", seed_9, same(power(3.0)))
    added = {"added": f"{tmp_path}/elsewhere,{tmp_path}/nine"}
    result = write_report(fast, str(tmp_path / "out"), added)
    assert etas(result, "added")["overall"] == pytest.approx(3, rel=5e-3)
    page = (tmp_path / "out" / "report.md").read_text()
    assert "- added: not compared, for want of a baseline: seed 9" in page


def change(file, **fields):
    """A breakage of a run directory: fields of a JSON file, written as section__field."""

    def broken(path):
        value = json.loads((path / file).read_text())
        for name, new in fields.items():
            section, _, field = name.rpartition("__")
            (value[section] if section else value)[field] = new
        write_json(path / file, value)

    return broken


def metrics(edit):
    def broken(path):
        records = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in edit(records)))

    return broken


BREAKAGES = {
    "another data seed": (change("config.json", data__seed=7), "different data.*data.seed is 7 and 0"),
    "another store": (change("config.json", data__stores=[{"path": "x"}]), "data.stores is 1 items and 0 items"),
    "other batches": (change("config.json", train__batch_rows=16), "train.batch_rows is 16 and 8"),
    "other held-out rows": (change("config.json", train__eval_sets=[]), "train.eval_sets is 0 items and 1 items"),
    "other data of another seed": (
        change("config.json", data__seed=7, train__seed=7, data__sequence=32),
        "different data.*data.sequence is 32 and 16",
    ),
    "no object": (change("config.json", model=3), "config.json: model: expected an object"),
    "no device": (change("summary.json", device="x"), "summary.json: device: expected an object"),
    "no number": (change("status.json", step="x"), "status.json: step: expected int, found 'x'"),
    "last evaluation lost": (
        metrics(lambda rs: [r for r in rs if r["kind"] == "train" or r["step"] < UPDATES]),
        r"the records of heldout \(choice\) end at step 380 of 400",
    ),
    "last losses lost": (metrics(lambda rs: rs[:-2]), "the records of training end at step 396 of 400"),
    "not JSON": (lambda path: (path / "summary.json").write_text("{"), "summary.json: not JSON"),
    "no metrics": (lambda path: (path / "metrics.jsonl").unlink(), "complete run without training losses"),
    "no summary": (lambda path: (path / "summary.json").unlink(), "complete run without summary.json"),
    "another schema": (metrics(lambda rs: [r | {"schema": 2} for r in rs]), "schema 2; this moma_jax reads 1"),
    "no FLOPs": (metrics(lambda rs: [{k: v for k, v in r.items() if k != "flops"} for r in rs]), "step 4: no flops"),
    "no record": (lambda path: (path / "metrics.jsonl").write_text("7\n"), "line 1: expected Record, found 7"),
    "steps fall": (metrics(lambda rs: rs[::-1]), "steps do not rise"),
    "more FLOPs": (metrics(lambda rs: [r | {"flops": 1.02 * r.get("flops", 0)} for r in rs]), "unequal budgets"),
    "no ancestry": (lambda path: (path / "ancestry.json").write_text("{}"), "ancestry.json: seed_step: is missing"),
}


@pytest.mark.parametrize("name", BREAKAGES)
def test_what_cannot_be_compared_is_refused(fast, tmp_path, name):
    breakage, message = BREAKAGES[name]
    write_run(tmp_path / "added", jobs(fast)[1].config, same(power(3.0)))
    assert write_report(fast, str(tmp_path / "whole"), {"added": str(tmp_path / "added")})["finished"] == 3
    breakage(tmp_path / "added")
    with pytest.raises(InputError, match=message) as error:
        write_report(fast, str(tmp_path / "out"), {"added": str(tmp_path / "added")})
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["not JSON", "no metrics", "steps fall", "more FLOPs", "no number"])
def test_so_it_is_in_a_run_of_the_study(fast, tmp_path, name):
    breakage, message = BREAKAGES[name]
    breakage(Path(fast.dir) / "fast-0")
    with pytest.raises(InputError, match=message):
        write_report(fast, str(tmp_path / "out"), {})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("fields", [{"model__ffn": "2t2i"}, {"optimizer__peak_lr": 1.0}, {"train__seed": 5}])
def test_a_run_of_another_config_in_the_study(fast, tmp_path, fields):
    change("config.json", **fields)(Path(fast.dir) / "fast-0")
    with pytest.raises(InputError, match=r"fast-0 holds a run with another config \(.* -> .*\); change the study back"):
        write_report(fast, str(tmp_path / "out"), {})
    assert not (tmp_path / "out").exists()


def test_a_run_in_format_1_is_the_studys_where_its_routing_is(fast, tmp_path):
    path = Path(jobs(fast)[1].config.run.dir) / "config.json"
    config = json.loads(path.read_text()) | {"format_version": 1}
    del config["model"]["router"]
    write_json(path, config)
    assert write_report(fast, str(tmp_path / "out"), {})["finished"] == 2
    change("config.json", model__routing="threshold")(path.parent)
    with pytest.raises(InputError, match="holds a run with another config .model.router: .*threshold.* -> "):
        write_report(fast, str(tmp_path / "again"), {})


def test_settings_that_change_no_data_may_differ(fast, tmp_path):
    path = Path(jobs(fast)[1].config.run.dir)
    change("config.json", data__prefetch=9, data__cache_bytes=5, train__log_every=7)(path)
    assert write_report(fast, str(tmp_path / "out"), {})["finished"] == 2


def test_a_record_is_added_like_the_run_that_it_is_of(fast, tmp_path):
    job = jobs(fast)[1]
    write_run(tmp_path / "elsewhere", job.config, same(power(3.0)))
    placed = dataclasses.replace(job.config, run=dataclasses.replace(job.config.run, dir=str(tmp_path / "elsewhere")))
    keep(str(tmp_path / "records"), dataclasses.replace(job, config=placed))
    results = [
        write_report(fast, str(tmp_path / f"out-{n}"), {"added": str(path)})
        for n, path in enumerate((tmp_path / "elsewhere", tmp_path / "records" / "elsewhere.zip"))
    ]
    assert results[0] == results[1] and results[0]["finished"] == 3


def test_added_runs_that_are_refused(fast, tmp_path):
    config = jobs(fast)[1].config
    write_run(tmp_path / "elsewhere", config, same(power(3.0)))
    write_run(tmp_path / "empty", config, same(power(3.0)))
    (tmp_path / "empty" / "metrics.jsonl").unlink()
    write_json(tmp_path / "empty" / "status.json", {"state": "failed", "step": 0, "total": 5})
    cases = {
        "nowhere": ({"new": f"{tmp_path}/nowhere"}, "no run directory"),
        "empty": ({"new": f"{tmp_path}/empty"}, "no metrics"),
        "taken": ({"fast": f"{tmp_path}/elsewhere"}, "is a variant of the study"),
        "twice": ({"new": f"{tmp_path}/elsewhere,{tmp_path}/elsewhere"}, "have the seed 0"),
    }
    for added, message in cases.values():
        with pytest.raises(InputError, match=message):
            write_report(fast, str(tmp_path / "out"), added)
    assert not (tmp_path / "out").exists()


def test_no_finished_baseline(fast, tmp_path):
    change("status.json", state="stopped")(Path(jobs(fast)[0].config.run.dir))
    with pytest.raises(InputError, match="no finished run of dense"):
        write_report(fast, str(tmp_path / "out"), {})


# The command, and runs that were trained ------------------------------------------------------------------------------

STUDY_FILE = """
import json
from moma_jax.config_json import from_json
from moma_jax.studies import Study, Variant

def study():
    base = from_json(json.load(open({runs!r} + "/dense-0/config.json")))
    variants = tuple(Variant(name, {{"model.ffn": ffn}}) for name, ffn in (("dense", "dense"), ("fast", "1t1i")))
    return Study(base, variants, tokens={tokens}, dir={runs!r})
"""


@pytest.mark.slow
def test_the_command_writes_beside_the_runs_and_asks_for_no_device(fast, tmp_path, capsys):
    file = tmp_path / "first.py"
    file.write_text(STUDY_FILE.format(runs=fast.dir, tokens=fast.tokens))
    words = [sys.executable, "-m", "moma_jax", "study", str(file), "--report"]
    done = subprocess.run(words, env=os.environ | {"JAX_PLATFORMS": "no_such_device"}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    made = Path(fast.dir) / "report-first"
    assert {p.name for p in made.iterdir()} == {"report.md", "report.json", "runs.csv", "curves.parquet"} | {
        f"loss-{axis}.png" for axis in figures.AXES
    }
    before = (made / "report.md").read_bytes()
    with pytest.raises(SystemExit, match="2"):
        main(["study", str(file), "--report", "--add", f"new={tmp_path}/nowhere"])
    assert len(capsys.readouterr().err.splitlines()) == 1 and (made / "report.md").read_bytes() == before


@pytest.mark.slow
def test_a_run_that_was_trained(tmp_path):
    study = Study(tiny(), (Variant("2t2i", {}),), "2t2i", tokens=8 * PER_UPDATE, dir=str(tmp_path / "runs"))
    train(jobs(study)[0].config, quiet=True)
    result = write_report(study, str(tmp_path / "out"), {})
    assert result["finished"] == 1 and result["speedups"] == []
    finals = {f["loss"]: f["image"] for f in result["final"]}
    summary = json.loads((tmp_path / "runs" / "2t2i-0" / "summary.json").read_text())
    for routing in ("choice", "threshold"):
        assert finals[f"heldout, {routing}"] == summary["eval"]["heldout"][routing]["loss_image"]
    assert finals["training"] == pytest.approx(summary["final"]["loss_image"], rel=1e-6)
    assert "No other variant has a finished run" in (tmp_path / "out" / "report.md").read_text()
