"""What a run is: frozen dataclasses, every field with its unit and, in `setting`, what else is true of it.

A recipe (`configs/NAME.py`) returns a `Config`; the command line overrides any field; `checks.resolve` then checks
every field and refuses contradictions. Nothing here imports JAX, so `moma cost` and the data pipeline start at once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from moma_jax.ffn import ExpertGroup, FfnLayout, depth_groups, parse_ffn
from moma_jax.fields import setting
from moma_jax.router import Router
from moma_jax.routers.choice import Choice

SEED = {"least": 0, "below": 1 << 32}  # JAX cuts seeds to 32 bits: others would be copies of these


@dataclass(frozen=True)
class Modality:
    """One kind of token. The first modality of a config is text."""

    name: str
    """Name, such as "image"; spans of it stand between <name> and </name>."""
    letter: str
    """One lower-case letter for the FFN notation (1t1i)."""
    size: int = setting(above=0, unit="ids")
    """Ids in the vocabulary, special ids included for text."""
    span: int = setting(0, least=0, unit="codes")
    """Codes in one atomic span (16x16 picture: 256); 0 where spans can be cut anywhere."""
    quota: float = setting(1.0, above=0, most=1)
    """Largest share of a routing group's tokens, 0 to 1: the hard bound that the packer keeps."""


TEXT = Modality("text", "t", size=57344, quota=0.5)
IMAGE = Modality("image", "i", size=8192, span=1024, quota=0.5)


@dataclass(frozen=True)
class RopeScaling:
    """Rotary frequencies of a model whose rows became longer after pre-training, as Llama 3.1 slows them: what turns
    less than `low` times in the rows of pre-training turns `factor` times slower, what turns more than `high` times is
    left, and between them one fades into the other."""

    factor: float = setting(8.0, least=1)
    """How many times slower."""
    low: float = setting(1.0, above=0, unit="turns")
    """Turns in the rows of pre-training, below which a channel is slowed in full."""
    high: float = setting(4.0, above=0, unit="turns")
    """Turns above which it is not."""
    positions: int = setting(8192, above=0, unit="positions")
    """Length of the rows of pre-training."""


