"""What a run is: frozen dataclasses, every field with its unit, all cross-checks made before any device work.

A recipe (`configs/NAME.py`) returns a `Config`; the command line overrides any field; `check` then refuses
contradictions. Nothing here imports JAX, so `moma cost` and the data pipeline start at once.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from typing import Any, Literal

from moma_jax.errors import InputError

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Modality:
    """One kind of token. The first modality of a config is text."""

    name: str
    """Name, such as "image"; spans of it stand between <name> and </name>."""
    letter: str
    """One lower-case letter for the FFN notation (1t1i)."""
    size: int
    """Ids in the vocabulary, special ids included for text."""
    span: int = 0
    """Codes in one atomic span (16x16 picture: 256); 0 where spans can be cut anywhere."""
    quota: float = 1.0
    """Largest share of a routing group's tokens, 0 to 1: the hard bound that the packer keeps."""


TEXT = Modality("text", "t", size=57344, quota=0.5)
IMAGE = Modality("image", "i", size=8192, span=1024, quota=0.5)


@dataclass(frozen=True)
class ModelConfig:
    """The decoder (paper sections 2.1 and 2.2)."""

    ffn: str = "4t4i"
    """FFN notation: dense, 8x (mixed-modal experts), 1t1i, 4t4i, ...; +1x adds an always-on shared expert."""
    layers: int = 8
    """Decoder layers."""
    width: int = 512
    """Model width d."""
    heads: int = 8
    """Attention heads; they divide the width."""
    ffn_width: int = 2048
    """The paper's ffn column; the SwiGLU hidden size is 2/3 of it, rounded up to a multiple of 128."""
    hidden: int | None = None
    """SwiGLU hidden size F of one expert; derived from ffn_width where None."""
    norm: Literal["swin", "pre"] = "swin"
    """Norm after each sub-layer (Chameleon-34B, used by MoMa) or before it (Chameleon-7B)."""
    capacity: float | None = None
    """Share of its modality's tokens that one expert takes; 1/|E| of each group where None."""
    gumbel: bool = False
    """Gumbel-Sigmoid noise on router scores in training (paper Eq. 5)."""
    jitter: float = 1e-3
    """Size of the fixed tie-breaking term added to logits for ranking only; never in the gate."""
    rope_theta: float = 10000.0
    """Base of the rotary position frequencies."""
    norm_epsilon: float = 1e-5
    """Epsilon of every norm."""
    dropout: float = 0.0
    """Dropout rate on each sub-layer's output, 0 to 1."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute type; parameters stay float32. auto: bfloat16 where the hardware has it, else float32."""
    remat: Literal["none", "dots", "full"] = "none"
    """What the backward pass recomputes: nothing, all but matrix products' results, or whole layers."""
    attention_chunk: int = 512
    """Queries attended at once, in positions: bounds the memory of attention scores."""


@dataclass(frozen=True)
class PrepareConfig:
    """How `moma prepare` makes a store."""

    source: str = "scenes"
    """A folder of Parquet (pairs/, text/, interleaved/), a folder of images with .txt captions, a .jsonl file of
    interleaved documents, a folder or file of ready codes, or "scenes"."""
    kind: Literal["auto", "parquet", "folder", "jsonl", "scenes", "codes"] = "auto"
    """What the source is; auto looks at it."""
    documents: int = 20000
    """Training documents that `scenes` generates (a tenth of them as many again are held out)."""
    seed: int = 0
    """Seed of `scenes` and of the samples that the tokenizer and the palette are fitted on."""
    text_size: int = 4096
    """Text ids, special ids and bytes included, of the BPE that is trained."""
    tokenizer: str | None = None
    """A tokenizer.json to use instead of training one."""
    image_side: int = 16
    """Side N of the N x N palette picture, in pixels: N*N codes."""
    colours: int = 512
    """Colours K of the palette."""
    vocabulary: str | None = None
    """Another store whose tokenizer, palette and id layout are used as they are."""
    codebook: int | None = None
    """codes only: size of the codebook."""
    codes_per_image: int | None = None
    """codes only: codes of one picture."""
    held_out: float = 0.05
    """Share of documents held out, by content hash, where the source has no split of its own."""
    parts: int = 8
    """Parts that the store is written in; a store of other parts is another store."""
    shard_bytes: int = 256 << 20
    """Bytes of one shard file."""
    chunk_tokens: int = 65536
    """Tokens of one inner chunk, the unit of reading."""


