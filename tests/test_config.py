"""Every contradiction fails before device work, with one line that names the field and a value that would be right."""

import ast
import dataclasses
import inspect
import json
import re
from fractions import Fraction

import pytest

from moma_jax import config as config_lib
from moma_jax.__main__ import main
from moma_jax.checks import resolve
from moma_jax.config import (
    Config,
    DataConfig,
    EvalSet,
    MeshConfig,
    Modality,
    ModelConfig,
    PrepareConfig,
    RopeScaling,
    RoutersConfig,
    RunConfig,
    StoreConfig,
    TrainConfig,
)
from moma_jax.config_json import from_json, to_json
from moma_jax.errors import InputError
from moma_jax.ffn import ExpertGroup, parse_ffn
from moma_jax.fields import differences, may_change
from moma_jax.geometry import group_capacity
from moma_jax.recipes import load
from moma_jax.routers.choice import Choice
from moma_jax.routers.threshold import Threshold

TEXT = Modality("text", "t", 100, quota=0.5)
IMAGE = Modality("image", "i", 20, span=16, quota=0.5)
AUDIO = Modality("audio", "a", 10, span=4, quota=0.2)


def valid(**sections) -> Config:
    base = Config(
        model=ModelConfig(layers=2, width=32, heads=4, ffn_width=96),
        data=DataConfig(kind="synthetic", modalities=(TEXT, IMAGE), sequence=64, group_rows=2),
        train=TrainConfig(steps=3, batch_rows=4, eval_sets=(EvalSet(rows=4),)),
    )
    for name, fields in sections.items():
        base = dataclasses.replace(base, **{name: dataclasses.replace(getattr(base, name), **fields)})
    return base


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"heads": 3}}, "model.heads: 3 heads .* 2 would"),
        ({"model": {"kv_heads": 3}}, "model.kv_heads: 3 do not divide model.heads .*; use a divisor"),
        ({"model": {"head_width": 7}}, "model.head_width: .* 7 is odd"),
        (
            {"model": {"rope_scaling": RopeScaling(low=4.0)}},
            "model.rope_scaling: low is 4, high 4; give a greater",
        ),
        ({"model": {"rope_scaling": RopeScaling(factor=0.5)}}, "model.rope_scaling.factor: must be 1 or more"),
        ({"model": {"ffn": "4t4a"}}, "model.ffn: .*modality 'a', which has no quota"),
        ({"model": {"ffn": "4t"}}, "model.ffn: '4t' must name each of t, i once"),
        ({"model": {"ffn": "4t0i"}}, "must name each of t, i once"),
        ({"model": {"ffn": "8y"}}, "model.ffn"),
        ({"model": {"ffn": "4t4i+x"}}, "model.ffn: .* is not an FFN"),
        ({"model": {"ffn": "4t4i+"}}, "model.ffn: .* is not an FFN"),
        ({"model": {"capacity": 1.5}}, "model.capacity"),
        ({"model": {"capacity": 1e-5}}, "model.capacity: must be at least 0.0001"),
        ({"model": {"layers": 0}}, "model.layers: must be positive"),
        ({"model": {"router": Choice(jitter=-1.0)}}, "model.router.jitter: must be 0 or more"),
        (
            {"model": {"router": Threshold(slack=0.9)}},
            "model.router.slack: must be at least 1 and at most 65536, such as 1.25; is 0.9",
        ),
        ({"model": {"router": Threshold(warmup=0)}}, "model.router.warmup: must be 1 or more"),
        ({"routers": {"steps": 0}}, "routers.steps: must be positive"),
        ({"routers": {"peak_lr": -1.0}}, "routers.peak_lr: must be positive"),
        ({"routers": {"end_lr": -1.0}}, "routers.end_lr: must be 0 or more"),
        ({"routers": {"batch_rows": 5}}, "routers.batch_rows: 5 rows .* groups of 2 rows; use 6"),
        ({"routers": {"batch_rows": 0}}, "routers.batch_rows: must be positive; is 0 rows"),
        ({"data": {"modalities": (TEXT, dataclasses.replace(IMAGE, quota=0.1))}}, "raise it to 0.125"),
        ({"data": {"modalities": (dataclasses.replace(TEXT, quota=0.3), IMAGE)}}, "quotas add up to 0.800"),
        ({"data": {"modalities": (TEXT, dataclasses.replace(IMAGE, letter="t"))}}, "same letter"),
        ({"data": {"modalities": (TEXT, dataclasses.replace(IMAGE, letter="x"))}}, "image has letter 'x'; give one of"),
        ({"mesh": {"data": 0}}, "mesh.data: must be -1 or positive, is 0"),
        ({"hosts": {"count": 2, "index": 2}}, "hosts.index: 2 is not below hosts.count 2"),
        ({"data": {"sequence": 18}}, "data.sequence: 18 .* use 19 or more"),
        ({"train": {"batch_rows": 5}}, "train.batch_rows: 5 rows .* use 6"),
        ({"train": {"batch_rows": 4, "accumulate": 4}}, "use 8"),
        ({"train": {"eval_sets": (EvalSet(rows=3),)}}, "train.eval_sets: .* such as 4"),
        ({"train": {"eval_sets": (EvalSet(rows=4, stores=("nope",)),)}}, "draws from 'nope'"),
        (
            {"train": {"eval_routings": ("causal",)}},
            "causal cannot be, as the run has no auxiliary routers",
        ),
        (
            {"train": {"eval_routings": ("choice", "future")}},
            "train.eval_routings: 'future' is not one of choice, causal, threshold",
        ),
        ({"train": {"eval_routings": ("choice", "choice")}}, "eval_routings: one is named twice"),
        ({"train": {"steps": None}}, "exactly one of .* given: none"),
        ({"train": {"tokens": 100.0}}, "exactly one of .* given: steps, tokens"),
        ({"train": {"steps": None, "tokens": float("inf")}}, "train.tokens: must be positive and finite"),
        ({"data": {"cache_bytes": -1}}, "data.cache_bytes: must be 0"),
        ({"data": {"read_concurrency": 0}}, "data.read_concurrency: must be positive"),
        ({"data": {"prepare": PrepareConfig(image_side=0)}}, "data.prepare.image_side: must be positive"),
        (
            {"data": {"modalities": (dataclasses.replace(TEXT, quota=0.01), IMAGE)}},
            "a document of 3; raise it to 0.024",
        ),
        ({"data": {"modalities": (dataclasses.replace(TEXT, size=5), IMAGE)}}, "size 5, .* 6 special ids; use 6"),
        ({"data": {"kind": "store"}}, "data.stores: name a store"),
        ({"data": {"stores": (StoreConfig("a", "x", share={"smell": 1.0}),)}}, "share of 'smell'"),
    ],
)
def test_contradictions_name_the_field_and_the_remedy(sections, message):
    with pytest.raises(InputError, match=message) as caught:
        resolve(valid(**sections))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("ffn", ["dense", "1t1i"])