@dataclass(frozen=True)
class ModelConfig:
    """The decoder (paper sections 2.1 and 2.2)."""

    ffn: str = "4t4i"
    """FFN notation: dense, 8x (mixed-modal experts), 1t1i, 4t4i, ...; +1x adds an always-on shared expert, +1t1i one
    for each modality; mod+4t4i has a mixture of depths in front of it in every second layer."""
    layers: int = setting(8, above=0)
    """Decoder layers."""
    width: int = setting(512, above=0)
    """Model width d."""
    heads: int = setting(8, above=0)
    """Attention heads; they divide the width where head_width is None."""
    kv_heads: int | None = setting(None, above=0)
    """Heads of keys and values, each for as many heads of queries (grouped-query attention); heads where None."""
    head_width: int | None = setting(None, above=0)
    """Channels of a head; width / heads where None."""
    ffn_width: int = setting(2048, above=0)
    """The paper's ffn column; the SwiGLU hidden size is 2/3 of it, rounded up to a multiple of 128."""
    hidden: int | None = setting(None, above=0)
    """SwiGLU hidden size F of one expert; derived from ffn_width where None."""
    norm: Literal["swin", "pre"] = "swin"
    """Norm after each sub-layer (Chameleon-34B, used by MoMa) or before it (Chameleon-7B)."""
    capacity: float | None = setting(None, least=1e-4, most=1)
    """Share of its modality's tokens that one expert takes; 1/|E| of each group where None."""
    depth_capacity: float = setting(0.25, above=0, most=1)
    """mod+ only: share of a row's tokens that enter the layers 0, 2, 4, ...; the others pass them by."""
    depth_by: Literal["modality", "all"] = "modality"
    """mod+ only: rank tokens against those of their own modality, each of which has that share; or all together (the
    paper), so that experts need slots for a layer full of their modality."""
    depth_over: Literal["row", "group"] = "row"
    """mod+ only: rank tokens within their row, each of which lets in that share (the paper); or over the whole routing
    group, so that rows let in more or fewer, as they do under thresholds."""
    depth_room: float = setting(2.0, least=1)
    """depth_over=group: slots of a row over its share; beyond them the latest positions pass the layer by."""
    attention_weights: Literal["shared", "by_modality"] = "shared"
    """Projections and norms of the attention, and the layers' norms: one for all tokens, or each modality's own, with
    attention over all (Mixture-of-Transformers); the FLOPs are the same."""
    router: Router = Choice()
    """The routing rule with its options: choice (the paper's expert choice; sees the future), threshold, or your own,
    file.py:attribute or package.module:attribute (moma_jax/router.py); in Python a name or a Router."""
    qk_norm: Literal["layer", "rms", "none"] = "layer"
    """Norm of queries and keys: LayerNorm with scale and bias of each head (Chameleon), RMSNorm with one scale for all
    heads (Qwen3), or none (Llama)."""
    rope_theta: float = setting(10000.0, above=0)
    """Base of the rotary position frequencies."""
    rope_scaling: RopeScaling | None = None
    """How these are slowed (Llama 3.1); None: not at all."""
    tied_embeddings: bool = False
    """One table for embedding and unembedding."""
    norm_epsilon: float = setting(1e-5, above=0)
    """Epsilon of every norm."""
    dropout: float = setting(0.0, least=0, below=1)
    """Dropout rate on each sub-layer's output, 0 to 1."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute type; parameters stay float32. auto: bfloat16 where the hardware has it, else float32."""
    remat: Literal["none", "dots", "full"] = setting("none", may_change=True)
    """What the backward pass recomputes: nothing, all but matrix products' results, or whole layers."""
    attention_chunk: int = setting(512, above=0, unit="positions", may_change=True)
    """Queries attended at once, in positions: bounds the memory of attention scores."""

    @property
    def key_heads(self) -> int:
        """Heads of keys and values."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def head_size(self) -> int:
        """Channels of a head, K."""
        return self.width // self.heads if self.head_width is None else self.head_width


@dataclass(frozen=True)
class PrepareConfig:
    """How `moma prepare` makes a store."""

    source: str = "scenes"
    """A file or folder of any kind below, local or on gs:// or s3://, or "scenes"."""
    kind: Literal["auto", "parquet", "tar", "jsonl", "folder", "codes", "scenes"] = "auto"
    """parquet: pairs, text, interleaved (also as OBELICS); tar: WebDataset; jsonl: documents, text, pairs, MMC4;
    folder: pictures with .txt captions or metadata.csv/.jsonl; codes: pictures coded elsewhere; auto looks at it."""
    caption_column: str | None = None
    """Column or key of the text; None: caption, text, or another of the usual names, where there is one."""
    image_column: str | None = None
    """Column or suffix of the picture; None: the one that holds pictures."""
    image_codes_column: str | None = None
    """codes only: column or key of a picture's codes, a list or the JSON of one; None: codes."""
    images: str | None = None
    """Folder or tars with the pictures that interleaved documents name."""
    image_map: str | None = None
    """Parquet, CSV or JSON lines with columns url and key: which picture of `images` is meant by which address."""
    missing_pictures: Literal["broken", "skip"] = "broken"
    """Documents that name pictures which `images` has not: broken, or read without them, counted."""
    documents: int = setting(20000, above=0)
    """Training documents that `scenes` generates (a tenth of them as many again are held out)."""
    seed: int = setting(0, **SEED)
    """Seed of `scenes` and of the samples that the tokenizer and the palette are fitted on."""
    text_size: int = setting(4096, above=0, unit="ids")
    """Text ids, special ids and bytes included, of the BPE that is trained."""
    tokenizer: str | None = None
    """A tokenizer.json to use instead of training one."""
    image_side: int = setting(16, above=0, unit="pixels")
    """Side N of the N x N palette picture, in pixels: N*N codes."""
    colours: int = setting(512, least=1, most=1 << 16)
    """Colours K of the palette."""
    codec: str | None = None
    """Folder of an image tokenizer (`moma codec import`) to use instead of a palette."""
    vocabulary: str | None = None
    """Another store whose tokenizer, palette and id layout are used as they are."""
    crop: Literal["auto", "whole", "centre", "random"] = "auto"
    """How a picture becomes square: scaled as a whole, its middle square, or a square anywhere (by seed and picture);
    auto: as the image tokenizer was made for."""
    ground: str = "#ffffff"
    """Colour under transparent pixels, #rrggbb."""
    min_side: int = setting(0, least=0, unit="pixels")
    """Pictures whose shorter side is below are left out, and pairs with them; counted."""
    max_aspect: float = setting(0.0, least=0)
    """Pictures whose longer side is more than so many times the shorter are left out; 0: none."""
    min_caption: int = setting(0, least=0, unit="characters")
    """Pairs with a shorter caption are left out, counted."""
    max_caption: int = setting(0, least=0, unit="characters")
    """Pairs with a longer caption are left out, counted; 0: none."""
    drop_duplicates: bool = False
    """Of pairs that show the same picture, pixel by pixel as the image tokenizer reads it, only the first stays
    (several captions of one row of the source all do), and held-out documents whose pictures are trained on go."""
    image_first: float = setting(0.5, least=0, most=1)
    """Share of pairs whose picture comes before the text, by content hash."""
    prompt_weight: float = setting(1.0, least=0)
    """Weight in the loss of what comes first in a pair; 0 masks the prompt."""
    codebook: int | None = setting(None, above=0, unit="codes")
    """codes only: size of the codebook."""
    codes_per_image: int | None = setting(None, above=0, unit="codes")
    """codes only: codes of one picture."""
    held_out: float = setting(0.05, least=0, below=1)
    """Share of documents held out, by content hash, where the source has no split of its own."""
    parts: int = setting(8, above=0)
    """Parts that the store is written in; a store of other parts is another store."""
    shard_bytes: int = setting(256 << 20, above=0, unit="bytes")
    """Bytes of one shard file."""
    chunk_tokens: int = setting(65536, above=0, unit="tokens")
    """Tokens of one inner chunk, the unit of reading."""


