"""Everything that one accelerator can tell in nine minutes: its own limits, steps, attention, the FFN, decoding, data.

    moma bench suite --out DIR            python -m moma_jax.bench.suite --out DIR   (needs neither tyro nor grain)

Parts run one after the other in a process of their own, which writes DIR/suite.json and suite.md after each. Where a
part kills the process, another goes on with the next; what is left when the time is up is named as not done.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from moma_jax.bench.timing import say
from moma_jax.errors import InputError, RunError
from moma_jax.plan.shapes import SHAPES, Shape, recipe_of

FFNS = ("dense", "8x", "1t1i", "4t4i", "mod+4t4i")
REPEATS = 5
SLOWEST_PART = 300.0
"""Seconds after which a part is taken for hung."""
ELSEWHERE = 77
"""Exit code of the process that measures where the folder has figures of another machine."""


class Part(NamedTuple):
    """One measurement: its name, and what makes its figures."""

    name: str
    measure: Callable[[], dict[str, Any]]


def parts(toy: bool) -> list[Part]:
    """All parts, the most telling first."""
    shapes = ("toy",) if toy else ("435m", "90m", "1b4")
    first, *others = shapes
    steps = [Part(f"step {first} {ffn}", lambda ffn=ffn: step(first, ffn)) for ffn in FFNS]
    more = [Part(f"step {shape} {ffn}", lambda s=shape, f=ffn: step(s, f)) for shape in others for ffn in FFNS]
    width = SHAPES[first].width // SHAPES[first].heads
    return [
        Part("chip", lambda: chip(toy)),
        *steps,
        Part(f"attention {first}", lambda: attention(first)),
        Part(f"ffn {first}", lambda: ffn(first)),
        Part(f"decode {first}", lambda: decode(first, toy)),
        Part("data", lambda: data(first, 0.5 if toy else 5.0)),
        *more,
        *([] if toy or width == 128 else [Part("attention 1b4", lambda: attention("1b4"))]),
    ]


# What is measured -----------------------------------------------------------------------------------------------------


def config_of(shape: Shape, ffn: str) -> Any:
    """`recipe_of` in the type that this device computes in."""
    from moma_jax.training.step import with_dtype

    return with_dtype(recipe_of(shape, ffn))


def chip(toy: bool) -> dict[str, Any]:
    """What the device reaches."""
    from moma_jax.bench.chip import measure_chip

    return measure_chip(*((256, 1 << 16) if toy else (8192, 1 << 28)), repeats=2 * REPEATS)


def step(shape: str, ffn: str) -> dict[str, Any]:
    """The training step of one FFN: its speed, MFU by both conventions, compile time and memory."""
    import jax

    from moma_jax import sharding
    from moma_jax.bench.step import rows_that_fit, synthetic_batch, with_rows
    from moma_jax.bench.timing import summarise, timed
    from moma_jax.cost import cost, peak_flops
    from moma_jax.model.decoder import first_routing_state
    from moma_jax.training import step as step_lib

    config = config_of(SHAPES[shape], ffn)
    config = with_rows(config, rows_that_fit(config))
    program, routing_state = step_lib.make_program(config), first_routing_state(config)
    with sharding.use_mesh(program.mesh):
        state = step_lib.create_state(program, routing_state)
        batch = step_lib.put(synthetic_batch(config), program.mesh)
        compiling, run = timed(lambda: step_lib.compile_step(program, state))
        memory = run.memory_analysis()
        for _ in range(2):
            state, _ = run(state, batch)
        jax.block_until_ready(state)
        seconds = []
        for _ in range(REPEATS):
            took, (state, report) = timed(lambda state=state: run(state, batch))
            seconds.append(took)
    median, spread = summarise(seconds)
    flops = cost(config)["flops_per_token"]
    speed, peak = config.batch_tokens / median, peak_flops(jax.devices()[0].device_kind)
    causal = flops["train"] - 1.5 * flops["by_part"]["attention_scores"]  # half of the scores, forward and backward
    share = lambda per_token: None if peak is None else speed * per_token / (peak * program.mesh.size)  # noqa: E731
    return {
        "tokens_per_second": speed,
        "spread": spread,
        "step_seconds": median,
        "rows": config.train.batch_rows,
        "mfu": share(flops["train"]),
        "mfu_causal": share(causal),
        "flops_per_token": flops["train"],
        "compile_seconds": compiling,
        "bytes": {"arguments": memory.argument_size_in_bytes, "temporary": memory.temp_size_in_bytes},
        "finite": bool(report.finite),
    }


def attention(shape: str) -> dict[str, Any]:
    """Attention alone on packed rows, by every way that there is here, forward and with its gradient, each held against
    the definition in float32."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from moma_jax.bench.timing import differentiated, in_turns, random, summarise
    from moma_jax.model.attention import ways

    model = SHAPES[shape]
    rows, size = 2, (model.sequence, model.heads, model.width // model.heads)
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    q, k, v = (random(n, (rows, *size), dtype) for n in range(3))
    lengths = np.array([3, 1, 4, 2, 5]) * model.sequence // 16  # the last sixteenth is padding
    segment_S = np.repeat(np.arange(len(lengths) + 1), [model.sequence - lengths.sum(), *lengths])[::-1].copy()
    position_S = np.concatenate([np.arange(n) for n in np.unique(segment_S, return_counts=True)[1][::-1]])
    rows_of = [jnp.broadcast_to(jnp.asarray(x, jnp.int32), (rows, model.sequence)) for x in (segment_S, position_S)]
    real = np.asarray(rows_of[0] > 0)
    here = ways(jax.default_backend(), jax.devices()[0].device_kind, *size)
    oracle = here["written"](*(x.astype(jnp.float32) for x in (q, k, v)), *rows_of)
    figures = {}
    for name, attend in here.items():
        forward = jax.jit(lambda *qkv, attend=attend: attend(*qkv, *rows_of))
        off = np.abs(np.asarray(forward(q, k, v), np.float32) - np.asarray(oracle))[real].max()
        both = differentiated(lambda *qkv, attend=attend: attend(*qkv[:3], *rows_of), (q, k, v))
        calls = {"forward": lambda forward=forward: forward(q, k, v), "both": both}
        seconds = {what: summarise(times) for what, times in in_turns(calls, REPEATS).items()}
        figures[name] = {
            "forward_seconds": seconds["forward"][0],
            "forward_and_gradient_seconds": seconds["both"][0],
            "spread": seconds["both"][1],
            "largest_difference": float(off),
        }
    return {"rows": rows, "sequence": model.sequence, "heads": size[1], "width": size[2], "ways": figures}


def ffn(shape: str) -> dict[str, Any]:
    """The FFN alone, each variant over dense."""
    from moma_jax.bench.ffn import bench_ffn

    model = SHAPES[shape]
    hidden = config_of(model, "dense").model.hidden
    size = {"width": model.width, "hidden": hidden, "tokens": model.sequence * model.group_rows, "repeats": REPEATS}
    return {name: bench_ffn(name, **size) for name in (("4t4i",) if shape == "toy" else ("8x", "1t1i", "4t4i"))}


def decode(shape: str, toy: bool) -> dict[str, Any]:
    """Prefill and cached decoding, of 1, 8 and 32 rows."""
    from moma_jax.bench.generate import bench_generate

    few = {"batch": (1,), "prompt": 8, "tokens": 4, "repeats": 1} if toy else {"repeats": 2}
    return bench_generate(config_of(SHAPES[shape], "dense"), ("4t4i",) if toy else ("dense", "4t4i"), **few)


def data(shape: str, seconds: float) -> dict[str, Any]:
    """Random tokens as fast as the pipeline makes them."""
    from moma_jax.bench.data import bench_data

    return bench_data(config_of(SHAPES[shape], "dense"), seconds=seconds)


# The process that does it ---------------------------------------------------------------------------------------------


def work(out: Path, toy: bool, until: float) -> None:
    """Does the parts that are not done yet, one after the other."""
    import jax

    from moma_jax.runs.directory import versions

    found = _read(out)
    device = jax.devices()[0]
    own = {
        "device": device.device_kind,
        "devices": len(jax.devices()),
        "platform": device.platform,
        "versions": versions() | {"python": sys.version.split()[0]},
        "toy": toy,
    }
    for name, value in own.items():
        if found.setdefault(name, value) != value:
            say(f"{out}: measured with {name} {found[name]}, and this is {value}; give another folder")
            sys.exit(ELSEWHERE)
    parent = os.getppid()
    for part in parts(toy):
        if part.name in found["parts"]:
            continue
        if time.time() > until or os.getppid() != parent:  # whoever watched it was killed
            _write(out, found)
            return
        found["running"] = part.name
        _write(out, found)
        say(part.name)
        start = time.monotonic()
        try:
            figures = part.measure()
        except (InputError, RunError, ImportError, jax.errors.JaxRuntimeError) as error:
            figures = {"failed": " ".join(str(error).split())[:300]}
        found["parts"][part.name] = {**figures, "seconds": time.monotonic() - start}
        del found["running"]
        jax.clear_caches()
        _write(out, found)


# The process that watches it ------------------------------------------------------------------------------------------


def bench_suite(out: str, minutes: float = 9.0, toy: bool = False) -> dict[str, Any]:
    """Runs the suite.

    Args:
      out: a directory for suite.json and suite.md; parts that it already has are not done again, those that
        failed are.
      minutes: after so long no part is begun, and one that runs is ended. toy: shapes for a CPU in a minute.

    Returns:
      {"device", "versions", "parts": {name: figures with "seconds", or "failed"}, "left": names of parts not done}.

    Raises:
      InputError: `out` cannot be written, or was measured on another device or with other versions or shapes.
      RunError: no part could be done.
    """
    if not minutes > 0:
        raise InputError(f"--minutes: {minutes}; give more than 0")
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        found = _read(folder)
        found.pop("running", None)  # of a process that was killed
        found["parts"] = {name: part for name, part in found["parts"].items() if "failed" not in part}
        _write(folder, found)
    except (OSError, ValueError) as error:
        raise InputError(f"--out: {out}: {error}") from error
    until = time.time() + 60 * minutes
    while time.time() < until and (left := _left(found, toy)):
        words = [sys.executable, "-m", "moma_jax.bench.suite", "--out", str(folder), "--until", str(until)]
        quick = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "true"} if toy else {}  # what is slow then is compiling
        child = subprocess.Popen([*words, *(["--toy"] if toy else [])], env=os.environ | quick)
        code = _watched(child, folder, until)
        if code == ELSEWHERE:
            raise InputError(f"--out: {out}: has figures of another machine; see above")
        found = _read(folder)
        if (running := found.pop("running", None)) is not None:
            late = time.time() >= until
            reason = "the time was up" if late else f"its process ended with {code}"
            if not late:
                found["parts"][running] = {"failed": reason, "seconds": 0.0}
            say(f"{running}: {reason}")
            _write(folder, found)
        elif time.time() < until and left == _left(found, toy):
            raise RunError(f"bench suite: its process ends with {code} before any part; see above")
    return _read(folder) | {"left": _left(found, toy)}


