"""Studies of tiny runs."""

import json
from pathlib import Path

from tiny import tiny

from moma_jax.config_json import to_json
from moma_jax.cost import total_steps
from moma_jax.studies import Study, Upcycled, Variant

DENSE, MOMA = Variant("dense", {"model.ffn": "dense"}), Variant("2t2i", {"model.ffn": "2t2i"}, match="model.hidden")
GROWN = Variant(
    "grown", {"model.ffn": "2t2i", "model.router.gumbel": True}, "model.hidden", Upcycled({"model.ffn": "1t1i"}, 0.3)
)
TOKENS = 1280
"""Ten updates of the tiny run."""


def study_of(*variants, directory="runs/tiny", **fields) -> Study:
    fields = {"base": tiny(), "tokens": TOKENS, "dir": str(directory)} | fields
    return Study(variants=variants or (DENSE, MOMA), **fields)


def files(path):
    return {str(p.relative_to(path)): p.read_bytes() for p in Path(path).rglob("*") if p.is_file()}


def write_study(path, fields):
    path.write_text(
        "from tiny import tiny\nfrom moma_jax.studies import Study, Variant\n\n\ndef study():\n"
        "    variants = (Variant('dense', {'model.ffn': 'dense'}), Variant('1t1i', {'model.ffn': '1t1i'}))\n"
        "    base = tiny(train_checkpoint_every=20, train_eval_sets=())\n"
        f"    return Study(base, variants, {fields})\n"
    )
    return path


def finish(config, losses=None):
    """The files of a finished run with final losses by evaluation set (1.0 where it is not named)."""
    where, steps = Path(config.run.dir), total_steps(config)
    where.mkdir(parents=True, exist_ok=True)
    losses = {s.name: (losses or {}).get(s.name, 1.0) for s in config.train.eval_sets}
    about = {"schema": 1, "step": steps, "time": 0.0}
    modalities = {"loss_text": 1.0, "loss_image": 1.0, "tokens_text": 9, "tokens_image": 9}
    spent = {"tokens": steps * config.batch_tokens, "flops": 1.0 * steps, "wall_seconds": 1.0 * steps}
    records = [{**about, "kind": "train", "loss": 1.0, **modalities, **spent}]
    records += [
        {**about, "kind": "eval", "eval_set": name, "routing": "choice", "loss": loss, "perplexity": 1.0, **modalities}
        for name, loss in losses.items()
    ]
    evaluation = {name: {"choice": {"loss": loss}} for name, loss in losses.items()}
    (where / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (where / "config.json").write_text(json.dumps(to_json(config)))
    (where / "summary.json").write_text(json.dumps({"steps": steps, "eval": evaluation}))
    (where / "status.json").write_text(json.dumps({"state": "complete", "step": steps, "total": steps}))