@dataclass(frozen=True)
class StoreConfig:
    """One collection of a store, as an ingredient of the mixture."""

    name: str
    """Name in metrics (epoch_<name>)."""
    path: str
    """The store's directory: local, gs:// or s3://."""
    collection: Literal["all", "text", "pairs", "interleaved"] = "all"
    """Documents to use."""
    share: dict[str, float] = setting(factory=dict, least=0, most=1)
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
    prepare: PrepareConfig | None = setting(None, may_change=True)
    """How to make the stores' directory where it is missing; None: it must exist."""
    tuning: float = setting(0.0, least=0)
    """Share of the training documents that no update sees (at most a half): evaluation sets with split="tuning" are
    packed from them, to choose settings on without the held-out split."""
    sequence: int = setting(4096, above=0, unit="tokens")
    """Row length S, in tokens."""
    group_rows: int = setting(8, above=0, unit="rows")
    """Rows of one routing group, the unit of packing and of expert choice."""
    lanes: int = setting(16, above=0)
    """Independent packing lanes; at least the largest number of hosts ever used. Hosts share the planning where they
    are a multiple of the routing groups in one batch (train.batch_rows / group_rows); else each plans everything."""
    wait_documents: int = setting(64, above=0)
    """Documents that may wait in one lane's cursor for a row with room."""
    window_documents: int = setting(16384, above=0)
    """Documents of one shuffling window of a lane."""
    seed: int = setting(0, **SEED)
    """Seed of the document order."""
    prefetch: int = setting(4, above=0, unit="batches", may_change=True)
    """Batches made ahead."""
    read_threads: int = setting(2, above=0, may_change=True)
    """Threads that read and assemble batches."""
    cache_bytes: int = setting(256 << 20, least=0, unit="bytes", may_change=True)
    """Cache of decoded chunks per host."""
    read_concurrency: int = setting(64, above=0, may_change=True)
    """Reads in flight."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW as Chameleon and the paper use it (Table 5)."""

    peak_lr: float = setting(1e-4, above=0)
    """Learning rate after warm-up."""
    end_lr: float = setting(1e-6, least=0)
    """Learning rate at the last step."""
    schedule: Literal["linear", "cosine"] = "linear"
    """Shape of the decay from peak to end."""
    warmup_steps: int = setting(4000, least=0, unit="steps")
    """Steps of linear warm-up from 0."""
    beta1: float = setting(0.9, least=0, below=1)
    """Decay of the first moment."""
    beta2: float = setting(0.95, least=0, below=1)
    """Decay of the second moment."""
    epsilon: float = setting(1e-5, above=0)
    """AdamW's epsilon."""
    weight_decay: float = setting(0.1, least=0)
    """Decoupled weight decay of matrices and embeddings; norms are not decayed."""
    clip_norm: float = setting(1.0, above=0)
    """Bound on the global gradient norm."""


