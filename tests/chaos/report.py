"""The campaign's page: how many faults, by command and kind, and what became of them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from verdicts import EQUAL, LOST, REFUSED

from moma_jax.runs.directory import commit, processor, versions

OUTCOMES = (EQUAL, REFUSED, LOST)
Record = dict[str, Any]

PAGE = """# Reliability: {count} faults

Commands were killed, stopped, starved of disk and memory, cut off from their store, restarted on other devices, given
damaged files and wrong clocks, at random moments, and run again until they were done. Then everything they had left was
compared with an undisturbed run: arrays and cursor of every checkpoint, every record, every file of a store, bit for
bit (what clocks say apart; after a restart on other devices cursors and steps exactly, losses within 0.2%).

```sh title="as root, who may mount small disks; an hour or two"
{command}
```

Seed {seed}; each fault's command, kind and moment follow from the seed and its number. All outcomes are lines of
[faults.jsonl](reliability/faults.jsonl). {machine}; {seconds:,.0f} seconds on one core that
other programs used, too; package of commit {commit};
{versions}.

- *equal*: the fault went by unnoticed, or the same command, run again, ended as the undisturbed one.
- *refused, then equal*: the command ended with one line that says what happened; after its remedy (or once the disk
  had room again) the same command ended as the undisturbed one.
- *lost*: a traceback, no end within {deadlines[0]:.0f} seconds ({deadlines[1]:.0f} with a bucket or a wrong clock), a
  refusal without a remedy, or silently another result.

{by_command}

## By kind of fault

{by_kind}

## What was lost

{lost}
{found}"""


def write_report(out: Path, seed: int, deadlines: tuple[float, float]) -> None:
    """Writes OUT.md beside the folder with the records; OUT/found.txt, where somebody wrote it, is its end."""
    records = [json.loads(line) for line in (out / "faults.jsonl").read_text().splitlines()]
    records = [record for record in records if record["outcome"] in OUTCOMES]
    last = max((record["fault"] for record in records), default=0) + 1
    told = {
        "count": len(records),
        "command": f"python tests/chaos/campaign.py --seed {seed} --faults {last}",
        "seed": seed,
        "machine": processor(),
        "seconds": sum(record["seconds"] for record in records),
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items() if name != "moma_jax"),
        "commit": (commit() or "unknown")[:9],
        "deadlines": deadlines,
        "by_command": _table("command", records, lambda record: record["command"]),
        "by_kind": _table("command | fault", records, lambda record: f"{record['command']} | {record['kind']}"),
        "lost": _lost(records),
        "found": found.read_text() if (found := out / "found.txt").exists() else "",
    }
    out.with_name(f"{out.name}.md").write_text(PAGE.format(**told))


def _table(head: str, records: list[Record], key: Callable[[Record], str]) -> str:
    rows = sorted({key(record) for record in records})
    counts = Counter((key(record), record["outcome"]) for record in records)
    lines = [f"| {head} | injected | " + " | ".join(OUTCOMES) + " |", "|---" * (head.count("|") + 5) + "|"]
    for row in rows:
        cells = [counts[row, outcome] for outcome in OUTCOMES]
        lines.append(f"| {row} | {sum(cells)} | " + " | ".join(map(str, cells)) + " |")
    totals = [sum(counts[row, outcome] for row in rows) for outcome in OUTCOMES]
    blank = " |" * head.count("|")
    lines.append(f"| all{blank} | {sum(totals)} | " + " | ".join(map(str, totals)) + " |")
    return "\n".join(lines)


def _lost(records: list[Record]) -> str:
    lines = []
    for record in records:
        if record["outcome"] == LOST:
            told = ", ".join(f"{name} {value}" for name, value in record["told"].items())
            why = " ".join(record["why"].split()).replace("|", "/")
            where = f"{record['command']}, {record['kind']}, at {record['moment']} ({told})"
            lines.append(f"- {record['fault']}: {where}: {why}")
    return "\n".join(lines) or "Nothing."