def _left(found: dict[str, Any], toy: bool) -> list[str]:
    """Names of parts that are not done."""
    return [part.name for part in parts(toy) if part.name not in found["parts"]]


def _watched(child: subprocess.Popen, folder: Path, until: float) -> int:
    """The exit code of a child, which is ended where the time is up or one part takes too long."""
    try:
        while True:
            try:
                return child.wait(timeout=1.0)
            except subprocess.TimeoutExpired:
                age = time.time() - (folder / "suite.json").stat().st_mtime
                if time.time() > until or age > SLOWEST_PART:
                    child.kill()
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()


def _read(folder: Path) -> dict[str, Any]:
    path = folder / "suite.json"
    found = json.loads(path.read_text()) if path.exists() else {"parts": {}}
    done = found.get("parts") if isinstance(found, dict) else None
    if not isinstance(done, dict) or not all(isinstance(part, dict) and "seconds" in part for part in done.values()):
        raise ValueError("suite.json is none of this suite; give another folder")
    return found


def _write(folder: Path, found: dict[str, Any]) -> None:
    """Both files, each in one step."""
    for name, text in (("suite.json", json.dumps(found, indent=1) + "\n"), ("suite.md", table(found))):
        beside = folder / f".{name}"
        beside.write_text(text)
        os.replace(beside, folder / name)


