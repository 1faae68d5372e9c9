"""An exported folder: logits in PyTorch are ours, with torch and safetensors alone; what the folder says of itself."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("safetensors", reason="the extra [convert] is not installed")
import chameleons  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402
from tiers import long_but  # noqa: E402
from tiny import tiny  # noqa: E402

import moma_jax  # noqa: E402
from moma_jax.config import RopeScaling  # noqa: E402
from moma_jax.convert import to_folder  # noqa: E402
from moma_jax.errors import InputError  # noqa: E402
from moma_jax.model.parameters import unembedding_of  # noqa: E402
from moma_jax.routers.choice import Choice  # noqa: E402
from moma_jax.routers.hash import Hash  # noqa: E402
from moma_jax.routers.token_choice import TokenChoice  # noqa: E402
from moma_jax.runs.directory import RunDir  # noqa: E402
from moma_jax.training.load import load  # noqa: E402

LLAMA = {"model_norm": "pre", "model_heads": 4, "model_kv_heads": 2, "model_head_width": 6, "model_qk_norm": "none"}
FINE = TokenChoice(top=3, normalise=True, gates="sigmoid", bias_rate=0.1)
CASES = {
    "dense": (LLAMA | {"model_ffn": "dense", "model_rope_scaling": RopeScaling(positions=16)}, None),
    "qwen3": ({"model_ffn": "dense", "model_qk_norm": "rms", "model_tied_embeddings": True}, None),
    "4t4i": ({"model_ffn": "4t4i", "model_router": Choice(auxiliary=True)}, "causal"),
    "own": ({"model_ffn": "1t1i+1x", "model_attention_weights": "by_modality"}, None),
    "mod+4t4i": ({"model_ffn": "mod+4t4i", "model_router": Choice(auxiliary=True)}, "causal"),
    "thresholds": ({"model_ffn": "mod+4t4i"}, "threshold"),
    "fine-grained": ({"model_ffn": "16t16i+1x", "model_hidden": 8, "model_router": FINE}, None),
}


def moved(state):
    """As if it had been trained: norms, auxiliary routers, thresholds and biases are no longer what they begin with."""
    rng = np.random.default_rng(1)

    def one(path, array):
        name = path[-1].key
        if name.startswith(("scale", "out_AE", "bias", "threshold")):
            return (array + rng.normal(0, 0.5, array.shape)).astype(np.float32)
        return np.ones_like(array) if name == "updates" else array

    params, routing_state = (
        jax.tree_util.tree_map_with_path(one, tree) for tree in (state.params, state.routing_state)
    )
    return dataclasses.replace(state, params=params, routing_state=routing_state)


def our_logits(loaded, token_BS, routing):
    token_BS = np.tile(token_BS, (loaded.config.data.group_rows // len(token_BS), 1))
    position_BS = np.broadcast_to(np.arange(token_BS.shape[1]), token_BS.shape)
    output = loaded.under(routing).apply(
        {"params": loaded.params},
        jnp.asarray(token_BS),
        jnp.ones_like(token_BS),
        jnp.asarray(position_BS),
        jnp.asarray(loaded.vocabulary.modality_V.astype(np.int32)[token_BS]),
        key=jax.random.key(0),
        routing_state=loaded.routing_state,
    )
    return np.asarray(output.hidden_BSD @ unembedding_of(loaded.params)), output.report


def torch_logits(folder, token_BS):
    """By the folder's own file, in a process where neither this package nor JAX can be imported."""
    code = (
        "import sys; sys.modules['jax'] = sys.modules['moma_jax'] = None; sys.path.insert(0, sys.argv[1])\n"
        "import json, torch; from moma_torch import Moma\n"
        "print(json.dumps(Moma(sys.argv[1]).logits(torch.tensor(json.loads(sys.argv[2]))).tolist()))"
    )
    words = [sys.executable, "-c", code, str(folder), json.dumps(token_BS.tolist())]
    done = subprocess.run(words, capture_output=True, text=True, cwd=folder, check=False)
    assert done.returncode == 0, done.stderr
    return np.array(json.loads(done.stdout))


