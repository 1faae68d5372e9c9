"""Studies of tiny runs."""

from pathlib import Path

from tiny import tiny

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
