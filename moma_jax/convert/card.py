"""The model card of an exported run, from the run's own record: nothing in it is written by hand."""

from __future__ import annotations

from typing import Any

from moma_jax.cost import cost
from moma_jax.runs.directory import RunDir
from moma_jax.runs.resume import SUMMARY
from moma_jax.training.load import Loaded

LOSSES = ("loss", "loss_text", "loss_image", "loss_text_given_image", "loss_image_given_text")


def card(loaded: Loaded, routing: str, dtype: str, name: str) -> str:
    """Markdown.

    Args:
      routing: of the folder's model. dtype: of its matrices. name: of the folder.
    """
    home = RunDir(loaded.run)
    summary, ancestry = (home.read_json(file) or {} for file in (SUMMARY, "ancestry.json"))
    if summary.get("steps") != loaded.step:  # of another checkpoint
        summary = {name: value for name, value in summary.items() if name not in ("eval", "final")}
    parts = [
        f"# {name}",
        _what(loaded, routing, dtype),
        "## Data",
        *_data(loaded, summary),
        "## Training",
        *_training(loaded, summary, ancestry),
        "## Held-out losses",
        *_losses(summary),
        "## Use",
        _USE.format(begin=loaded.vocabulary.begin_document),
    ]
    return "\n\n".join(parts) + "\n"


def _what(loaded: Loaded, routing: str, dtype: str) -> str:
    model, figures = loaded.config.model, cost(loaded.config)
    count = figures["parameters"]
    kinds = " and ".join(m.name for m in loaded.vocabulary.modalities)
    return (
        f"A mixed-modal decoder of {kinds} (MoMa, arXiv 2407.21770), trained with moma_jax and exported by "
        f"`moma convert to-folder`. FFN `{model.ffn}`, {model.layers} layers of width {model.width}; "
        f"{count['total']:,} parameters, of which a token meets {count['active']:,}; "
        f"{figures['flops_per_token']['forward']:.3g} FLOPs a token forward. Matrices are {dtype}, routers and norms "
        f"float32. Tokens are routed by `{routing}`, which looks at no later token."
    )


def _data(loaded: Loaded, summary: dict[str, Any]) -> list[str]:
    """Stores by name, their shares, and how often they were seen."""
    if loaded.config.data.kind != "store":
        return ["Random tokens."]
    final = summary.get("final") or {}
    lines = ["| store | documents | share | epochs |", "|---|---|---|---|"]
    for store in loaded.config.data.stores:
        share = ", ".join(f"{name} {value:g}" for name, value in store.share.items()) or "as it is"
        epochs = final.get(f"epoch_{store.name}")
        lines.append(f"| {store.name} | {store.collection} | {share} | {_figure(epochs)} |")
    hashes = "; ".join(f"{name} {value[:16]}" for name, value in loaded.hashes.items() if value)
    return ["\n".join(lines), f"SHA-256 of what makes ids mean something: {hashes}."]


def _training(loaded: Loaded, summary: dict[str, Any], ancestry: dict[str, Any]) -> list[str]:
    final, tokens = summary.get("final") or {}, loaded.step * loaded.config.batch_tokens
    lines = [
        f"- updates: {loaded.step:,}, of {loaded.config.batch_tokens:,} positions: {tokens:,}",
        f"- FLOPs: {_figure(final.get('flops'))}",
        f"- peak learning rate: {loaded.config.optimizer.peak_lr:g}; seed: {loaded.config.train.seed}",
        f"- moma_jax commit: {summary.get('commit') or 'not recorded'}",
        f"- versions: {', '.join(f'{k} {v}' for k, v in (summary.get('versions') or {}).items()) or 'not recorded'}",
    ]
    if summary.get("converted_from"):
        lines.append(f"- converted from: {summary['converted_from'].rstrip('/').rpartition('/')[2]}")
    if ancestry:
        grown = f"{ancestry['seed_ffn']} of {ancestry['seed_tokens']:,} positions, {ancestry['seed_flops']:.3g} FLOPs"
        lines.append(f"- upcycled from: {grown}")
    return ["\n".join(lines)]


def _losses(summary: dict[str, Any]) -> list[str]:
    """The last evaluation of every set under every routing, nats a token."""
    found = [
        (held_out, routing, figures)
        for held_out, routings in (summary.get("eval") or {}).items()
        for routing, figures in routings.items()
        if isinstance(figures, dict) and figures.get("loss") is not None
    ]
    if not found:
        return ["Not evaluated at this step."]
    names = [name for name in LOSSES if any(figures.get(name) is not None for *_, figures in found)]
    lines = ["| set | routing | " + " | ".join(n.removeprefix("loss_").replace("_", " ") for n in names) + " |"]
    lines.append("|---|---|" + "---|" * len(names))
    for held_out, routing, figures in found:
        values = " | ".join(_figure(figures.get(name)) for name in names)
        lines.append(f"| {held_out} | {routing} | {values} |")
    return ["Nats a token; a routing that is not causal ranks tokens against later ones.", "\n".join(lines)]


def _figure(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, (int, float)) else "not recorded"


_USE = """```sh
pip install torch safetensors
python moma_torch.py . {begin}
```

`moma_torch.py` is a reference, not a fast implementation. Tensors are called `layers.LAYER.PATH`; the last letters of a
name are its axes: D width, H heads, K channels of a head, E experts, F hidden size, V ids."""
