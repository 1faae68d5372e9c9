"""Imports run downward only, and what must stay light imports no JAX."""

import ast
import subprocess
import sys
from pathlib import Path

from paths import ROOT

PACKAGE = ROOT / "moma_jax"
# A module may import from its own floor and from those after it.
FLOORS = [
    ["__main__"],
    ["commands"],
    ["studies", "bench", "plan"],
    ["training", "evaluation", "runs", "generation", "convert", "upcycling"],
    ["recipes"],
    ["command_line"],
    ["model", "data", "cost"],
    ["config", "config_json", "checks", "batch"],
    ["vocab", "sharding", "hosts", "ffn"],
    ["errors", "allocator"],
]
MODEL_FLOORS = [
    ["decode"],
    ["decoder"],
    ["depth"],
    ["layer"],
    ["attention"],
    ["experts"],
    ["slots"],
    ["auxiliary", "causal"],
    ["routing", "fused_attention", "precision"],
]


def imported(path: Path) -> set[str]:
    """Names of moma_jax modules that a file imports anywhere, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return {name for name in names if name.startswith("moma_jax.")}


def floor_of(part: str, floors) -> int | None:
    return next((level for level, names in enumerate(floors) if part in names), None)


def test_every_module_has_a_floor():
    parts = {p.relative_to(PACKAGE).parts[0].removesuffix(".py") for p in PACKAGE.rglob("*.py")} - {"__init__"}
    assert parts == {name for floor in FLOORS for name in floor}


def test_imports_run_downward():
    upward = []
    for path in PACKAGE.rglob("*.py"):
        own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for name in imported(path):
            target = floor_of(name.split(".")[1], FLOORS)
            if own != "__init__" and target is not None and target < floor_of(own, FLOORS):
                upward.append(f"{path.name} imports {name}")
    assert not upward


def test_model_imports_run_downward():
    for path in (PACKAGE / "model").glob("*.py"):
        own = floor_of(path.stem, MODEL_FLOORS)
        for name in imported(path):
            parts = name.split(".")
            if parts[1] == "model" and len(parts) > 2 and own is not None:
                target = floor_of(parts[2], MODEL_FLOORS)
                assert target is None or target >= own, f"{path.name} imports {name}"


def test_config_cost_and_the_store_work_without_jax():
    modules = "config, cost, recipes, vocab, batch, data.store, data.prepare, data.packing"
    code = f"import sys\nfor m in '{modules}'.split(', '): __import__('moma_jax.' + m)\nassert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
