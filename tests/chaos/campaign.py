"""A campaign of faults: kills, full and failing disks, damaged files, wrong clocks, at random moments of real commands.

    python tests/chaos/campaign.py --seed 1 --faults 200 --out docs/results/reliability

Each fault's kind, command and moment come from the seed and the fault's number. Its outcome is a line of
OUT/faults.jsonl; run again, the campaign goes on after the last line. OUT.md is written at the end. Best as root, who
may mount small disks.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
for _path in (ROOT, ROOT / "tests" / "helpers", Path(__file__).parent):
    sys.path.insert(0, str(_path))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(_path), os.environ.get("PYTHONPATH"))))
HOME = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moma_jax" / "chaos"
"""Inputs, undisturbed runs, compiled programs, and the place of the fault that is on."""
os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",  # compiling would take most of the time
    "JAX_COMPILATION_CACHE_DIR": str(HOME / "compiled"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    "OPENBLAS_NUM_THREADS": "1",  # before a fork there may be one thread alone
}
os.environ.pop("XLA_FLAGS", None)

import verdicts  # noqa: E402
from faults import FAKETIME, KINDS, Fault, FileLimit, Scene, can_mount, mount, unmount  # noqa: E402
from report import write_report  # noqa: E402
from subjects import DEADLINE, FAR_DEADLINE, SUBJECTS, Moment, Subject, make_inputs, reference  # noqa: E402
from victims import LOOK, import_all  # noqa: E402

ANYWHERE = {"SIGKILL": 5, "SIGTERM": 3, "SIGSTOP": 2}
DISKS = {"disk full": 4, "disk read-only": 2, "size limit": 2}
DAMAGE = {"flipped byte: checkpoint": 3}
WEIGHTS: dict[str, tuple[int, dict[str, int]]] = {
    "prepare": (42, {**ANYWHERE, **DISKS, "clock": 1, "memory limit": 2}),
    "train": (32, {**ANYWHERE, **DISKS, **DAMAGE, "flipped byte: records": 1, "flipped byte: store": 2, "clock": 2,
                   "memory limit": 2, "NaN": 1, "restart on 8 devices": 1, "restart with 2 processes": 1}),
    "train, routed": (3, {**ANYWHERE, "disk full": 2, **DAMAGE}),
    "train, 2 processes": (4, {**ANYWHERE, "disk full": 2, "restart with 1 process": 1}),
    "train, bucket": (8, {**ANYWHERE, "store stopped": 2, "store gone": 2, "store 503 and cut": 2}),
    "launcher": (1, {"SIGKILL": 1, "SIGTERM": 1, "SIGSTOP": 1}),
    "routers fit": (4, {**ANYWHERE, "disk full": 2, **DAMAGE}),
    "study": (2, {**ANYWHERE, "disk full": 2}),
    "codec train": (8, {**ANYWHERE, **DISKS, **DAMAGE, "clock": 1}),
    "generate": (6, {**ANYWHERE, "disk full": 3, "disk read-only": 1, "flipped byte: checkpoint": 3}),
}  # fmt: skip
"""How often each command is disturbed, and by what."""


def planned(seed: int, number: int) -> tuple[random.Random, Subject, Fault]:
    """The draw, the command and the kind of a fault."""
    draw = random.Random(f"{seed}/{number}")
    name = draw.choices(list(WEIGHTS), [weight for weight, _ in WEIGHTS.values()])[0]
    kinds = WEIGHTS[name][1]
    return draw, SUBJECTS[name], KINDS[draw.choices(list(kinds), list(kinds.values()))[0]]


def inject(draw: random.Random, subject: Subject, fault: Fault) -> dict[str, Any]:
    """One fault, from an empty place to its verdict; one that came too late is tried again, some moments earlier."""
    for _ in range(4):
        began = time.monotonic()
        scene = _furnished(draw, subject, fault)
        with subject.store(*scene.server) as scene.bucket:
            try:
                moment, struck = _struck(scene, fault)
                if struck:
                    verdict = verdicts.judge(scene, fault)
                    found = {"moment": moment, "told": scene.told, "codes": [victim.code for victim in scene.victims]}
                    return found | verdict._asdict() | {"seconds": round(time.monotonic() - began, 1)}
            finally:
                for victim in scene.victims:
                    victim.end()
                unmount(scene.place)
    return {"outcome": "not injected"}


def _furnished(draw: random.Random, subject: Subject, fault: Fault) -> Scene:
    place = HOME / "place"
    unmount(place)
    for folder in (place, HOME / "logs", HOME / "moved"):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    if fault.disk:
        mount(HOME, place)
    scene = Scene(subject, HOME, place, draw, list(subject.words))
    subject.furnish(place, HOME, own=fault.own)
    if fault.restarts and subject.halfway:
        scene.halfway = draw.choice(subject.halfway)
    if fault.kind != "NaN" and scene.halfway is not None:
        subject.begin_halfway(place, HOME, scene.halfway)
    fault.arrange(scene)
    if fault.disk:
        os.sync()  # what lay there before is not what the fault is about
    return scene


def _struck(scene: Scene, fault: Fault) -> tuple[str, bool]:
    """Starts the command and strikes; the moment, and whether the command was still there."""
    moment: Moment = scene.draw.choice(scene.subject.moments)
    delay = scene.draw.uniform(0, moment.spread)
    scene.victims = scene.subject.begin(scene.place, HOME / "logs" / "disturbed", scene.words, **scene.settings)
    if fault.restarts:
        return "restart" if scene.halfway is not None else "start", True
    first, end = scene.victims[0], time.monotonic() + scene.subject.deadline
    while first.alive() and not moment.seen(scene.place, first):
        if time.monotonic() > end:
            return moment.name, True  # the verdict says that it hangs
        time.sleep(LOOK)
    first.wait(delay)
    if not first.alive():
        return moment.name, False
    scene.told["delay"] = round(delay, 3)
    fault.strike(scene)
    return moment.name, True


def main() -> None:
    """The command line."""
    options = _options()
    options.out.mkdir(parents=True, exist_ok=True)
    record = options.out / "faults.jsonl"
    done = {json.loads(line)["fault"] for line in record.read_text().splitlines()} if record.exists() else set()
    import_all()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends what is being disturbed, too
    if not (HOME / "inputs").exists():
        make_inputs(HOME)
    mounted = can_mount(HOME)
    for number in range(options.faults):
        draw, subject, fault = planned(options.seed, number)
        if number in done or (options.only and not {subject.name, fault.kind} & set(options.only.split("/"))):
            continue
        if fault.disk and not mounted:
            fault = FileLimit()
        if fault.kind == "clock" and not FAKETIME.exists():
            continue
        reference(subject, HOME)
        found = inject(draw, subject, fault)
        line = {"seed": options.seed, "fault": number, "command": subject.name, "kind": fault.kind, **found}
        with record.open("a") as file:
            file.write(json.dumps(line) + "\n")
        where = f"{subject.name}, {fault.kind}, at {found.get('moment')}"
        print(f"{number + 1}/{options.faults} {where}: {found['outcome']} {found.get('why', '')}", flush=True)
        if found["outcome"] == verdicts.LOST and not options.forget:
            _keep(options.out, number)
    write_report(options.out, options.seed, (DEADLINE, FAR_DEADLINE))


def _keep(out: Path, number: int) -> None:
    """What a lost command said, to look at."""
    shutil.copytree(HOME / "logs", HOME / "lost" / f"{out.name}-{number}", dirs_exist_ok=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "reliability")
    parser.add_argument("--only", help="these commands or kinds alone, such as prepare/SIGKILL")
    parser.add_argument("--forget", action="store_true", help="do not keep the output of lost commands")
    return parser.parse_args()


if __name__ == "__main__":
    main()
