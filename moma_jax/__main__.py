"""The `moma` command: each subcommand is a thin shell over a Python function of the same name."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import traceback
from dataclasses import dataclass, field
from typing import Annotated, NoReturn

import tyro

import moma_jax
from moma_jax import recipes
from moma_jax.allocator import keep_freed_memory
from moma_jax.checks import resolve
from moma_jax.config import Config, MeshConfig, PrepareConfig, RoutersConfig
from moma_jax.errors import InputError, RunError

COMMANDS = {
    "prepare": "make a token store from pictures and text",
    "train": "train a recipe; a run that was interrupted goes on",
    "fit-routers": "fit auxiliary routers to a run, for causal routing",
    "eval": "held-out losses of a run under several routings",
    "cost": "parameters, FLOPs and bytes of a recipe, in closed form",
    "plan": "does a run fit a pod, and how fast is it: compiled for TPUs that need not be here",
    "generate": "text and pictures after a prompt",
    "upcycle": "more experts from a trained run: a new run that goes on from its weights",
    "study": "compare architectures at equal FLOPs on equal data; report with speed-up factors",
    "convert": "Chameleon checkpoints to runs, and dense runs back",
    "bench": "measure: bench step, bench generate, bench data, bench ffn",
}
USAGE = "usage: moma COMMAND ...\n\n" + "\n".join(f"  {name:11} {text}" for name, text in COMMANDS.items())


@dataclass(frozen=True)
class Prepare:
    """Make a token store, `moma prepare SOURCE --out DIR`: fit the tokenizer and the palette, write the tokens."""

    out: str
    """The store's directory: local, gs:// or s3://."""
    part: str | None = None
    """K/N: write only part K of N (an array job); --merge afterwards."""
    merge: bool = False
    """Publish the manifest of parts that were written one by one."""
    options: Annotated[PrepareConfig, tyro.conf.arg(name="")] = field(default_factory=PrepareConfig)


@dataclass(frozen=True)
class Train(recipes.ConfigOptions):
    """Train a recipe. Any field of the config can be overridden."""

    recipe: tyro.conf.Positional[str] = ""
    """configs/NAME.py, a config.json, or a run directory to go on with."""


@dataclass(frozen=True)
class FitRouters:
    """Fit auxiliary routers to the newest checkpoint of a run, `moma fit-routers RUN`, so that it can be used causally.

    The model stays as it is; the routers go to RUN/routers. Settings are the run's own unless given here.
    """

    run: tyro.conf.Positional[str] = ""
    """Run directory."""
    options: Annotated[RoutersConfig, tyro.conf.arg(name="")] = field(default_factory=RoutersConfig)
    mesh: MeshConfig = MeshConfig()
    """Devices to lay the model on."""


@dataclass(frozen=True)
class Eval:
    """Held-out losses of a run under several routings, beside those of a unigram model."""

    run: tyro.conf.Positional[str]
    """Run directory."""
    routing: tuple[str, ...] = ()
    """Routings to evaluate under: choice (as in training, sees the future), causal (auxiliary routers), threshold
    (running thresholds); all that the run has where none is named."""
    mesh: MeshConfig = MeshConfig()
    """Devices to lay the model on."""
    json: bool = False
    """Print JSON."""


@dataclass(frozen=True)
class Cost(Train):
    """Parameters, FLOPs and bytes of a recipe, in closed form."""

    padding: float = 0.0
    """Share of positions that are padding, 0 to 1; it enters the executed FLOPs alone."""
    json: bool = False
    """Print JSON."""


@dataclass(frozen=True)
class Plan(Train):
    """Whether a run fits a pod and what it costs there: the real training step is compiled, no accelerator is needed.

    Where the mesh is the default, data -1 and all else 1, one is chosen. For GPUs memory alone is reckoned.
    """

    topology: str = ""
    """v5p-128, v5p:4x4x4, v5e-16, v6e-64, 2xv5e-256 (two slices), h100:8, h100:4x8."""
    search: bool = False
    """Try meshes, remat policies and microbatches, and rank those that fit."""
    compiled: int = 6
    """search only: how many settings are compiled."""
    json: bool = False
    """Print JSON."""


