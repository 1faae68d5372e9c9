"""What became of a command after a fault: equal, refused and then equal, or lost."""

from __future__ import annotations

import re
import shutil
import time
from pathlib import Path
from typing import NamedTuple

import digests
from faults import Fault, Scene
from subjects import reference
from victims import LOOK, Victim

EQUAL, REFUSED, LOST = "equal", "refused, then equal", "lost"
MOST_RUNS, GRACE = 8, 60.0
NEAR = 2e-3
"""Share by which losses may differ on other devices, where sums have other orders."""


class Verdict(NamedTuple):
    """The outcome, why where it is `lost`, and the lines with which the command refused."""

    outcome: str
    why: str
    lines: list[str]


class Lost(Exception):
    """Nothing more can be hoped for."""


def judge(scene: Scene, fault: Fault) -> Verdict:
    """Waits for the disturbed command, mends the fault, runs the command until it is done and compares what it made."""
    lines: list[str] = []
    try:
        codes = _ended(scene.victims, max(scene.subject.deadline, fault.deadline), fault, lines)
        fault.mend(scene)
        scene.settings.clear()
        if fault.own:
            _remedy(lines, scene)
        if any(codes):
            _run_to_the_end(scene, lines)
        _compare(scene, fault)
    except Lost as lost:
        return Verdict(LOST, str(lost), lines)
    return Verdict(REFUSED if lines else EQUAL, "", lines)


def _run_to_the_end(scene: Scene, lines: list[str]) -> None:
    """The same command, with the remedy that a refusal names, until it is done."""
    for attempt in range(MOST_RUNS):
        victims = scene.subject.begin(scene.place, scene.home / "logs" / f"again-{attempt}", scene.words)
        refusals: list[str] = []
        if not any(_ended(victims, scene.subject.deadline, None, refusals)):
            return
        lines += refusals
        _remedy(refusals, scene)
    raise Lost(f"refused {MOST_RUNS} times: {lines[-1:]}")


def _ended(victims: list[Victim], deadline: float, fault: Fault | None, lines: list[str]) -> list[int]:
    """Exit codes; what was refused goes to `lines`. Lost: a hang, a traceback, a death of another cause."""
    _wait_for(victims, deadline)
    deaths = fault.deaths if fault is not None else frozenset()
    if len(victims) > 1 and fault is not None:
        deaths |= {-6, -9}  # JAX's runtime aborts those whose partner is gone
    for victim in victims:
        complaint, code = victim.complaint(), victim.code
        if "Traceback (most recent call last)" in complaint:
            raise Lost(f"a traceback, ending in: {complaint.strip().splitlines()[-1][:300]}")
        if code < 0 and code not in deaths:
            raise Lost(f"died of signal {-code}: {complaint.strip()[-300:]}")
        said = [line for line in complaint.splitlines() if line.startswith(("moma: ", "local.sh: "))]
        if code in (1, 2) and not said:
            raise Lost(f"exit code {code} without a line: {complaint.strip()[-300:]}")
        if code in (1, 2):
            own = [line for line in said if line.startswith("moma: ")]  # a launcher's last line refers to it
            lines += (own or said)[-1:]
    return [victim.code for victim in victims]


def _wait_for(victims: list[Victim], deadline: float) -> None:
    """Until all have ended. Of several, those that outlive the first by GRACE seconds are killed, as launchers do."""
    end, first = time.monotonic() + deadline, None
    while any(alive := [victim.alive() for victim in victims]):
        now = time.monotonic()
        first = now if first is None and not all(alive) else first
        if now > end or (first is not None and now > first + GRACE):
            for victim in victims:
                victim.end()
            if first is None:
                raise Lost(f"hangs: no end within {deadline:.0f} s")
        time.sleep(LOOK)


def _compare(scene: Scene, fault: Fault) -> None:
    subject, digest = scene.subject, digests.loosely if fault.layout else None
    wanted = reference(subject, scene.home)
    if scene.bucket is not None:
        scene.bucket.fetch(subject.makes, scene.place)
    try:
        if fault.layout:
            wanted = subject.digested(scene.home / "reference" / subject.name / subject.makes, scene.home, digest)
        found = subject.digested(scene.folder, scene.home, digest)
    except RuntimeError as error:
        raise Lost(str(error)) from error
    if differing := digests.differences(found, wanted, NEAR if fault.layout else 0.0):
        raise Lost(f"{len(differing)} of {len(wanted)} differ, silently: {'; '.join(differing[:6])}")


# Remedies -------------------------------------------------------------------------------------------------------------


def _remedy(lines: list[str], scene: Scene) -> None:
    """Does what the refusals of all processes say; Lost where none says anything that can be done."""
    done = [_remedied(line, scene) for line in lines]
    if lines and not any(done):
        raise Lost(f"no remedy for: {lines}")


def _remedied(line: str, scene: Scene) -> bool:
    """Does what a refusal says; False where it says nothing that can be done."""
    return any(remedy(line, scene) for remedy in (_move, _restore, _wait, _other_directory, _anew, _again))


def _path(text: str, scene: Scene) -> Path | None:
    """A file or folder of the place that a line names."""
    found = text.rstrip("/:;,")
    path = Path(found) if found.startswith("/") else scene.place / found
    return path if path.exists() and scene.place in path.parents else None


def _move(line: str, scene: Scene) -> bool:
    """`PATH...: damaged; move it away`"""
    if not re.search(r"move (it|the file) away", line):
        return False
    paths = [path for word in line.split() if (path := _path(word, scene)) is not None]
    for path in paths[:1]:
        shutil.move(path, scene.home / "moved" / f"{time.monotonic_ns()}")
        if scene.subject.ran is not None:  # an older checkpoint would be another model; there is a copy of this one
            shutil.copytree(scene.home / "reference" / scene.subject.ran / path.relative_to(scene.place), path)
    return bool(paths)


def _restore(line: str, scene: Scene) -> bool:
    """`PATH: ...; restore the file`: from the undisturbed run or the inputs, which stand for a copy."""
    if "restore" not in line:
        return False
    for word in line.split():
        path = _path(re.sub(r"^.*?(?=/)", "", word) if word.startswith("'") else word, scene)
        if path is None:
            continue
        inner = path.relative_to(scene.place)
        for source in (scene.home / "inputs" / inner, scene.home / "reference" / scene.subject.name / inner):
            if source.is_dir():
                shutil.rmtree(path)
                shutil.copytree(source, path)
                return True
            if source.exists():
                shutil.copyfile(source, path)
                return True
    return False


def _wait(line: str, scene: Scene) -> bool:
    """Another process still holds the directory."""
    if not re.search(r"another process is writing|is writing here", line):
        return False
    time.sleep(3)
    return True


def _other_directory(line: str, scene: Scene) -> bool:
    """`--out: out ...; choose a new directory`: the leftovers stand for nothing, and a new one is taken."""
    if "choose a new directory" not in line and "choose another run.dir" not in line:
        return False
    if scene.folder.exists():  # one process of several may have said so before
        shutil.move(scene.folder, scene.home / "moved" / f"{time.monotonic_ns()}")
    return True


def _anew(line: str, scene: Scene) -> bool:
    """`delete it and write it again`, `prepare the store again`."""
    found = re.search(r"(\S+?): .*delete it and write it again|remove (\S+) to fit anew", line)
    path = _path(found[1] or found[2], scene) if found else None
    if path is None:
        return False
    shutil.rmtree(path)
    return True


def _again(line: str, scene: Scene) -> bool:
    """`the same command goes on`, `run the same ... again`, where what hindered it is mended."""
    return bool(re.search(r"the same (command|`moma prepare`)|run it again", line))
