"""A plan beside what the suite measured."""

import json

import pytest
from paths import ROOT
from processes import output, spawn

from moma_jax import recipes
from moma_jax.cost import parameter_count
from moma_jax.errors import InputError
from moma_jax.plan import plan
from moma_jax.plan.shapes import SHAPES, recipe_of

RECIPE = ROOT / "configs" / "paper_435m.py"


def suite(path, device, devices=1, **steps):
    """A suite.json of these steps: (rows, seconds, bytes) by shape and FFN, joined by a double underscore."""
    parts = {"chip": {"seconds": 1.0}}
    for name, (rows, seconds, size) in steps.items():
        figures = {"rows": rows, "step_seconds": seconds, "bytes": {"arguments": size, "temporary": 0}, "seconds": 9.0}
        parts[f"step {name.replace('__', ' ')}"] = figures
    path.write_text(json.dumps({"device": device, "devices": devices, "parts": parts}))
    return str(path)


def test_the_nearest_step_of_the_same_ffn_is_put_beside(tmp_path):
    """Arithmetic alone: memory, at the suite's rows on the suite's number of devices."""
    config = recipes.recipe(RECIPE, ["--model.ffn", "4t4i"])
    steps = {"90m__4t4i": (48, 0.5, 10), "435m__4t4i": (24, 2.0, 40 << 30), "435m__dense": (24, 1.0, 20)}
    file = suite(tmp_path / "suite.json", "NVIDIA B200", 4, **steps)
    found = plan(config, "b200:8", measured_file=file)
    step = found["measured"]
    assert (step["part"], step["rows"], step["seconds"]) == ("step 435m 4t4i", 24, 2.0)
    assert step["predicted_seconds"] is None and step["predicted_over_measured"] is None
    parameters = parameter_count(recipe_of(SHAPES["435m"], "4t4i"))["total"]
    assert 16 * parameters < step["predicted_bytes"] < 80 << 30, "four copies, each with its own state"
    assert step["bytes_over_measured"] == step["predicted_bytes"] / (40 << 30)
    assert found["devices"] == 8, "the plan itself is of what was asked for"


@pytest.mark.parametrize(
    ("device", "steps", "complaint"),
    [
        ("NVIDIA A100-SXM4-80GB", {"435m__dense": (24, 1.0, 9)}, "was measured on NVIDIA A100-SXM4-80GB, and h100:1x8"),
        ("NVIDIA H100 80GB HBM3", {"435m__1t1i": (24, 1.0, 9)}, "has no step of dense"),
        ("NVIDIA H100 80GB HBM3", {"435m__dense": (0, 1.0, 9)}, "figures that no suite writes"),
        ("NVIDIA H100 80GB HBM3", {"435m__dense": (4, 1.0, 9)}, "figures that no suite writes"),
        ("NVIDIA H100 80GB HBM3", {"435m__dense": (24, 1.0, 0)}, "figures that no suite writes"),
        ("NVIDIA H100 80GB HBM3", {"435m__dense": (float("inf"), 1.0, 9)}, "is no suite.json"),
        ("NVIDIA H100 80GB HBM3", {"435m__dense": (24, "soon", 9)}, "is no suite.json"),
    ],
)
def test_what_cannot_be_put_beside_is_refused(tmp_path, device, steps, complaint):
    config = recipes.recipe(RECIPE, ["--model.ffn", "dense"])
    with pytest.raises(InputError, match=complaint):
        plan(config, "h100:8", measured_file=suite(tmp_path / "suite.json", device, **steps))


@pytest.mark.parametrize("text", ["", "[]", '{"parts": 3}', '{"device": "TPU v5", "devices": "x", "parts": {}}'])
def test_what_is_no_suite_is_refused(tmp_path, text):
    (tmp_path / "suite.json").write_text(text)
    with pytest.raises(InputError, match="--measured: .*suite.json: "):
        plan(recipes.recipe(RECIPE), "v5p-128", measured_file=str(tmp_path / "suite.json"))


@pytest.mark.long
def test_a_tpu_step_is_compiled_for_one_chip_of_a_slice(tmp_path):
    pytest.importorskip("libtpu", reason="libtpu is not installed: pip install 'moma_jax[plan]'")
    file = suite(tmp_path / "suite.json", "TPU v5 lite", toy__dense=(4, 0.01, 1 << 20))
    shape = {"layers": 2, "width": 256, "heads": 2, "hidden": 256, "ffn": "dense"}
    options = [word for name, size in shape.items() for word in (f"--model.{name}", str(size))]
    asked = ["plan", RECIPE, "--topology", "v5e-4", "--measured", file, "--json", *options]
    rest = ["--mesh.data", "4", "--train.batch-rows", "24", "--data.sequence", "2048"]
    step = json.loads(output(spawn("-m", "moma_jax", *asked, *rest, cwd=ROOT)))["measured"]
    least, most = step["predicted_range"]
    assert 0 < least <= step["predicted_seconds"] <= most < 0.01
    assert step["predicted_over_measured"] == step["predicted_seconds"] / 0.01
    assert step["predicted_bytes"] > 0