@dataclass(frozen=True)
class StoreConfig:
    """One collection of a store, as an ingredient of the mixture."""

    name: str
    """Name in metrics (epoch_<name>)."""
    path: str
    """The store's directory: local, gs:// or s3://."""
    collection: str = "all"
    """Documents to use: text, pairs, interleaved, or all."""
    share: dict[str, float] = field(default_factory=dict)
    """Share of each modality's tokens that this store supplies, by modality name; what the documents' own ratio
    implies may be left out."""


@dataclass(frozen=True)
class DataConfig:
    """Which tokens, in which order. Groups depend on this section and the stores alone."""

    kind: Literal["store", "synthetic"] = "store"
    """store: packed documents; synthetic: random tokens at the quotas' ratio, for throughput runs."""
    modalities: tuple[Modality, ...] = (TEXT, IMAGE)
    """The id space: sizes, atomic spans, quotas. Text comes first."""
    stores: tuple[StoreConfig, ...] = ()
    """The mixture."""
    prepare: PrepareConfig | None = None
    """How to make the stores' directory where it is missing; None: it must exist."""
    sequence: int = 4096
    """Row length S, in tokens."""
    group_rows: int = 8
    """Rows of one routing group, the unit of packing and of expert choice."""
    lanes: int = 16
    """Independent packing lanes; at least the largest number of hosts ever used."""
    wait_documents: int = 64
    """Documents that may wait in one lane's cursor for a row with room."""
    window_documents: int = 16384
    """Documents of one shuffling window of a lane."""
    seed: int = 0
    """Seed of the document order."""
    prefetch: int = 4
    """Batches made ahead."""
    read_threads: int = 2
    """Threads that read and assemble batches."""
    cache_bytes: int = 256 << 20
    """Cache of decoded chunks per host."""
    read_concurrency: int = 64
    """Reads in flight."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW as Chameleon and the paper use it (Table 5)."""

    peak_lr: float = 1e-4
    """Learning rate after warm-up."""
    end_lr: float = 1e-6
    """Learning rate at the last step."""
    schedule: Literal["linear", "cosine"] = "linear"
    """Shape of the decay from peak to end."""
    warmup_steps: int = 4000
    """Steps of linear warm-up from 0."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    epsilon: float = 1e-5
    """AdamW's epsilon."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices and embeddings; norms are not decayed."""
    clip_norm: float = 1.0
    """Bound on the global gradient norm."""


@dataclass(frozen=True)
class EvalSet:
    """A named held-out evaluation set."""

    name: str = "heldout"
    """Name in eval records (eval_set)."""
    stores: tuple[str, ...] = ()
    """Names of the data.stores to draw from; () means all."""
    rows: int = 64
    """Rows to evaluate, whole routing groups; fewer where the held-out split ends earlier."""
    seed: int = 0
    """Seed of the order in which held-out documents are packed."""
    every: int | None = None
    """Steps between evaluations; train.eval_every where None."""


@dataclass(frozen=True)
class TrainConfig:
    """How long, how much at a time, what is watched."""

    steps: int | None = None
    """Optimizer updates. Exactly one of steps, tokens, flops."""
    tokens: float | None = None
    """Training length in positions (rows x sequence), rounded up to whole updates."""
    flops: float | None = None
    """Training length in FLOPs by `moma cost`'s convention, rounded up to whole updates."""
    batch_rows: int = 64
    """Rows of one update, over all devices."""
    accumulate: int = 1
    """Microbatches of one update; each holds whole routing groups."""
    z_loss: float = 1e-5
    """Weight of the squared log-partition of the output logits."""
    loss_chunk: int = 2048
    """Tokens whose logits exist at once."""
    seed: int = 0
    """Seed of the initial weights, dropout and routing noise."""
    on_nan: Literal["stop", "skip"] = "stop"
    """A loss or gradient that is not finite: stop with the last good checkpoint named, or skip the update."""
    log_every: int = 10
    """Steps between train records."""
    eval_every: int = 500
    """Steps between evaluations; the last step is always evaluated."""
    eval_sets: tuple[EvalSet, ...] = (EvalSet(),)
    """Held-out sets."""
    checkpoint_every: int = 500
    """Steps between checkpoints; the last step is always saved."""
    keep_last: int = 2
    """Newest checkpoints that are kept."""
    keep_every: int | None = None
    """Besides, keep every checkpoint whose step is a multiple of this."""


@dataclass(frozen=True)
class MeshConfig:
    """Devices. Changes speed, never results."""

    data: int = -1
    """Devices of data parallelism; -1: all local devices."""


