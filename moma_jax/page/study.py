"""The page of a study: its verdicts, and the first run of every variant side by side."""

from __future__ import annotations

from moma_jax.page import curves
from moma_jax.page.reading import Seen, read_seen
from moma_jax.page.write import Section, page, plot, table
from moma_jax.studies.comparison import Decided, Finished, decided
from moma_jax.studies.curves import Run
from moma_jax.studies.study import Study

RULE = (
    "Eta off the curve through finished runs of the baseline, by the final held-out loss under causal routing; ahead "
    "or behind where the 95% interval over seeds lies on one side of 1."
)


def study_page(study: Study, runs: list[Run], finished: Finished) -> bytes:
    """The HTML of a study; the runs and `Finished` are those of `compared_runs`."""
    verdicts = decided(finished)
    content = plot("verdicts", curves.verdicts(verdicts)) + (_table(verdicts) if verdicts else "")
    counted = f"{len(finished.runs)} of {sum(run.budget == 1 for run in runs)} runs of the budget are finished."
    section = Section("verdicts", "Verdicts", f"{RULE} {counted}", content or "<p>None yet.</p>")
    return page(f"Study {study.dir}", _first_runs(finished), [section])


def _first_runs(finished: Finished) -> list[Seen]:
    sizes = {size for size, _ in finished.by_place}
    return [
        read_seen(next(iter(group.values())).path, f"{variant} {size}" if len(sizes) > 1 else variant)
        for (size, variant), group in finished.by_place.items()
    ]


def _table(verdicts: list[Decided]) -> str:
    rows = []
    for each in verdicts:
        low_high = each.verdict.interval
        interval = "none" if low_high is None else f"{low_high[0]:.2f} to {low_high[1]:.2f}"
        seeds = ", ".join(f"{seed}: {ratio:.2f}" for seed, ratio in each.verdict.by_seed.items())
        ratio = f"{each.verdict.bound} {each.verdict.ratio:.2f}".strip()
        about = [f"{each.variant} {each.size}".strip(), each.against, each.loss.title, each.modality or "overall"]
        rows.append([*about, ratio, interval, each.verdict.word, seeds])
    return table(["variant", "against", "loss", "modality", "ratio of etas", "95%", "verdict", "by seed"], rows)