def test_routing_without_routers_is_harmless(ffn):
    """Nothing chooses, so a sweep over FFNs may keep these settings."""
    resolve(valid(model={"ffn": ffn, "router": Threshold(auxiliary=True)}))


def test_resolve_fills_derived_fields_once():
    resolved = resolve(valid())
    assert resolved.model.hidden == 128  # 2/3 of 96, rounded up to a multiple of 128
    assert resolve(resolved) == resolved


@pytest.mark.parametrize(("ffn_width", "hidden"), [(2048, 1408), (4096, 2816), (8192, 5504), (192, 128), (193, 256)])
def test_hidden_size_is_two_thirds_rounded_up(ffn_width, hidden):
    assert resolve(valid(model={"ffn_width": ffn_width})).model.hidden == hidden


def test_ffn_notation():
    modalities = (TEXT, IMAGE, AUDIO)
    assert parse_ffn("dense", modalities).dense
    assert parse_ffn("1x", modalities).dense
    assert parse_ffn("8x", modalities).groups == (ExpertGroup("all", (0, 1, 2), 8),)
    layout = parse_ffn("7t1i2a+1x", modalities)
    assert [(g.name, g.modalities, g.experts) for g in layout.groups] == [
        ("text", (0,), 7),
        ("image", (1,), 1),
        ("audio", (2,), 2),
    ]
    assert layout.shared == (ExpertGroup("shared", (0, 1, 2), 1, shared=True, width=1),)
    of_each = parse_ffn("4t4i2a+2t1i1a", modalities).shared
    assert [(g.name, g.modalities, g.width) for g in of_each] == [
        ("shared_text", (0,), 2),
        ("shared_image", (1,), 1),
        ("shared_audio", (2,), 1),
    ]
    assert group_capacity(ModelConfig(), layout.groups[0]) == Fraction(1, 7)
    assert group_capacity(ModelConfig(capacity=0.3), layout.groups[1]) == 1, "a lone expert takes every token"
    assert group_capacity(ModelConfig(capacity=0.3), layout.groups[2]) == Fraction(3, 10)


