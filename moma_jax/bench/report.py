"""Results of the benches as text for people."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table


def format_bench(result: dict[str, Any]) -> str:
    """What one of the benches returned, as tables for the terminal."""
    match result["bench"]:
        case "step":
            tables = _step(result)
        case "data":
            tables = [_data(result)]
        case "ffn":
            tables = [_ffn(result)]
        case "generate":
            tables = _generate(result)
        case "codec":
            tables = [_codec(result)]
        case "prepare":
            tables = [_prepare(result)]
    console = Console(width=120, highlight=False)
    with console.capture() as capture:
        for table in tables:
            console.print(table)
    return capture.get()


def _step(result: dict[str, Any]) -> list[Any]:
    update = result["update"]
    title = (
        f"{update['tokens']:,} tokens per update ({update['rows']} rows of {update['sequence']}, "
        f"{update['accumulate']} microbatches), {result['dtype']}, remat {result['remat']}, "
        f"{result['devices']} x {result['device']}"
    )
    speeds = _table("", "tokens/s", "of dense", "spread", "MFU", "s/update", "slots empty", "FLOPs of dense")
    for name, v in result["variants"].items():
        mfu = "unknown" if v["mfu"] is None else f"{v['mfu']:.1%}"
        speed, spread, slack = f"{v['tokens_per_second']:,.0f}", f"{v['spread']:.1%}", f"{v['quota_slack']:.1%}"
        ratio = "-" if v["relative_to_dense"] is None else f"{v['relative_to_dense']:.3f}"
        flops = f"{v['relative_flops']:.4f}"
        speeds.add_row(name, speed, ratio, spread, mfu, f"{v['step_seconds']:.3f}", slack, flops)
    tables = [title, speeds]
    if update["rows"] != update["rows_of_recipe"]:
        tables.insert(1, f"(the recipe's {update['rows_of_recipe']} rows do not fit this machine at once)")
    measured = {name: v["parts"] for name, v in result["variants"].items() if "parts" in v}
    if measured:
        names = list(next(iter(measured.values())))
        parts = _table("", *names)
        for name, values in measured.items():
            parts.add_row(name, *(f"{values[part]:.3f}" for part in names))
        note = "Seconds per update and device, piece by piece, each timed alone: forward, backward, times layers."
        tables += ["", note, parts]
    return tables


def _data(result: dict[str, Any]) -> Table:
    table = _table("data pipeline", "")
    table.add_row("tokens/s", f"{result['tokens_per_second']:,.0f}")
    table.add_row("tokens/s per core", f"{result['tokens_per_second_per_core']:,.0f}")
    table.add_row("cores used", f"{result['cores_used']:.2f} of {result['cores']}")
    table.add_row("fill", f"{result['fill']:.2%}")
    for name, count in result["tokens"].items():
        table.add_row(f"{name} tokens", f"{count:,}")
    table.add_row("batches", f"{result['batches']:,} of {result['batch_tokens']:,} in {result['seconds']:.1f} s")
    bound = result["host_bytes_bound"]["total"]
    table.add_row("host memory", f"{result['host_bytes'] / 2**20:,.0f} MiB, at most {bound / 2**20:,.0f}")
    return table


def _ffn(result: dict[str, Any]) -> Table:
    shape = result["shape"]
    table = _table(f"FFN d={shape['width']} F={shape['hidden']}, {shape['tokens']} tokens, {result['device']}", "ms")
    table.add_row(shape["ffn"], f"{1000 * result['ffn_seconds']:.2f}")
    table.add_row("dense", f"{1000 * result['dense_seconds']:.2f}")
    table.add_row("time over dense's", f"{result['time_over_dense']:.3f}x (spread {result['spread']:.1%})")
    for name, seconds in result["parts"].items():
        table.add_row(f"  {name} alone", f"{1000 * seconds:.2f}")
    return table


def _codec(result: dict[str, Any]) -> Table:
    shape = result["shape"]
    what = f"{shape['kind']}, {shape['side']} pixels, {shape['codes_per_image']} codes of {shape['codebook']:,}"
    table = _table(f"{what}; {result['devices']} x {result['device']}", "pictures/s", "spread")
    for name in ("encode", "decode"):
        found = result[name]
        figures = ("-", "-") if found is None else (f"{found['pictures_per_second']:,.2f}", f"{found['spread']:.1%}")
        table.add_row(name, *figures)
    return table


def _prepare(result: dict[str, Any]) -> Table:
    table = _table("", "pictures per processor second", "spread", "moma prepare reaches of it")
    shares = {"pillow": result["share_of_pillow"], "pillow_draft": result["share_of_draft"]}
    names = {"prepare": "moma prepare, tars to store", "pillow": "Pillow: decode, resize",
             "pillow_draft": "Pillow: decode at the least size, resize"}  # fmt: skip
    for key, name in names.items():
        figure = result[key]
        share = f"{shares[key]:.2f}" if key in shares else ""
        table.add_row(name, f"{figure['pictures_per_processor_second']:,.0f}", f"{figure['spread']:.1%}", share)
    return table


def _generate(result: dict[str, Any]) -> list[Any]:
    shape = result["shape"]
    title = (
        f"{shape['layers']} layers, d={shape['width']}, F={shape['hidden']}, {shape['vocabulary']:,} ids, "
        f"{shape['dtype']}, prompts of {shape['prompt']}, {shape['tokens']} tokens written; {result['device']}, "
        f"reads {result['bandwidth'] / 1e9:.1f} GB/s"
    )
    table = _table("rows", "", "prefill tok/s", "decode tok/s", "of dense", "spread", "experts/token", "of bandwidth")
    for rows, variants in result["rows"].items():
        for name, v in variants.items():
            ratio = "-" if v["relative_to_dense"] is None else f"{v['relative_to_dense']:.3f}"
            speeds = (f"{v[f'{part}_tokens_per_second']:,.0f}" for part in ("prefill", "decode"))
            shares = (ratio, f"{v['spread']:.1%}", f"{v['experts_per_token']:.2f}", f"{v['bandwidth_share']:.0%}")
            table.add_row(str(rows), name, *speeds, *shares)
    return [title, table]


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right")
    return table
