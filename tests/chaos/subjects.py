"""The commands under test: tiny inputs, what each command makes, when it can be hit, and how it looks undisturbed.

A place is a directory in which one command runs; all its paths are relative, so that what it leaves is equal, byte for
byte, wherever it ran.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import digests
from loopback import free_port
from small_pictures import small_training, write_pictures
from small_stores import make_source
from stores import Bucket, bucket
from tiny import tiny
from victims import Victim, fork, spawn, start

from moma_jax.config import Modality, StoreConfig
from moma_jax.config_json import to_json
from moma_jax.training.codec.config import to_json as codec_to_json

ROOT = Path(__file__).resolve().parents[2]
DEADLINE = 150.0
"""Seconds in which a command that takes a few, on a busy core, must end."""
FAR_DEADLINE = 600.0
"""The same where a store fails, and is asked again after pauses that double."""
STEPS = 12


Digest = Callable[[Path], dict[str, Any]]


class Moment(NamedTuple):
    """When a fault strikes: up to `spread` seconds after what was `seen` in a place."""

    name: str
    seen: Callable[[Path, Victim], bool]
    spread: float


def at_once(place: Path, victim: Victim) -> bool:
    return True


def said(text: str) -> Callable[[Path, Victim], bool]:
    return lambda place, victim: text in victim.says()


def there(pattern: str) -> Callable[[Path, Victim], bool]:
    return lambda place, victim: next(place.glob(pattern), None) is not None


@dataclass(frozen=True)
class Subject:
    """A command.

    Attributes:
      words: its command line. makes: the folder that it makes. digest: of that folder.
      inputs: names in the folder of inputs that lie in its place. moments: when it can be hit.
      ran: a subject whose finished folder it begins with. processes: how many of them are one run.
      halfway: steps of checkpoints at which a restart can begin. launcher: a script that starts two processes of it.
      remote: it makes its folder in gs://bucket (`stores.bucket`), from where it is fetched to be looked at.
    """

    name: str
    words: tuple[str, ...]
    makes: str
    digest: Digest
    moments: tuple[Moment, ...]
    inputs: tuple[str, ...] = ()
    ran: str | None = None
    processes: int = 1
    halfway: tuple[int, ...] = ()
    launcher: str | None = None
    remote: bool = False

    def furnish(self, place: Path, home: Path, own: bool = False) -> None:
        """Puts the inputs into a new place: links, or copies where they will be damaged (`own`)."""
        for name in self.inputs:
            source = home / "inputs" / name
            if own and source.is_dir():
                shutil.copytree(source, place / name)
            else:
                os.symlink(source, place / name)
        if self.ran is not None:
            before = SUBJECTS[self.ran]
            shutil.copytree(home / "reference" / self.ran / before.makes, place / before.makes)

    @property
    def deadline(self) -> float:
        """Seconds in which it must end."""
        return FAR_DEADLINE if self.remote else DEADLINE

    def store(self, *options: str) -> AbstractContextManager[Bucket | None]:
        """The bucket that it writes to, if it does, from a server with these options."""
        return bucket(*options) if self.remote else contextlib.nullcontext()

    def begin_halfway(self, place: Path, home: Path, step: int) -> None:
        """Puts what the undisturbed run had at a checkpoint into the place, as if it had been killed then."""
        folder = place / self.makes
        shutil.copytree(home / "reference" / self.name / self.makes, folder)
        for checkpoint in (folder / "checkpoints").iterdir():
            if int(checkpoint.name) > step:
                shutil.rmtree(checkpoint)
        (folder / "summary.json").unlink()
        status = json.loads((folder / "status.json").read_text())
        (folder / "status.json").write_text(json.dumps(status | {"state": "running", "step": step}))

    def digested(
        self, folder: Path, home: Path, digest: Callable[[Path], dict[str, Any]] | None = None
    ) -> dict[str, Any]:
        """The digest of a folder, made in a process of its own, as TensorStore begins threads; RuntimeError where the
        folder cannot be read."""
        to, make = home / "digest.json", self.digest if digest is None else digest
        victim = fork(lambda: to.write_text(json.dumps(make(folder))) and None, home, home / "digest")
        if not victim.wait(DEADLINE) or victim.code:
            raise RuntimeError(f"what it made cannot be read: {victim.complaint().strip()[-300:]}")
        return json.loads(to.read_text())

    def begin(self, place: Path, log: Path, words: Sequence[str] | None = None, **settings: Any) -> list[Victim]:
        """Starts its processes; `settings` as those of `victims.start`."""
        words = self.words if words is None else words
        if self.launcher is not None:
            given = ["--processes", "2", "--port", str(free_port()), "--grace", "20"]
            return [spawn([str(ROOT / self.launcher), *given, *words], place, log, **settings)]
        if self.processes == 1:
            return [start(words, place, log, **settings)]
        port, names = free_port(), [f"{log.name}-{index}" for index in range(self.processes)]
        given = ["--hosts.start", "on", "--hosts.coordinator", f"127.0.0.1:{port}", "--hosts.count", "2"]
        given += ["--hosts.heartbeat-seconds", "10"]
        return [
            start([*words, *given, "--hosts.index", str(index)], place, log.with_name(name), **settings)
            for index, name in enumerate(names)
        ]


# The commands ---------------------------------------------------------------------------------------------------------

PREPARE = ("prepare", "source", "--out", "store", "--text-size", "300", "--image-side", "4", "--colours", "16",
           "--held-out", "0.2", "--parts", "3", "--shard-bytes", "4096", "--chunk-tokens", "128")  # fmt: skip


def _training(folder: str, evaluated: str = f"step {STEPS // 2}/{STEPS}") -> tuple[Moment, ...]:
    """Moments of a stage of the training loop."""
    return (
        Moment("start", at_once, 1.0),
        Moment("compile", said("compiling the step"), 1.0),
        Moment("step", there(f"{folder}/checkpoints/3*"), 0.6),
        Moment("save", there(f"{folder}/checkpoints/*tmp*"), 0.1),
        Moment("evaluation", said(evaluated), 0.6),
        Moment("end", there(f"{folder}/checkpoints/{STEPS}*"), 0.3),
    )


_all = (
    Subject(
        "prepare", PREPARE, "store", digests.of_files,
        (
            Moment("start", at_once, 0.3),
            Moment("codecs", there("store/settings.json*"), 0.05),
            Moment("parts", there("store/parts/.writing*"), 0.3),
            Moment("publish", there("store/parts/00003*"), 0.1),
        ),
        ("source",),
    ),
    Subject(
        "train", ("train", "train.json"), "run", digests.of_run, _training("run"), ("train.json", "store"),
        halfway=(3, 6, 9),
    ),
    Subject(
        "train, routed", ("train", "routed.json"), "run", digests.of_run, _training("run"), ("routed.json",),
        halfway=(3, 6, 9),
    ),
    Subject(
        "train, 2 processes", ("train", "train.json"), "run", digests.of_run, _training("run"), ("train.json", "store"),
        processes=2, halfway=(6,),
    ),
    Subject(
        "launcher", ("train.json",), "run", digests.of_run, _training("run"), ("train.json", "store"),
        launcher="launch/local.sh",
    ),
    Subject(
        "train, bucket", ("train", "bucket.json"), "run", digests.of_run,
        (
            Moment("start", at_once, 2.0),
            Moment("compile", said("compiling the step"), 2.0),
            Moment("step", said("step 4/"), 2.0),
            Moment("evaluation", said("step 6/"), 2.0),
            Moment("end", said("step 12/"), 2.0),
        ),
        ("bucket.json", "store"), remote=True,
    ),
    Subject(
        "routers fit", ("routers", "fit", "run", "--steps", str(STEPS), "--checkpoint-every", "3", "--log-every", "2",
                        "--warmup-steps", "2"),
        "run/routers", digests.of_run, _training("run/routers"), ("routed.json",), ran="train, routed",
    ),
    Subject(
        "study", ("study", "study.py"), "runs", digests.of_runs,
        (
            Moment("start", at_once, 1.0),
            Moment("first run", there("runs/*-0/checkpoints/3*"), 1.0),
            Moment("second run", said("run 2 of 2"), 2.5),
        ),
        ("study.py",),
    ),
    Subject(
        "codec train", ("codec", "train", "codec.json"), "codec", digests.of_run, _training("codec"),
        ("codec.json", "pictures"), halfway=(3, 6, 9),
    ),
    Subject(
        "generate", ("generate", "run", "--prompt", "a red circle", "--max-tokens", "24", "--out", "out"), "out",
        digests.of_files, (Moment("start", at_once, 1.0), Moment("drawing", there("out/.writing"), 3.0)),
        ("train.json", "store"), ran="train",
    ),
)  # fmt: skip
SUBJECTS = {subject.name: subject for subject in _all}


# Inputs and references ------------------------------------------------------------------------------------------------

STUDY = '''"""Two tiny runs."""

from tiny import tiny

from moma_jax.studies import Study, Variant


def study():
    variants = (Variant("dense", {"model.norm": "swin"}), Variant("pre", {"model.norm": "pre"}))
    base = tiny(train_checkpoint_every=3, train_keep_last=100, train_eval_sets=(), model_layers=1, model_ffn="dense")
    return Study(base, variants, tokens=1280, dir="runs")
'''
SCENES = ("prepare", "scenes", "--out", "store", "--documents", "80", "--text-size", "300", "--image-side", "4",
          "--colours", "8", "--parts", "1", "--held-out", "0.2")  # fmt: skip


def make_inputs(home: Path) -> None:
    """Everything that commands read, but for runs of other commands."""
    inputs = home / "inputs"
    inputs.mkdir(parents=True)
    make_source(inputs / "source", documents=90)
    write_pictures(inputs / "pictures")
    modalities = (Modality("text", "t", size=300, quota=1.0), Modality("image", "i", size=8, span=16, quota=1.0))
    train = {
        "train_steps": STEPS,
        "train_checkpoint_every": digests.SAVED_EVERY,
        "train_keep_last": 100,
        "train_eval_every": 6,
    }
    data = {"kind": "store", "modalities": modalities, "stores": (StoreConfig("scenes", "store"),), "sequence": 32}
    data |= {"lanes": 8, "group_rows": 1}
    routed = tiny("run", train_eval_routings=("choice",), **train)
    config = tiny("run", model_ffn="dense", model_layers=1, **train, **{f"data_{k}": v for k, v in data.items()})
    codec = small_training("pictures", "codec")
    codec = dataclasses.replace(codec, train=dataclasses.replace(codec.train, keep_last=100))
    far = dataclasses.replace(config, run=dataclasses.replace(config.run, dir="gs://bucket/run"))
    recipes = {"train": to_json(config), "routed": to_json(routed), "bucket": to_json(far)}
    for name, content in (recipes | {"codec": codec_to_json(codec)}).items():
        (inputs / f"{name}.json").write_text(json.dumps(content))
    (inputs / "study.py").write_text(STUDY)
    run_through(start(SCENES, inputs, home / "scenes"))


def reference(subject: Subject, home: Path) -> dict[str, Any]:
    """The digest of an undisturbed run, which is made where it is missing."""
    place, known = home / "reference" / subject.name, home / f"reference-{subject.name}.json"
    if not known.exists():
        if subject.ran is not None:
            reference(SUBJECTS[subject.ran], home)
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        subject.furnish(place, home)
        with subject.store() as store:
            for victim in subject.begin(place, home / "reference-log"):
                run_through(victim)
            if store is not None:
                store.fetch(subject.makes, place)
        known.write_text(json.dumps(subject.digested(place / subject.makes, home)))
    return json.loads(known.read_text())


def run_through(victim: Victim) -> None:
    """Waits for a command that nothing disturbs; SystemExit where it fails, as nothing can be judged then."""
    if not victim.wait(2 * DEADLINE) or victim.code:
        raise SystemExit(f"an undisturbed command failed: {victim.complaint()[-2000:]}")