def table(found: dict[str, Any]) -> str:
    """The page."""
    versions = ", ".join(f"{name} {version}" for name, version in found.get("versions", {}).items())
    device = f"{found.get('devices', '?')} x {found.get('device', 'unknown')}"
    lines, done = [f"# {device}", "", f"`moma bench suite`; {versions}.", ""], found["parts"]
    sections = {
        "Chip": _chip_rows,
        "Steps": _step_rows,
        "Attention alone": _attention_rows,
        "FFN alone": _ffn_rows,
        "Decoding": _decode_rows,
    }
    for title, rows_of in sections.items():
        if rows := list(rows_of(done)):
            lines += [f"## {title}", "", *_table_of(rows), ""]
    failed = [f"- {name}: {part['failed']}" for name, part in done.items() if "failed" in part]
    return "\n".join([*lines, *(["## Not measured", "", *failed, ""] if failed else [])])


Row = dict[str, str]


def _table_of(rows: list[Row]) -> list[str]:
    names = list(rows[0])
    lines = [names, ["---"] * len(names), *([row[name] for name in names] for row in rows)]
    return [f"| {' | '.join(line)} |" for line in lines]


def _chip_rows(done: dict[str, Any]) -> Iterator[Row]:
    if "of_peak" in (chip := done.get("chip", {})):
        yield {
            "products, TFLOP/s": f"{chip['product_flops_per_second'] / 1e12:.1f}",
            "of peak": _share(chip["of_peak"]),
            "copy, GB/s": f"{chip['bytes_per_second'] / 1e9:.0f}",
        }


