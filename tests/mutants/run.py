"""Ten faults, one at a time in a copy of the repository: do the tests notice?

    python tests/mutants/run.py [NAME...] [--tier fast | slow | all] [--whole]

By default the fast tests of the files in the table are run for every mutant, with --whole those of all files. Ends with
exit code 1 where a mutant survived, and refuses to start where a snippet no longer stands exactly once in its file.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
TIERS = {"fast": "not slow", "slow": "slow", "all": ""}


class Mutant(NamedTuple):
    """`old` becomes `new` in a file of moma_jax/; `tests` are the files that should notice."""

    name: str
    file: str
    old: str
    new: str
    tests: str


MUTANTS = (
    Mutant(
        "quota off by one",
        "router.py",
        "return whole * over + (rest * over",
        "return 1 + whole * over + (rest * over",
        "model/test_routing.py",
    ),
    Mutant(
        "causal mask flipped",
        "model/blockwise.py",
        "position_BQ[:, :, None] >= position_BS[:, None, :]",
        "position_BQ[:, :, None] <= position_BS[:, None, :]",
        "model/test_attention.py",
    ),
    Mutant(
        "gate forgotten under auxiliary routing",
        "routers/choice.py",
        "enters_NE = score.predicted_TE > 0  # their sigmoid exceeds 0.5",
        "return score.predicted_TE > 0, jnp.ones_like(score.logit_TE)",
        "model/test_causal.py",
    ),
    Mutant(
        "z-loss with the wrong sign",
        "training/objective.py",
        "pull_N = 1 + 2 * settings.z_loss",
        "pull_N = 1 - 2 * settings.z_loss",
        "training/test_objective.py",
    ),
    Mutant(
        "a token of another modality is eligible",
        "model/moe.py",
        "eligible_GT = eligible(own.group, tokens.modality_GT)",
        "eligible_GT = eligible(own.group, tokens.modality_GT).at[:, 0].set(True)",
        "model/test_experts.py",
    ),
    Mutant(
        "cursor one group late",
        "data/stream.py",
        '{"group": np.array(self._group, np.int64)',
        '{"group": np.array(self._group - 1, np.int64)',
        "data/test_stream.py",
    ),
    Mutant(
        "accumulation by the mean of means",
        "training/step.py",
        "value = total / weight",
        "value = total / (accumulate * jnp.sum(micro.weight_BS))",
        "training/test_step.py",
    ),
    Mutant(
        "thresholds move the wrong way",
        "routers/choice.py",
        "surplus_E = jnp.clip(loads(state) - 1.0, -1.0, 1.0)",
        "surplus_E = jnp.clip(1.0 - loads(state), -1.0, 1.0)",
        "model/test_causal.py",
    ),
    Mutant(
        "weight decay on norms",
        "training/optimizer.py",
        'NOT_DECAYED = ("scale", "bias", "codebook")',
        'NOT_DECAYED = ("bias", "codebook")',
        "training/test_optimizer.py",
    ),
    Mutant(
        "cache written at the wrong place",
        "model/attention.py",
        "slot_BQ, key_position_BP = position_BQ, jnp.broadcast_to",
        "slot_BQ, key_position_BP = position_BQ + 1, jnp.broadcast_to",
        "model/test_decode.py",
    ),
)


def mutated(mutant: Mutant) -> str:
    """The file's text with the fault in it."""
    text = (ROOT / "moma_jax" / mutant.file).read_text()
    if (count := text.count(mutant.old)) != 1:
        raise SystemExit(f"{mutant.name}: {mutant.old!r} stands {count} times in moma_jax/{mutant.file}, not once")
    return text.replace(mutant.old, mutant.new)


def caught_by(copy: Path, files: list[str], tier: str) -> str | None:
    """The first test that fails; None where all pass."""
    words = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "--tb=no",
        "-rfE",
        "-p",
        "no:cacheprovider",
        "-m",
        TIERS[tier],
        *files,
    ]
    done = subprocess.run(words, cwd=copy, capture_output=True, text=True)
    if done.returncode == 0:
        return None
    found = re.search(r"^(?:FAILED|ERROR) (?:tests/)?(\S+)", done.stdout, re.MULTILINE)
    if found is None:
        raise SystemExit(f"pytest ended with exit code {done.returncode}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return found[1]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help="mutants by name, or a part of it")
    parser.add_argument("--tier", choices=TIERS, default="fast")
    parser.add_argument("--whole", action="store_true", help="all files, not those of the table")
    given = parser.parse_args()
    chosen = [m for m in MUTANTS if not given.names or any(name in m.name for name in given.names)]
    texts = [mutated(m) for m in chosen]
    survived = 0
    with tempfile.TemporaryDirectory() as home:
        copy = Path(home) / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "__pycache__", "*.egg-info"))
        print(f"| mutant | caught by the {given.tier} tests | seconds |\n|---|---|---|", flush=True)
        for mutant, text in zip(chosen, texts, strict=True):
            path, start = copy / "moma_jax" / mutant.file, time.monotonic()
            before = path.read_text()
            path.write_text(text)
            files = [] if given.whole else [f"tests/{name}" for name in mutant.tests.split()]
            test = caught_by(copy, files, given.tier)
            path.write_text(before)
            survived += test is None
            print(f"| {mutant.name} | {test or '**nothing**'} | {time.monotonic() - start:.0f} |", flush=True)
    raise SystemExit(survived > 0)


if __name__ == "__main__":
    main()
