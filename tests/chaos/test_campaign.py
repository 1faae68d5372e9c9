"""The campaign itself: a fault of three kinds each, and a second call that finds them done."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CAMPAIGN = Path(__file__).with_name("campaign.py")


@pytest.mark.slow
def test_three_faults_are_survived_recorded_and_not_injected_twice(tmp_path):
    words = [sys.executable, CAMPAIGN, "--seed", "1092", "--faults", "3"]
    words = [*map(str, words), "--out", str(tmp_path / "found")]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    for _ in range(2):
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
        records = [json.loads(line) for line in (tmp_path / "found" / "faults.jsonl").read_text().splitlines()]
        assert [record["fault"] for record in records] == [0, 1, 2]
        assert {record["outcome"] for record in records} <= {"equal", "refused, then equal"}, records
    assert "| prepare |" in (tmp_path / "found.md").read_text()
