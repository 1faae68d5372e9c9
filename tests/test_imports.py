"""Imports run downward only and in no circle, and what must stay light imports no JAX."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

from paths import ROOT

PACKAGE = ROOT / "moma_jax"
# A module may import from its own floor and from those after it.
FLOORS = [
    ["__main__"],
    ["commands"],
    ["doctor", "whole"],
    ["page"],
    ["studies", "bench"],
    ["plan", "convert", "upcycling"],
    ["training", "evaluation", "runs", "generation"],
    ["recipes"],
    ["command_line"],
    ["model", "data", "codec", "cost"],
    ["config_json"],
    ["checks", "batch", "compiling"],
    ["sharding"],
    ["geometry"],
    ["config"],
    ["rules"],
    ["routers"],
    ["by_token"],
    ["router"],
    ["fields", "ffn", "vocab", "hosts"],
    ["storage"],
    ["addresses"],
    ["errors", "display", "late", "process", "shipped"],
]
MODEL_FLOORS = [
    ["decode", "decoder"],
    ["depth"],
    ["block"],
    ["attention", "moe"],
    ["dispatch", "by_modality"],
    ["parameters"],
    ["auxiliary", "routing"],
    ["kernels", "precision", "blockwise"],
]


def modules() -> dict[str, Path]:
    """Every module of the package with its file."""
    paths = sorted(PACKAGE.rglob("*.py"))
    return {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in paths}


MODULES = modules()


def imported(path: Path) -> set[str]:
    """Modules of the package that a file imports anywhere, also inside functions and under TYPE_CHECKING."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write imports in full"
            of = {f"{node.module}.{alias.name}": node.module for alias in node.names}
            names |= {name if name in MODULES else module for name, module in of.items()}
    return names & MODULES.keys()


GRAPH = {name: imported(path) - {name} for name, path in MODULES.items()}


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules of which each imports the next, the last one the first; [] where there is no such."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1][::-1]
    return []


def floor_of(part: str, floors) -> int | None:
    return next((level for level, names in enumerate(floors) if part in names), None)


def test_every_module_has_a_floor():
    parts = {p.relative_to(PACKAGE).parts[0].removesuffix(".py") for p in PACKAGE.rglob("*.py")} - {"__init__"}
    assert parts == {name for floor in FLOORS for name in floor}


def test_imports_run_downward():
    upward = []
    for module, names in GRAPH.items():
        own = floor_of(module.split(".")[1], FLOORS) if module != "moma_jax" else -1
        for name in names - {"moma_jax"}:
            if floor_of(name.split(".")[1], FLOORS) < own:
                upward.append(f"{module} imports {name}")
    assert not upward


def test_imports_run_in_no_circle():
    """On one floor neither."""
    assert not circle(GRAPH)


def test_a_circle_is_seen():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) in (["b", "c", "b"], ["c", "b", "c"])


def test_model_imports_run_downward():
    model = {m.split(".")[2]: names for m, names in GRAPH.items() if m.startswith("moma_jax.model.")}
    for module, names in model.items():
        for name in names & {f"moma_jax.model.{other}" for other in model}:
            assert floor_of(name.split(".")[2], MODEL_FLOORS) >= floor_of(module, MODEL_FLOORS), f"{module}: {name}"


def test_config_cost_and_the_store_work_without_jax():
    light = "config, cost, recipes, vocab, batch, data.store, data.prepare, data.packing"
    code = f"import sys\nfor m in '{light}'.split(', '): __import__('moma_jax.' + m)\nassert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_suite_of_an_accelerator_works_without_what_reads_recipes():
    code = "import sys, moma_jax.bench.suite, moma_jax.bench.step\nassert 'tyro' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