@dataclass(frozen=True)
class RunConfig:
    """Where a run lives."""

    dir: str | None = None
    """Run directory; runs/<recipe name> where None. A run there goes on from its last checkpoint."""
    init_from: str | None = None
    """A run directory whose newest weights start this run (step 0, fresh optimizer)."""
    tensorboard: bool = True
    """Write tensorboard/ beside metrics.jsonl."""
    compilation_cache: str | None = None
    """Directory of JAX's persistent compilation cache."""


@dataclass(frozen=True)
class Config:
    """A whole run."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    mesh: MeshConfig = MeshConfig()
    run: RunConfig = RunConfig()

    @property
    def group_tokens(self) -> int:
        """Positions T of one routing group."""
        return self.data.group_rows * self.data.sequence

    @property
    def quotas(self) -> tuple[int, ...]:
        """Hard bound on tokens of each modality in one routing group."""
        return tuple(quota_tokens(m, self.group_tokens) for m in self.data.modalities)

    @property
    def vocabulary_size(self) -> int:
        """Ids of all modalities."""
        return sum(m.size for m in self.data.modalities)

    @property
    def batch_tokens(self) -> int:
        """Positions of one update."""
        return self.train.batch_rows * self.data.sequence

    @cached_property
    def experts(self) -> FfnLayout:
        """The parsed FFN notation."""
        return parse_ffn(self.model.ffn, self.data.modalities)


def quota_tokens(modality: Modality, group_tokens: int) -> int:
    """Tokens that a quota share allows in a routing group of `group_tokens` positions (rounded to nearest)."""
    return min(group_tokens, round(modality.quota * group_tokens))


# The FFN notation -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExpertGroup:
    """Experts that share a router: the modalities they serve (indices) and how many they are."""

    name: str
    modalities: tuple[int, ...]
    experts: int

    def capacity(self, capacity: float | None) -> Fraction:
        """Share of eligible tokens that each expert takes, exact (paper: c_e = 1/|E|)."""
        if self.experts == 1:
            return Fraction(1)
        return Fraction(1, self.experts) if capacity is None else Fraction(capacity).limit_denominator(10000)


@dataclass(frozen=True)
class FfnLayout:
    """What an FFN layer is made of: groups of routed experts and always-on shared experts.

    `dense` is one group of one expert that serves every modality. A group of one expert has no router and gate 1.
    """

    groups: tuple[ExpertGroup, ...]
    shared: int = 0

    @property
    def dense(self) -> bool:
        """True where every token simply passes one expert."""
        return len(self.groups) == 1 and self.groups[0].experts == 1


def parse_ffn(notation: str, modalities: tuple[Modality, ...]) -> FfnLayout:
    """Reads `dense`, `8x`, `4t4i`, `4t4i+1x`, ...; raises InputError naming what is wrong."""
    everything = tuple(range(len(modalities)))
    routed, _, shared_text = notation.partition("+")
    shared = re.fullmatch(r"([1-9]\d*)x", shared_text) if shared_text else None
    mixed = re.fullmatch(r"([1-9]\d*)x", routed)
    counts = re.findall(r"(\d+)([a-z])", routed)
    if routed == "dense":
        groups = (ExpertGroup("all", everything, 1),)
    elif mixed:
        groups = (ExpertGroup("all", everything, int(mixed[1])),)
    elif counts and "".join(n + letter for n, letter in counts) == routed:
        groups = _modality_groups(notation, counts, modalities)
    else:
        groups = ()
    if not groups or ("+" in notation and not shared):
        raise InputError(f"model.ffn: {notation!r} is not an FFN; write dense, 8x, 1t1i, 4t4i or 4t4i+1x")
    return FfnLayout(groups, int(shared[1]) if shared else 0)


def _modality_groups(notation, counts, modalities) -> tuple[ExpertGroup, ...]:
    letters = {m.letter: index for index, m in enumerate(modalities)}
    by_letter = {letter: int(n) for n, letter in counts}
    unknown = set(by_letter) - set(letters)
    if unknown:
        raise InputError(
            f"model.ffn: {notation!r} has experts of modality {min(unknown)!r}, which has no quota: add it to "
            f"data.modalities or use the letters {', '.join(letters)}"
        )
    missing = [m.letter for m in modalities if not by_letter.get(m.letter)]
    if missing or len(counts) != len(by_letter):
        raise InputError(f"model.ffn: {notation!r} must name each of {', '.join(letters)} once, at least 1 expert each")
    return tuple(ExpertGroup(m.name, (index,), by_letter[m.letter]) for index, m in enumerate(modalities))


# Derived fields and cross-checks --------------------------------------------------------------------------------------


def round_up(value: float, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `value`."""
    return -(-int(-(-value // 1)) // multiple) * multiple


def resolve(config: Config) -> Config:
    """Fills the derived fields (those that are None in a recipe) and checks the result."""
    model = config.model
    if model.hidden is None:
        model = dataclasses.replace(model, hidden=-(-model.ffn_width * 2 // (3 * 128)) * 128)
    resolved = dataclasses.replace(config, model=model)
    check(resolved)
    return resolved


def check(config: Config) -> None:
    """Raises InputError for the first contradiction, naming the field and a value that would be right."""
    _check_ranges(config)
    _check_modalities(config)
    _check_model(config)
    _check_batches(config)
    _check_data(config)
    _check_length(config)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


def _check_ranges(config: Config) -> None:
    positive = {
        "model": ("layers", "width", "heads", "ffn_width", "hidden", "attention_chunk"),
        "data": ("sequence", "group_rows", "lanes", "wait_documents", "window_documents", "prefetch", "read_threads"),
        "optimizer": ("peak_lr", "epsilon", "clip_norm"),
        "train": ("batch_rows", "accumulate", "loss_chunk", "log_every", "eval_every", "checkpoint_every", "keep_last"),
    }
    for section, names in positive.items():
        for name in names:
            value = getattr(getattr(config, section), name)
            _require(value is not None and value > 0, f"{section}.{name}: must be positive, is {value}")
    shares = {"model.dropout": config.model.dropout, "optimizer.beta1": config.optimizer.beta1,
              "optimizer.beta2": config.optimizer.beta2}  # fmt: skip
    for name, value in shares.items():
        _require(0 <= value < 1, f"{name}: must be at least 0 and below 1, is {value}")
    capacity = config.model.capacity
    _require(capacity is None or 0 < capacity <= 1, f"model.capacity: must be above 0 and at most 1, is {capacity}")
    _require(config.mesh.data == -1 or config.mesh.data > 0, "mesh.data: must be -1 or positive")


def _check_model(config: Config) -> None:
    model = config.model
    if model.width % model.heads or (model.width // model.heads) % 2:
        right = max(h for h in range(1, model.heads + 1) if model.width % h == 0 and (model.width // h) % 2 == 0)
        raise InputError(
            f"model.heads: {model.heads} heads do not divide the width {model.width} into even head widths; "
            f"{right} would"
        )
    parse_ffn(model.ffn, config.data.modalities)


def _check_modalities(config: Config) -> None:
    modalities, tokens = config.data.modalities, config.group_tokens
    _require(bool(modalities), "data.modalities: name at least text")
    _require(len({m.letter for m in modalities}) == len(modalities), "data.modalities: two have the same letter")
    _require(len({m.name for m in modalities}) == len(modalities), "data.modalities: two have the same name")
    _require(modalities[0].span == 0, "data.modalities: the first is text and has span 0")
    for m, quota in zip(modalities, config.quotas, strict=True):
        _require(m.size > 0, f"data.modalities: {m.name} has size {m.size}; give the number of its ids")
        _require(0 < m.quota <= 1, f"data.modalities: {m.name} has quota {m.quota}; give a share above 0, at most 1")
        _require(
            quota >= max(m.span, 1),
            f"data.modalities: the quota of {m.name}, {quota} tokens of a routing group of {tokens}, cannot hold one "
            f"span of {m.span}; raise it to {max(m.span, 1) / tokens:.3f} or more, or data.group_rows",
        )
        if m.span:
            _require(
                m.span + 3 <= config.data.sequence,
                f"data.sequence: {config.data.sequence} positions cannot hold a span of {m.name} ({m.span} codes and "
                f"its marks); use {m.span + 3} or more",
            )
    total = sum(m.quota for m in modalities)
    _require(
        total >= 1 - 1e-6,
        f"data.modalities: the quotas add up to {total:.3f}, so no routing group could be filled; raise them to 1",
    )


def _check_batches(config: Config) -> None:
    rows, step = config.train.batch_rows, config.data.group_rows * config.train.accumulate
    _require(
        rows % step == 0,
        f"train.batch_rows: {rows} rows do not split into {config.train.accumulate} microbatches of whole routing "
        f"groups of {config.data.group_rows} rows; use {round_up(rows, step)}",
    )
    for eval_set in config.train.eval_sets:
        _require(
            eval_set.rows > 0 and eval_set.rows % config.data.group_rows == 0,
            f"train.eval_sets: {eval_set.name} has {eval_set.rows} rows; use whole routing groups, such as "
            f"{round_up(max(eval_set.rows, 1), config.data.group_rows)}",
        )
    names = [s.name for s in config.train.eval_sets]
    _require(len(set(names)) == len(names), "train.eval_sets: two have the same name")


def _check_data(config: Config) -> None:
    data = config.data
    _require(data.kind == "synthetic" or bool(data.stores), "data.stores: name a store, or set data.kind=synthetic")
    names = [s.name for s in data.stores]
    _require(len(set(names)) == len(names), "data.stores: two have the same name")
    for eval_set in config.train.eval_sets:
        for name in eval_set.stores:
            _require(name in names, f"train.eval_sets: {eval_set.name} draws from {name!r}; data.stores has {names}")
    known = {m.name for m in data.modalities}
    for store in data.stores:
        for name, share in store.share.items():
            _require(
                name in known, f"data.stores: {store.name} has a share of {name!r}; modalities are {sorted(known)}"
            )
            _require(0 <= share <= 1, f"data.stores: {store.name} has a share of {share} of {name}; give 0 to 1")


def _check_length(config: Config) -> None:
    train = config.train
    given = [name for name in ("steps", "tokens", "flops") if getattr(train, name) is not None]
    _require(
        len(given) == 1,
        f"train.steps: give exactly one of train.steps, train.tokens, train.flops; given: {', '.join(given) or 'none'}",
    )
    _require(getattr(train, given[0]) > 0, f"train.{given[0]}: must be positive")


# Dictionaries ---------------------------------------------------------------------------------------------------------


def to_json(config: Config) -> dict[str, Any]:
    """The content of config.json: plain values and a format version."""
    return {"format_version": FORMAT_VERSION, **dataclasses.asdict(config)}


def from_json(data: dict[str, Any]) -> Config:
    """Reads `to_json`'s dictionary; raises InputError for unknown or missing keys and other format versions."""
    if data.get("format_version") != FORMAT_VERSION:
        raise InputError(
            f"config.json: format_version {data.get('format_version')!r}; this version of moma_jax reads {FORMAT_VERSION}"
        )
    return _read(Config, {k: v for k, v in data.items() if k != "format_version"}, "config")


def _read(kind: Any, value: Any, where: str) -> Any:
    """`value` of a JSON document as the annotated type `kind`."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        _require(isinstance(value, dict), f"{where}: expected an object, found {value!r}")
        unknown = sorted(set(value) - set(hints))
        _require(not unknown, f"{where}: unknown key {', '.join(unknown)}; known: {', '.join(hints)}")
        required = {
            f.name
            for f in dataclasses.fields(kind)
            if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        }
        missing = sorted(required - set(value))
        _require(not missing, f"{where}: missing key {', '.join(missing)}")
        return kind(**{k: _read(hints[k], v, f"{where}.{k}") for k, v in value.items()})
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _read(next(a for a in arguments if a is not type(None)), value, where)
    if origin is tuple:
        _require(isinstance(value, (list, tuple)), f"{where}: expected a list, found {value!r}")
        return tuple(_read(arguments[0], item, f"{where}.{i}") for i, item in enumerate(value))
    if origin is dict:
        return {k: _read(arguments[1], v, f"{where}.{k}") for k, v in value.items()}
    if origin is Literal:
        _require(value in arguments, f"{where}: {value!r} is not one of {', '.join(map(str, arguments))}")
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    _require(type(value) is kind, f"{where}: expected {kind.__name__}, found {value!r}")
    return value


# What may change when a run goes on -----------------------------------------------------------------------------------

MAY_CHANGE = (
    "mesh",
    "run",
    "data.prefetch",
    "data.read_threads",
    "data.cache_bytes",
    "data.read_concurrency",
    "train.log_every",
    "train.checkpoint_every",
    "train.keep_last",
    "train.keep_every",
)


def differences(before: Config, after: Config) -> list[str]:
    """Fields that forbid continuing a run, as lines `section.field: old -> new`."""
    lines = []
    for section in dataclasses.fields(Config):
        old, new = getattr(before, section.name), getattr(after, section.name)
        for f in dataclasses.fields(old):
            path = f"{section.name}.{f.name}"
            changed = getattr(old, f.name) != getattr(new, f.name)
            if changed and section.name not in MAY_CHANGE and path not in MAY_CHANGE:
                lines.append(f"{path}: {getattr(old, f.name)} -> {getattr(new, f.name)}")
    return lines