@pytest.mark.slow
@pytest.mark.parametrize("name", long_but("dense", "4t4i", "mod+4t4i", "fine-grained", of=[*CASES]))
def test_logits_in_pytorch_are_ours(name, tmp_path):
    pytest.importorskip("torch", reason="the extra [reference] is not installed")
    run, (settings, routing) = str(tmp_path / "run"), CASES[name]
    chameleons.untrained_run(tiny(run, **settings), change=moved)
    loaded = load(run)
    rng = np.random.default_rng(0)
    token_BS = np.array([np.concatenate([[0], rng.integers(0, loaded.vocabulary.size, 15)]) for _ in range(2)])
    wanted_BSV, report = our_logits(loaded, token_BS, routing or "causal")
    to_folder(run, str(tmp_path / "folder"), routing=routing, quiet=True)
    assert wanted_BSV[:2].std() > 0.3
    np.testing.assert_allclose(torch_logits(tmp_path / "folder", token_BS), wanted_BSV[:2], atol=1e-4)
    if routing is not None:
        assert np.all(np.asarray(report.taken_LM3).sum((0, 1)) > 0)  # tokens of no, one and several experts


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "run"
    chameleons.untrained_run(tiny(path, model_ffn="2t2i", model_router=Choice(auxiliary=True)))
    return path


def test_the_folder_says_what_it_holds(run, tmp_path, capsys):
    files = to_folder(str(run), str(tmp_path / "folder"), dtype="bfloat16", shard_gb=2e-5)
    assert "has no tokenizer" in capsys.readouterr().out
    assert {"README.md", "config.json", "moma_torch.py", "model.safetensors.index.json"} < set(files)
    index = json.loads((tmp_path / "folder" / "model.safetensors.index.json").read_text())["weight_map"]
    params, tensors = load(str(run)).params, {}
    for file in set(index.values()):
        tensors |= load_file(tmp_path / "folder" / file)
    assert set(tensors) == set(index)
    gate_EDF = tensors["layers.1.ffn.image.gate_EDF"]
    np.testing.assert_array_equal(gate_EDF, params["layers"]["ffn"]["image"]["gate_EDF"][1].astype(gate_EDF.dtype))
    assert str(gate_EDF.dtype) == "bfloat16" and tensors["layers.1.ffn.image.router_DE"].dtype == np.float32
    card = (tmp_path / "folder" / "README.md").read_text()
    for word in ("FFN `2t2i`", "updates: 0", "Not evaluated at this step", "Random tokens", "routed by `causal`"):
        assert word in card


def test_the_card_has_the_runs_record(tmp_path):
    chameleons.untrained_run(tiny(tmp_path / "run", model_ffn="dense"))
    figures = {"loss": 2.5, "loss_text": 3.0, "loss_image": None}
    summary = {"steps": 0, "eval": {"heldout": {"causal": figures}}, "final": {"flops": 1.5e12}}
    summary |= {"versions": {"jax": "0.0.1"}}
    RunDir(str(tmp_path / "run")).write_json("summary.json", summary)
    to_folder(str(tmp_path / "run"), str(tmp_path / "folder"), quiet=True)
    card = (tmp_path / "folder" / "README.md").read_text()
    for line in ("| set | routing | loss | text |", "| heldout | causal | 2.5 | 3 |", "jax 0.0.1", "FLOPs: 1.5e+12"):
        assert line in card
    RunDir(str(tmp_path / "run")).write_json("summary.json", summary | {"steps": 7})  # of another checkpoint
    to_folder(str(tmp_path / "run"), str(tmp_path / "other"), quiet=True)
    card = (tmp_path / "other" / "README.md").read_text()
    assert "Not evaluated at this step" in card and "FLOPs: not recorded" in card


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"routing": "threshold"}, "has no thresholds"),
        ({"routing": "choice"}, "'choice' sees later tokens; give one of causal"),
        ({"routing": "other"}, "'other' is none of"),
        ({"dtype": "int8"}, "--dtype: 'int8' is none of"),
        ({"shard_gb": 0.0}, "--shard-gb: must be positive"),
        ({"step": 7}, "no checkpoint of step 7"),
    ],
)
def test_refusals_leave_nothing(run, options, message, tmp_path):
    with pytest.raises(InputError, match=message):
        to_folder(str(run), str(tmp_path / "folder"), quiet=True, **options)
    assert not list(tmp_path.iterdir())


def test_rules_that_the_reference_does_not_know_are_refused(tmp_path):
    chameleons.untrained_run(tiny(tmp_path / "run", model_ffn="2t2i", model_router=Hash()))
    with pytest.raises(InputError, match="the rule hash has no form in moma_torch.py"):
        to_folder(str(tmp_path / "run"), str(tmp_path / "folder"), quiet=True)


def test_nothing_imports_the_reference():
    package = Path(moma_jax.__file__).parent
    assert not [path for path in package.rglob("*.py") if "import moma_torch" in path.read_text()]