@dataclass(frozen=True)
class RoutersConfig:
    """The second stage, `moma routers fit`: auxiliary routers are fitted to a trained model (paper Table 6)."""

    steps: int = setting(5000, above=0, unit="updates")
    """Updates."""
    batch_rows: int | None = setting(None, above=0, unit="rows")
    """Rows of one update; train.batch_rows where None."""
    peak_lr: float = setting(1e-4, above=0)
    """Learning rate after warm-up."""
    end_lr: float = setting(1e-6, least=0)
    """Learning rate at the last step."""
    schedule: Literal["linear", "cosine"] = "linear"
    """Shape of the decay from peak to end."""
    warmup_steps: int = setting(1000, least=0, unit="steps")
    """Steps of linear warm-up from 0."""
    seed: int = setting(0, **SEED)
    """Seed of the initial weights."""
    log_every: int = setting(10, above=0, unit="steps", may_change=True)
    """Steps between records."""
    checkpoint_every: int = setting(500, above=0, unit="steps", may_change=True)
    """Steps between checkpoints; the last step is always saved."""


@dataclass(frozen=True)
class EvalSet:
    """A named held-out evaluation set."""

    name: str = "heldout"
    """Name in eval records (eval_set)."""
    stores: tuple[str, ...] = ()
    """Names of the data.stores to draw from; () means all."""
    split: Literal["validation", "tuning"] = "validation"
    """validation: the stores' held-out documents; tuning: those that data.tuning keeps from training."""
    rows: int = setting(64, above=0, unit="rows")
    """Rows to evaluate, whole routing groups; fewer where the held-out split ends earlier."""
    seed: int = setting(0, **SEED)
    """Seed of the order in which held-out documents are packed."""
    every: int | None = setting(None, above=0, unit="steps")
    """Steps between evaluations; train.eval_every where None."""


@dataclass(frozen=True)
class SampleConfig:
    """What a run writes and draws while it trains, to be looked at: RUN/sheets/NAME-STEP.png and .json."""

    prompts: tuple[str, ...] = ("",)
    """Texts, each a prompt; an <image> in one is the place of a picture."""
    images: tuple[str, ...] = ()
    """Files of pictures, in the order of their places."""
    name: str = "samples"
    """In the names of files."""
    mode: Literal["free", "text", "image"] = "image"
    """What follows a prompt: text and pictures as the model decides, text alone, or one picture."""
    routing: str | None = None
    """A causal routing; None: the first that the run has."""
    every: int | None = setting(None, above=0, unit="steps")
    """Steps between samples; None: at the end alone."""
    max_tokens: int | None = setting(None, above=0, unit="tokens")
    """Length of texts; None: what the context holds."""
    temperature: float = setting(1.0, least=0)
    """Of text and of pictures."""
    guidance: float = setting(1.0, least=0)
    """Of pictures by their text, classifier-free; 1: none."""
    seed: int = setting(0, **SEED)
    """Of the first prompt; the next have the next ones."""