@dataclass(frozen=True)
class BenchStep(Train):
    """Training-step speed of FFN variants at equal active FLOPs, interleaved in one process."""

    ffn: tuple[str, ...] = ("dense", "8x", "1t1i", "4t4i")
    """Variants to compare; with dense among them, the others' speed is also given relative to it."""
    repeats: int = 9
    """Timed steps of each variant."""
    json: bool = False
    """Print JSON."""


@dataclass(frozen=True)
class BenchGenerate(Train):
    """Speed of prefill and cached decoding of FFN variants at equal active FLOPs, random weights, threshold routing."""

    ffn: tuple[str, ...] = ("dense", "4t4i")
    """Variants to compare; with dense among them, the others' speed is also given relative to it."""
    batch: tuple[int, ...] = (1, 8, 32)
    """Numbers of rows."""
    prompt: int = 64
    """Tokens of a prompt."""
    tokens: int = 64
    """Tokens written to each row."""
    repeats: int = 5
    """Timed turns of all variants."""
    json: bool = False
    """Print JSON."""


@dataclass(frozen=True)
class BenchData(Train):
    """Speed of the data pipeline: planning, reading, packing."""

    seconds: float = 10.0
    """How long to measure."""
    json: bool = False
    """Print JSON."""


@dataclass(frozen=True)
class BenchFfn:
    """The FFN alone, forward and backward in float32, against a dense one of equal active FLOPs."""

    ffn: str = "4t4i"
    """Variant."""
    width: int = 256
    """Model width d."""
    hidden: int = 704
    """Hidden size F."""
    tokens: int = 4096
    """Tokens of the batch."""
    repeats: int = 40
    """Timed repetitions of each."""
    json: bool = False
    """Print JSON."""


def main(arguments: list[str] | None = None) -> None:
    """Runs one command and exits: 0 done, 1 the run failed, 2 the input is at fault, 143 stopped by SIGTERM."""
    words = sys.argv[1:] if arguments is None else arguments
    keep_freed_memory()
    sys.unraisablehook = _unraisable
    try:
        run_command(words)
    except InputError as error:
        _leave(_complain(error, 2))
    except RunError as error:
        _leave(_complain(error, 1))
    except KeyboardInterrupt:
        _leave(_complain("interrupted", 130))
    except BrokenPipeError:  # `moma cost ... | head` is no failure of ours
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception:
        traceback.print_exc()
        _leave(1)


def _leave(code: int) -> NoReturn:
    """Ends the process; one of several does not wait for the others, who may wait for it."""
    if "moma_jax.hosts" in sys.modules:  # not needed by commands that need no JAX
        sys.modules["moma_jax.hosts"].leave(code)
    sys.exit(code)


def _unraisable(unraisable) -> None:
    """As usual, but for what TensorStore's threads say of writes that Orbax stopped waiting for when one failed."""
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def _complain(message: object, code: int) -> int:
    print(f"moma: {' '.join(str(message).split())}", file=sys.stderr)
    return code


def run_command(words: list[str]) -> None:
    """Dispatches the words after `moma`."""
    command, rest = (words[0], words[1:]) if words else ("--help", [])
    match command:
        case "prepare":
            named = bool(rest) and not rest[0].startswith("-")
            prepare(recipes.parse(Prepare, None, ["--source"] * named + rest, "moma prepare"))
        case "train":
            _, config = _config(Train, rest, "moma train")
            moma_jax.train(config)
        case "fit-routers":
            fit_routers(rest)
        case "eval":
            evaluate(recipes.parse(Eval, None, rest, "moma eval"))
        case "generate":
            from moma_jax.commands import generate as command

            command.run(recipes.parse(command.Generate, None, rest, "moma generate"))
        case "cost":
            cost(*_config(Cost, rest, "moma cost"))
        case "plan":
            plan(*_config(Plan, rest, "moma plan"))
        case "upcycle":
            from moma_jax.commands import upcycle as upcycle_command

            upcycle_command.run(rest)
        case "study":
            from moma_jax.commands import study as command

            command.run(rest)
        case "convert":
            from moma_jax.commands import convert as command

            command.run(rest)
        case "bench":
            bench(rest)
        case "--help" | "-h":
            print(USAGE)
        case _:
            raise InputError(f"{command}: no such command; commands are {', '.join(COMMANDS)}")