def test_json_round_trip():
    resolved = resolve(valid(data={"stores": (StoreConfig("a", "x", share={"text": 1.0}),)}))
    assert from_json(json.loads(json.dumps(to_json(resolved)))) == resolved


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: d["model"].update(widht=3), "model.widht: no such field; model has width"),
        (lambda d: d.update(format_version=99), "format_version 99"),
        (
            lambda d: d["data"].update(stores=[{"name": "a", "path": "x", "share": [1]}]),
            "stores.0.share: expected an obj",
        ),
        (lambda d: d["model"].update(layers="two"), "model.layers: expected int, found 'two'"),
        (lambda d: d["model"].update(norm="mid"), "model.norm: 'mid' is not one of swin, pre"),
        (lambda d: d["data"]["modalities"][0].pop("letter"), "data.modalities.0.letter: is missing"),
    ],
)
def test_json_with_unknown_keys_or_wrong_types_is_refused(damage, message):
    data = json.loads(json.dumps(to_json(resolve(valid()))))
    damage(data)
    with pytest.raises(InputError, match=message):
        from_json(data)


def test_what_may_change_when_a_run_goes_on():
    before = resolve(valid())
    harmless = dataclasses.replace(
        valid(train={"log_every": 3, "checkpoint_every": 7}, data={"prefetch": 9}, model={"remat": "full"}),
        mesh=MeshConfig(data=2),
        run=RunConfig(dir="elsewhere"),
    )
    assert differences(before, resolve(harmless)) == []
    changed = resolve(valid(train={"seed": 1}, model={"layers": 3}))
    assert differences(before, changed) == ["model.layers: 2 -> 3", "train.seed: 0 -> 1"]


def test_differences_stay_short_in_nested_fields():
    """How to prepare a store may change: the store is known by its hashes, wherever it came from."""
    before = resolve(valid(data={"prepare": PrepareConfig()}))
    assert differences(before, resolve(valid(data={"prepare": PrepareConfig(seed=3)}))) == []
    wider = (TEXT, dataclasses.replace(IMAGE, quota=0.6))
    sets = (EvalSet(rows=4), EvalSet("more", rows=2))
    changed = resolve(valid(data={"modalities": wider}, train={"eval_sets": sets}))
    assert differences(before, changed) == [
        "data.modalities.1.quota: 0.5 -> 0.6",
        "train.eval_sets: ['heldout'] -> ['heldout', 'more']",
    ]
    rows = resolve(valid(train={"eval_sets": (EvalSet(rows=2),)}))
    assert differences(before, rows) == ["train.eval_sets.0.rows: 4 -> 2"]


@pytest.mark.parametrize("content", [b"[]", b"\xff\xfe", b"{", b"[" * 100_000])
def test_a_config_file_that_is_no_config_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(InputError, match="config.json: (not JSON|expected an object)") as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


def test_every_field_is_documented():
    """Help pages are made from the field documentation, so a field without one would be a blank line."""
    tree = ast.parse(inspect.getsource(config_lib))
    settings = [
        n for n in tree.body if isinstance(n, ast.ClassDef) and n.name.endswith(("Config", "EvalSet", "Modality"))
    ]
    assert len(settings) >= 8
    for node in settings:
        for field, after in zip(node.body, [*node.body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign) and node.name != "Config":
                assert isinstance(after, ast.Expr), f"{node.name}.{field.target.id} has no documentation"


@pytest.mark.parametrize(
    ("section", "field", "wrong"),
    [
        ("model", "norm", "post"),
        ("model", "router", "tokens"),
        ("model", "remat", "offload"),
        ("model", "dtype", "fp8"),
        ("optimizer", "schedule", "wsd"),
    ],
)
def test_a_recipe_that_names_what_there_is_not_is_refused(section, field, wrong, tmp_path, capsys):
    """Whoever forgot a `Literal` would train something else in silence."""
    kind = type(getattr(Config(), section)).__name__
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        f"from moma_jax.config import Config, {kind}\n\n\n"
        f"def config():\n    return Config({section}={kind}({field}={wrong!r}))\n"
    )
    with pytest.raises(SystemExit) as left:
        main(["cost", str(recipe)])
    assert left.value.code == 2
    assert re.match(f"moma: {section}.{field}: {wrong!r} is (not one|none) of ", capsys.readouterr().err)


def test_what_may_change_is_said_by_the_fields():
    sections = {"mesh", "hosts", "run", "routers", "data.prepare"}
    assert sections < may_change(Config)
    assert {"model.remat", "train.log_every"} < may_change(Config)
    assert not {"model.ffn", "train.seed", "train.batch_rows", "data.lanes"} & may_change(Config)
    assert may_change(RoutersConfig) == {"log_every", "checkpoint_every"}