@dataclass(frozen=True)
class TrainConfig:
    """How long, how much at a time, what is watched."""

    steps: int | None = setting(None, above=0, unit="updates")
    """Optimizer updates. Exactly one of steps, tokens, flops."""
    tokens: float | None = setting(None, above=0, unit="positions")
    """Training length in positions (rows x sequence), rounded up to whole updates."""
    flops: float | None = setting(None, above=0, unit="FLOPs")
    """Training length in FLOPs by `moma cost`'s convention, rounded up to whole updates."""
    batch_rows: int = setting(64, above=0, unit="rows")
    """Rows of one update, over all devices."""
    accumulate: int = setting(1, above=0, unit="microbatches", may_change=True)
    """Microbatches of one update; each holds whole routing groups."""
    z_loss: float = setting(1e-5, least=0)
    """Weight of the squared log-partition of the output logits."""
    loss_chunk: int = setting(2048, above=0, unit="tokens", may_change=True)
    """Tokens whose logits exist at once."""
    seed: int = setting(0, **SEED)
    """Seed of the initial weights, dropout and routing noise."""
    on_nan: Literal["stop", "skip"] = setting("stop", may_change=True)
    """A loss or gradient that is not finite: stop with the last good checkpoint named, or skip the update."""
    log_every: int = setting(10, above=0, unit="steps", may_change=True)
    """Steps between train records."""
    eval_every: int = setting(500, above=0, unit="steps")
    """Steps between evaluations; the last step is always evaluated."""
    eval_sets: tuple[EvalSet, ...] = (EvalSet(),)
    """Held-out sets."""
    eval_routings: tuple[str, ...] = ()
    """Routings to evaluate under; (): all that the run has."""
    calibrate: int = setting(16, least=0, unit="batches", may_change=True)
    """Batches of training that thresholds are set by under the final weights, before the last evaluation, as by
    `moma routers calibrate`; 0: those of training stay."""
    samples: tuple[SampleConfig, ...] = setting((), may_change=True)
    """What is written and drawn after evaluations."""
    telemetry: bool = setting(True, may_change=True)
    """Count at each evaluation what every expert takes, in RUN/routing/SET-STEP.parquet (evaluation/telemetry.py)."""
    checkpoint_every: int = setting(500, above=0, unit="steps", may_change=True)
    """Steps between checkpoints; the last step is always saved."""
    keep_last: int = setting(2, above=0, unit="checkpoints", may_change=True)
    """Newest checkpoints that are kept."""
    keep_every: int | None = setting(None, above=0, unit="steps", may_change=True)
    """Besides, keep every checkpoint whose step is a multiple of this."""
    profile_steps: tuple[int, ...] = setting((), above=0, may_change=True)
    """First and last step of a profile, written to RUN/profile; (): none."""


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis of the mesh; one may be -1 for what is left. Changes speed and memory, never results."""

    data: int = -1
    """Copies of the model."""
    fsdp: int = 1
    """Parts that parameters are stored in; they are gathered layer by layer."""
    expert: int = 1
    """Parts that the experts of a group are dealt to; tokens travel to them. A group that it does not divide is stored
    in parts like everything else, and its tokens stay."""
    tensor: int = 1
    """Parts of heads, hidden width and vocabulary."""


@dataclass(frozen=True)
class HostsConfig:
    """Processes of one run, one per host. Changes speed, never results."""

    start: Literal["auto", "off", "on"] = "auto"
    """auto: join the others where a Cloud TPU pod, Slurm, GKE or the fields below say that there are any."""
    coordinator: str | None = None
    """ADDRESS:PORT of process 0; found out where None."""
    count: int | None = setting(None, above=0, unit="processes")
    """Number of processes; found out where None."""
    index: int | None = setting(None, least=0)
    """Number of this process, from 0; found out where None."""
    heartbeat_seconds: int = setting(20, above=0, unit="seconds")
    """A process that is silent for so long is dead, and the others stop."""


@dataclass(frozen=True)
class RunConfig:
    """Where a run lives."""

    dir: str | None = None
    """Run directory; runs/<recipe name> where None. A run there goes on from its last checkpoint."""
    init_from: str | None = None
    """A run directory whose newest weights start this run (step 0, fresh optimizer)."""
    verify: bool = True
    """Read a checkpoint against its list of CRC-32C (by process 0) before something is trained on from it."""
    save_retries: int = setting(3, least=0, unit="saves")
    """Failed saves in a row that a run puts up with: the next one is begun at the next record, the last one at once."""
    save_share: float = setting(0.05, above=0)
    """Share of the time that saving may hold up training before a warning is recorded."""
    tensorboard: bool = True
    """Write tensorboard/ beside metrics.jsonl."""
    wandb: str | None = None
    """Project of Weights & Biases that records go to as well (extra: wandb); WANDB_MODE=offline keeps them here."""
    compilation_cache: str | None = None
    """Directory in which compiled programs are kept; None: in the user's cache folder; off: nowhere. They are code: a
    folder is taken from a recipe, the command line or Python, never from a config.json."""
    compiler_options: dict[str, str] = setting(factory=dict)
    """Options of the XLA compiler for the step, besides those of moma_jax/compiling.py; "" takes one of these out."""


@dataclass(frozen=True)
class Config:
    """A whole run. It may go on with another mesh, hosts, settings of the run, and routers, a stage of its own."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    mesh: MeshConfig = setting(MeshConfig(), may_change=True)
    hosts: HostsConfig = setting(HostsConfig(), may_change=True)
    routers: RoutersConfig = setting(RoutersConfig(), may_change=True)
    run: RunConfig = setting(RunConfig(), may_change=True)

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

    @cached_property
    def depth(self) -> tuple[ExpertGroup, ...]:
        """The routers of mixture of depths; () without it."""
        return depth_groups(self.model.depth_by, self.data.modalities) if self.experts.depth else ()

    @property
    def routed(self) -> tuple[ExpertGroup, ...]:
        """What a router lets some tokens enter: groups of several experts, and layers (mixture of depths)."""
        return tuple(group for group in self.experts.groups if group.routed) + self.depth


def quota_tokens(modality: Modality, group_tokens: int) -> int:
    """Tokens that a quota share allows in a routing group of `group_tokens` positions (rounded to nearest)."""
    return min(group_tokens, round(modality.quota * group_tokens))


def with_router(config: Config, router: Router) -> Config:
    """The config with another routing rule."""
    return replace(config, model=replace(config.model, router=router))