def _config(kind, words: list[str], program: str) -> tuple[Train, Config]:
    """The command's own options and the resolved config; the recipe comes first, so its values are the defaults."""
    path = words[0] if words and not words[0].startswith("-") else None
    if path is None and not {"--help", "-h"} & set(words):
        raise InputError(f"{program}: name a recipe first, such as: {program} configs/quickstart.py")
    base = recipes.load(path) if path else Config()
    options = recipes.parse(kind, kind(config=base, recipe=path or ""), words, program)
    return options, resolve(recipes.one_length(options.config, words))


def prepare(options: Prepare) -> None:
    """`moma prepare`."""
    part = None
    if options.part is not None:
        numbers = options.part.split("/")
        if len(numbers) != 2 or not all(n.isdigit() for n in numbers) or not 1 <= int(numbers[0]) <= int(numbers[1]):
            raise InputError(f"--part: {options.part!r} is not K/N with 1 <= K <= N, such as 3/16")
        part = (int(numbers[0]), int(numbers[1]))
    moma_jax.prepare(options.options, options.out, part=part, merge=options.merge)


def fit_routers(words: list[str]) -> None:
    """`moma fit-routers`; the run comes first, so its own settings are the defaults."""
    program = "moma fit-routers"
    run = words[0] if words and not words[0].startswith("-") else ""
    default = FitRouters(run)
    if run:
        from moma_jax.training.load import config_of

        default = FitRouters(run, config_of(run).routers)
    elif not {"--help", "-h"} & set(words):
        raise InputError(f"{program}: name a run first, such as: {program} runs/quickstart")
    options = recipes.parse(FitRouters, default, words, program)
    moma_jax.fit_routers(options.run, options.options, mesh=options.mesh)


def evaluate(options: Eval) -> None:
    """`moma eval`."""
    from rich.console import Console

    from moma_jax import hosts
    from moma_jax.evaluation.tables import evaluation_tables
    from moma_jax.runs.journal import finite

    result = finite(moma_jax.evaluate(options.run, routing=options.routing, mesh=options.mesh))
    if hosts.is_first():
        print(json.dumps(result, allow_nan=False)) if options.json else Console().print(*evaluation_tables(result))


def cost(options: Cost, config: Config) -> None:
    """`moma cost`."""
    from moma_jax.cost import print_cost

    result = moma_jax.cost(config, padding=options.padding)
    print(json.dumps(result)) if options.json else print_cost(result)


def plan(options: Plan, config: Config) -> None:
    """`moma plan`."""
    from moma_jax.plan import plan_search
    from moma_jax.plan.report import format_plan, format_search

    if not options.topology:
        raise InputError("--topology: name what to plan for, such as v5p-128, v5e-16 or h100:8")
    if options.compiled < 1:
        raise InputError(f"--compiled: must be positive, is {options.compiled}")
    if options.search:
        progress = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
        result, written = plan_search(config, options.topology, options.compiled, progress), format_search
    else:
        result, written = moma_jax.plan(config, options.topology), format_plan
    print(json.dumps(result)) if options.json else print(written(result), end="")


def bench(words: list[str]) -> None:
    """`moma bench step|generate|data|ffn`."""
    from moma_jax import bench as benches

    match words[0] if words else "":
        case "step":
            options, config = _config(BenchStep, words[1:], "moma bench step")
            result = benches.bench_step(config, ffn=options.ffn, repeats=options.repeats)
        case "generate":
            options, config = _config(BenchGenerate, words[1:], "moma bench generate")
            measured = {k: getattr(options, k) for k in ("ffn", "batch", "prompt", "tokens", "repeats")}
            result = benches.bench_generate(config, **measured)
        case "data":
            options, config = _config(BenchData, words[1:], "moma bench data")
            result = benches.bench_data(config, seconds=options.seconds)
        case "ffn":
            options = recipes.parse(BenchFfn, None, words[1:], "moma bench ffn")
            measured = dataclasses.asdict(options)
            del measured["json"]
            result = benches.bench_ffn(**measured)
        case _:
            raise InputError("moma bench: say what to measure: step, generate, data or ffn")
    print(json.dumps(result)) if options.json else benches.print_bench(result)


if __name__ == "__main__":
    main()
