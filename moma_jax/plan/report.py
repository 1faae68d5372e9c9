"""Plans as text for people."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from moma_jax.plan.search import written

GIB = 2**30


def format_plan(plan: dict[str, Any]) -> str:
    """What `plan` returned, as tables for the terminal."""
    fits = "fits" if plan["fits"] else "does NOT fit"
    title = (
        f"{plan['ffn']} on {plan['topology']} ({plan['devices']} devices, {plan['hosts']} hosts): {fits} "
        f"({'compiled for it' if plan['method'] == 'compiled' else 'arithmetic alone'})"
    )
    parts = [title, _settings(plan), "", _memory(plan)]
    if plan["step_seconds_estimate"] is not None:
        parts += ["", _speed(plan), "", _seconds(plan), "", _network(plan)]
    if "measured" in plan:
        parts += ["", _beside(plan["measured"])]
    parts += [f"warning: {warning}" for warning in plan["warnings"]]
    return _printed(parts)


def _beside(step: dict[str, Any]) -> Table:
    title = f"{step['part']}, {step['rows']} rows, {step['devices']} x {step['device']}"
    table = _table(title, "measured", "predicted", "predicted over measured")
    if step["predicted_seconds"] is not None:
        least, most = step["predicted_range"]
        predicted = f"{step['predicted_seconds']:.3f} ({least:.3f} to {most:.3f})"
        table.add_row(
            "seconds of a step", f"{step['seconds']:.3f}", predicted, f"{step['predicted_over_measured']:.2f}"
        )
    if step["predicted_bytes"] is not None:
        row = _gib(step["bytes"]), _gib(step["predicted_bytes"]), f"{step['bytes_over_measured']:.2f}"
        table.add_row("memory of a device, GiB", *row)
    return table


def format_generation(plan: dict[str, Any]) -> str:
    """What `plan_generation` returned, as a table for the terminal."""
    fits = "fits" if plan["fits"] else "does NOT fit"
    title = (
        f"writing {plan['rows']} documents of {plan['positions']} tokens with {plan['ffn']} on {plan['topology']} "
        f"({plan['devices']} devices): {fits} (compiled for it)"
    )
    table = _sizes(plan)
    for name, size in plan["programs"].items():
        table.add_row(f"all, while {'prompts are read' if name == 'read' else 'tokens are written'}", _gib(size))
    return _printed([title, _mesh(plan), "", table, *(f"warning: {warning}" for warning in plan["warnings"])])


def format_search(result: dict[str, Any]) -> str:
    """What `plan_search` returned: settings, the best first, and the first in full."""
    end = " (interrupted)" if result["interrupted"] else ""
    lines = [f"{result['considered']} settings, {result['fit_by_arithmetic']} fit by arithmetic; planned{end}:"]
    lines += [f"  {written(plan)}" for plan in result["plans"]]
    lines += [f"  not planned: {reason}" for reason in result["refused"]]
    return "\n".join(lines) + "\n\n" + format_plan(result["plans"][0])


def _printed(parts: list[Any]) -> str:
    console = Console(width=120, highlight=False)
    with console.capture() as capture:
        for part in parts:
            console.print(part, soft_wrap=isinstance(part, str), markup=False)
    return capture.get()


def _settings(plan: dict[str, Any]) -> str:
    flags = f"{_mesh(plan)} --train.accumulate {plan['accumulate']} --model.remat {plan['remat']}"
    return f"{'chosen: ' if plan.get('mesh_chosen') else ''}{flags}"


def _mesh(plan: dict[str, Any]) -> str:
    return " ".join(f"--mesh.{axis} {size}" for axis, size in plan["mesh"].items())


def _gib(size: int | None) -> str:
    return "unknown" if size is None else f"{size / GIB:,.2f}"


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right")
    return table


def _memory(plan: dict[str, Any]) -> Table:
    table = _sizes(plan)
    table.add_row("host memory to save a checkpoint, at most", _gib(plan["host_checkpoint_bytes"]))
    return table


def _sizes(plan: dict[str, Any]) -> Table:
    table = _table("memory of a device", "GiB")
    for name, size in plan["bytes_per_device"].items():
        table.add_row(name, _gib(size))
    table.add_row("there is", _gib(plan["memory_per_device"]))
    return table


def _speed(plan: dict[str, Any]) -> Table:
    table = _table("a step (estimates)", "")
    table.add_row("FLOPs of a device, by `moma cost`", f"{plan['flops_per_device']:.4g}")
    least, most = plan["step_seconds_range"]
    table.add_row("seconds", f"{plan['step_seconds_estimate']:.3f} ({least:.3f} to {most:.3f})")
    table.add_row("tokens/s", f"{plan['tokens_per_second_estimate']:,.0f}")
    least, most = plan["mfu_range"]
    table.add_row("MFU", f"{plan['mfu_estimate']:.1%} ({least:.1%} to {most:.1%})")
    table.add_row("waiting for the network", f"{plan['exposed_communication_share']:.1%}")
    return table


def _seconds(plan: dict[str, Any]) -> Table:
    table = _table("seconds of a core (estimates)", "", "of the step")
    rows = {**plan["seconds_by_category"], **{f"  {k}": v for k, v in plan["seconds_by_part"].items()}}
    for name, seconds in rows.items():
        table.add_row(name, f"{seconds:.3f}", f"{seconds / plan['step_seconds_estimate']:.1%}")
    for name, seconds in plan["unestimated"].items():
        share = f"{seconds / plan['step_seconds_estimate']:.1%}"
        table.add_row(f"{name}: our model, the compiler gives none", f"{seconds:.3f}", share)
    return table


def _network(plan: dict[str, Any]) -> Table:
    table = _table("sent by a device in a step", "over", "GB", "network seconds (estimates)")
    for kind, axes in plan["collective_bytes"].items():
        for n, (axis, size) in enumerate(axes.items()):
            busy = sum(unit.get(kind, 0.0) for unit in plan["network_seconds"].values())
            seconds = "" if n else f"{busy:.3f}"
            table.add_row(kind, axis, f"{size / 1e9:,.3f}", seconds)
    return table
