"""Whether intervals hold the truth as often as they say, by the noise of the runs that docs/results keeps."""

import numpy as np
import pyarrow.parquet as pq
import pytest
from paths import ROOT

from moma_jax.evaluation.documents import read_documents
from moma_jax.runs.directory import RunDir
from moma_jax.studies.records import read_record, write_run
from moma_jax.studies.verdicts import document_interval, etas, verdict

STUDIES = ROOT / "docs" / "results" / "studies"
BUDGETS = np.array([0.5, 0.71, 1.0, 1.41, 2.0])


def law(budget):
    """Like dense runs of the study: some 3% less loss for twice the FLOPs, falling ever more slowly."""
    return 1.4 + 0.75 * np.asarray(budget) ** -0.13


@pytest.fixture(scope="module")
def residuals():
    """Final held-out losses of finished runs, less their mean over the seeds of a variant, as wide as single runs are.

    Of every study whose report is kept; losses of one scale, so that they can be pooled.
    """
    found = []
    for path in sorted(STUDIES.glob("*/curves.parquet")):
        rows = pq.read_table(path).to_pylist()
        rows = [r for r in rows if (r["kind"], r["modality"]) == ("eval", "") and r["routing"] != "causal"]
        last = {(r["variant"], r["size"], r.get("budget", 1.0), r["routing"], r["seed"]): r["loss"] for r in rows}
        cells = {}
        for (*place, _), loss in last.items():
            cells.setdefault(tuple(place), []).append(loss)
        for losses in (np.array(own) for own in cells.values() if len(own) > 1):
            found.append((losses - losses.mean()) * (len(losses) / (len(losses) - 1)) ** 0.5)
    return np.concatenate(found)


@pytest.mark.parametrize("seeds", [3, 5, 10])
@pytest.mark.parametrize("truth", [1.0, 1.3])
def test_t_intervals_hold_the_truth_as_often_as_they_say(residuals, seeds, truth):
    assert len(residuals) >= 12 and 0.001 < residuals.std() < 0.05
    rng, held = np.random.default_rng(seeds), []
    for _ in range(1000):
        noise_SB, noise_S = rng.choice(residuals, (seeds, len(BUDGETS))), rng.choice(residuals, seeds)
        ladder = {s: (BUDGETS, law(BUDGETS) + noise_SB[s]) for s in range(seeds)}
        result = verdict(etas(ladder, {s: (1.0, float(law(truth)) + noise_S[s]) for s in range(seeds)}))
        if result.interval is not None:  # none is printed where a seed is beyond the budgets
            held.append(result.interval[0] <= truth <= result.interval[1])
    assert len(held) > 500 and 0.92 <= np.mean(held) <= 0.98


def test_intervals_over_documents_hold_the_truth_as_often_as_they_say(tmp_path):
    """Held-out sets drawn from the documents of a real one, as if these were all that there are."""
    losses = []
    for name in ("1t1i-trial-0.01", "1t1i-trial-0.02"):
        write_run(read_record(STUDIES / "runs" / f"{name}.zip"), str(tmp_path / name))
        losses.append(read_documents(RunDir(str(tmp_path / name)))["tuning", "choice"])
    names = sorted(losses[0].keys() & losses[1].keys())
    cells = np.array([[np.sum(list(of_run[name].values()), axis=0) for name in names] for of_run in losses])
    nats_D, other_D, weight_D = cells[0, :, 0], cells[1, :, 0], cells[0, :, 1]
    truth, _ = document_interval(nats_D, other_D, weight_D)
    assert truth == pytest.approx((nats_D - other_D).sum() / weight_D.sum()) and len(names) > 80
    rng, held = np.random.default_rng(0), 0
    for _ in range(400):
        drawn = rng.integers(0, len(names), len(names))
        low, high = document_interval(nats_D[drawn], other_D[drawn], weight_D[drawn])[1]
        held += low <= truth <= high
    assert 0.92 <= held / 400 <= 0.98