def _step_rows(done: dict[str, Any]) -> Iterator[Row]:
    for name, part in done.items():
        if not name.startswith("step ") or "failed" in part:
            continue
        _, shape, ffn = name.split()
        dense = done.get(f"step {shape} dense", {}).get("tokens_per_second")
        yield {
            "shape": shape,
            "ffn": ffn,
            "tokens/s": f"{part['tokens_per_second']:,.0f}",
            "of dense": "" if dense is None else f"{part['tokens_per_second'] / dense:.3f}",
            "spread": _share(part["spread"]),
            "MFU": _share(part["mfu"]),
            "MFU, causal": _share(part["mfu_causal"]),
            "compile, s": f"{part['compile_seconds']:.0f}",
            "GiB": f"{sum(part['bytes'].values()) / 2**30:.1f}",
            "rows": str(part["rows"]),
        }


def _attention_rows(done: dict[str, Any]) -> Iterator[Row]:
    for name, part in done.items():
        for way, own in part.get("ways", {}).items():
            size = " x ".join(str(part[axis]) for axis in ("rows", "sequence", "heads", "width"))
            yield {
                "shape": f"{name.removeprefix('attention ')}: {size}",
                "way": way,
                "forward, ms": f"{1e3 * own['forward_seconds']:.2f}",
                "with gradient, ms": f"{1e3 * own['forward_and_gradient_seconds']:.2f}",
                "spread": _share(own["spread"]),
                "off by": f"{own['largest_difference']:.1e}",
            }


def _ffn_rows(done: dict[str, Any]) -> Iterator[Row]:
    for name, part in done.items():
        if name.startswith("ffn ") and "failed" not in part:
            for ffn, own in part.items():
                if ffn != "seconds":
                    time_over = f"{own['time_over_dense']:.3f}"
                    yield {"shape": name[4:], "ffn": ffn, "time over dense": time_over, "spread": _share(own["spread"])}


def _decode_rows(done: dict[str, Any]) -> Iterator[Row]:
    for name, part in done.items():
        for rows, variants in (part.get("rows", {}) if name.startswith("decode ") else {}).items():
            for ffn, own in variants.items():
                yield {
                    "shape": name[7:],
                    "rows": str(rows),
                    "ffn": ffn,
                    "decode, tokens/s": f"{own['decode_tokens_per_second']:,.0f}",
                    "prefill, tokens/s": f"{own['prefill_tokens_per_second']:,.0f}",
                    "of bandwidth": _share(own["bandwidth_share"]),
                }


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def told(out: str, found: dict[str, Any]) -> str:
    """What is printed at the end: the page, and what is left."""
    left = f"\nnot done: {', '.join(found['left'])}" if found["left"] else ""
    return (Path(out) / "suite.md").read_text() + left


def main() -> None:
    """The command without the command-line library."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.until is not None:
        work(Path(words.out), words.toy, words.until)
        return
    try:
        found = bench_suite(words.out, words.minutes, words.toy)
    except (InputError, RunError) as error:
        print(f"moma: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 1)
    print(told(words.out, found))


if __name__ == "__main__":
    main()
