"""A Llama or a Qwen3 of Hugging Face as a dense decoder that has room for pictures; layout.py has its tensors.

Its ids become those of any run of text and pictures, which `moma prepare` makes too:

    0 to 5            <s> <pad> </s> <unk> <image> </image>
    6 and up          the source's, in their order; then unused ones, so that text has a multiple of 128
    behind the text   the codes of pictures

The marks of documents get the rows of the source's own: <s> those of its bos token (where it has none, as Qwen3: of the
token that ends a document, which in its training stood before the next), </s> those of eos, <pad> and <unk> those of
pad and unk where there are such. All other new rows are drawn, each channel normal with the mean and the deviation that
it has over the source's ids, so a code is at first about as likely as a rare word.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moma_jax.checks import round_up
from moma_jax.codec import Codec
from moma_jax.config import IMAGE, TEXT, Modality, ModelConfig
from moma_jax.convert.layout import decoder_described, decoder_fields, require_count, require_positive, tokens_of
from moma_jax.convert.weights import CONFIG, TOKENIZER, read_json
from moma_jax.data.text import TextCodec, load_tokenizer
from moma_jax.errors import InputError
from moma_jax.vocab import BEGIN_DOCUMENT, END_DOCUMENT, PAD, UNKNOWN, Vocabulary, special_tokens

SPECIAL = special_tokens([IMAGE.name])
"""Before the source's ids."""
IDS_MULTIPLE = 128
"""Text has a multiple of so many ids, which devices can share."""
LONGEST = 4096
"""Positions of a row that a converted run asks for, where the source was trained on longer ones."""
ROWS = 8192
"""Of a table of ids, held at a time."""
TOKENIZER_CONFIG = "tokenizer_config.json"
MARKS = {"unk": UNKNOWN, "pad": PAD, "bos": BEGIN_DOCUMENT, "eos": END_DOCUMENT}
"""Hugging Face's names of our marks. Where several are one token there, the last is what it becomes on the way back."""


class Family(NamedTuple):
    """A kind of language model.

    Attributes:
      name: its model_type. title: for people. qk_norm: of ModelConfig. defaults: what its config.json may leave out.
    """

    name: str
    title: str
    qk_norm: str
    defaults: dict[str, Any]

    @property
    def architecture(self) -> str:
        """The class of transformers."""
        return f"{self.title}ForCausalLM"


_DEFAULTS = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
}
LLAMA = Family(
    "llama",
    "Llama",
    "none",
    _DEFAULTS
    | {"vocab_size": 32000, "intermediate_size": 11008, "num_key_value_heads": None, "head_dim": None}
    | {"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
)
QWEN3 = Family(
    "qwen3",
    "Qwen3",
    "rms",
    _DEFAULTS
    | {"vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32, "head_dim": 128}
    | {"max_position_embeddings": 32768},
)
FAMILIES = {family.name: family for family in (LLAMA, QWEN3)}


class LanguageModel(NamedTuple):
    """What the files of a folder say that are no weights.

    Attributes:
      ids: of its vocabulary. first: our id of its first; 0 where it has our special ids at their places already.
      rows: our special ids -> our ids of those tokens of its own whose rows they have.
      begins: whether it has a bos token of its own. ending: the token that ends a document.
      text: its tokenizer, with our ids. sequence: positions that it was trained on.
    """

    folder: Path
    family: Family
    model: ModelConfig
    ids: int
    first: int
    rows: dict[int, int]
    begins: bool
    ending: str
    text: TextCodec
    sequence: int


def read_language_model(folder: Path, family: Family) -> LanguageModel:
    """Reads config.json, tokenizer.json and tokenizer_config.json; InputError where they are of no such model."""
    where, config = f"{folder}/{CONFIG}", read_json(folder / CONFIG)
    if (kind := config.get("model_type")) != family.name:
        known = f"; moma convert from-{kind} reads it" if kind in (*FAMILIES, "chameleon") else ""
        raise InputError(f"{where}: model_type is {str(kind)[:40]!r}, not {family.name!r}{known}")
    value = {**family.defaults, **config}
    if not (folder / TOKENIZER).is_file():
        raise InputError(f"{folder}: has no {TOKENIZER}, so text cannot be encoded; add it")
    tokenizer = read_json(folder / TOKENIZER)
    ids, tokens = require_count(value["vocab_size"], f"{where}: vocab_size"), tokens_of(tokenizer, where)
    if odd := [token for token, number in tokens.items() if type(number) is not int or number < 0]:
        raise InputError(f"{folder / TOKENIZER}: token {odd[0][:40]!r} has no whole number as its id; fetch it again")
    beyond = max(tokens, key=lambda token: tokens[token], default="")
    if beyond and tokens[beyond] >= ids:
        raise InputError(
            f"{folder / TOKENIZER}: token {beyond!r} has id {tokens[beyond]}, and from vocab_size {ids} on ids are a "
            "codec's codes; take tokenizer and config of one model"
        )
    marks = _marks(value, folder, tokens)
    begins = marks.get("bos") not in (None, marks["eos"])
    first = 0 if all(tokens.get(token) == number for number, token in enumerate(SPECIAL)) else len(SPECIAL)
    rows = {} if begins else {BEGIN_DOCUMENT: first + marks["eos"]}
    rows |= {MARKS[name]: first + marks[name] for name in MARKS if name in marks and (begins or name != "bos")}
    text = load_tokenizer(str(folder / TOKENIZER), SPECIAL, field=f"{family.title}: ")
    sequence = require_count(value["max_position_embeddings"], f"{where}: max_position_embeddings")
    ending = next((token for token, number in tokens.items() if number == marks["eos"]), f"id {marks['eos']}")
    model = model_of(value, family, where)
    return LanguageModel(folder, family, model, ids, first, rows, begins, ending, text, sequence)


def model_of(value: dict[str, Any], family: Family, where: str) -> ModelConfig:
    """The decoder that config.json describes."""
    if type(value["tie_word_embeddings"]) is not bool:
        raise InputError(f"{where}: tie_word_embeddings is {value['tie_word_embeddings']!r}, not true or false")
    for name in ("attention_bias", "mlp_bias", "use_sliding_window"):
        if value[name]:
            raise InputError(f"{where}: {name} is {value[name]}; the decoder has none")
    if value["hidden_act"] != "silu":
        raise InputError(f"{where}: hidden_act is {value['hidden_act']}; the decoder has only silu")
    fields = decoder_fields(value, where)
    width = value["head_dim"]
    if width is not None and require_count(width, f"{where}: head_dim") * fields["heads"] == fields["width"]:
        width = None
    return ModelConfig(
        **fields,
        head_width=width,
        norm="pre",
        qk_norm=family.qk_norm,
        tied_embeddings=value["tie_word_embeddings"],
        norm_epsilon=require_positive(value["rms_norm_eps"], f"{where}: rms_norm_eps"),
    )


def _marks(value: dict[str, Any], folder: Path, tokens: dict[str, int]) -> dict[str, int]:
    """The source's ids of what documents need, by Hugging Face's names, those that there are: what the tokenizer's
    config says, else the model's.

    Raises:
      InputError: nothing ends a document, or a mark is no token.
    """
    path = folder / TOKENIZER_CONFIG
    named = read_json(path) if path.is_file() else {}
    found = {}
    for name in MARKS:
        token, number = named.get(f"{name}_token"), value.get(f"{name}_token_id")
        if f"{name}_token" in named:
            token = token.get("content") if isinstance(token, dict) else token
            if token is not None and (not isinstance(token, str) or token not in tokens):
                raise InputError(f"{path}: {name}_token is {str(token)[:40]!r}, which {TOKENIZER} has not; fetch both")
            number = tokens.get(token)
        number = number[0] if isinstance(number, list) and number else number
        if number is None:
            continue
        if type(number) is not int or not 0 <= number < value["vocab_size"]:
            raise InputError(f"{folder / CONFIG}: {name}_token_id is {number!r}, which is no id of the model")
        found[name] = number
    if "eos" not in found:
        raise InputError(f"{folder}: {TOKENIZER_CONFIG}, or {CONFIG} where it is silent, names no eos token; add it")
    return found


def modalities_of(source: LanguageModel, codec: Codec) -> tuple[Modality, ...]:
    """Text and the codec's pictures; half of a routing group each."""
    text = dataclasses.replace(TEXT, size=text_size(source))
    return text, dataclasses.replace(IMAGE, size=codec.codebook, span=codec.codes_per_image)


def text_size(source: LanguageModel) -> int:
    """Ids of text."""
    return round_up(source.first + source.ids, IDS_MULTIPLE)


def extend(params: dict[str, Any], source: LanguageModel, seed: int) -> None:
    """Fills, in place, the rows of all ids that are not the source's; see the top of this module.

    Args:
      params: by path, float32, with "embedding/kernel_VD" and, where it is not tied, "unembedding/kernel_DV".
    """
    tables = [params["embedding/kernel_VD"]]
    tables += [params["unembedding/kernel_DV"].T] if "unembedding/kernel_DV" in params else []
    for number, table_VD in enumerate(tables):
        mean_D, deviation_D = _moments(table_VD[source.first : source.first + source.ids])
        rng = np.random.default_rng((seed, number))
        for start, stop in ((0, source.first), (source.first + source.ids, len(table_VD))):
            for block in range(start, stop, ROWS):
                rows = slice(block, min(block + ROWS, stop))
                drawn_RD = rng.standard_normal((rows.stop - rows.start, len(mean_D)), np.float32)
                table_VD[rows] = mean_D + deviation_D * drawn_RD
        for ours, theirs in source.rows.items():
            table_VD[ours] = table_VD[theirs]


def _moments(table_VD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of each column, float32; a block of rows at a time."""
    sums_D = squares_D = 0.0
    for block in range(0, len(table_VD), ROWS):
        block_RD = table_VD[block : block + ROWS].astype(np.float64)
        sums_D, squares_D = sums_D + block_RD.sum(0), squares_D + np.square(block_RD).sum(0)
    mean_D = sums_D / len(table_VD)
    deviation_D = np.sqrt(np.maximum(squares_D / len(table_VD) - mean_D**2, 0))
    return mean_D.astype(np.float32), deviation_D.astype(np.float32)


# Back -----------------------------------------------------------------------------------------------------------------


def require_language_model(model: ModelConfig, vocabulary: Vocabulary, family: Family) -> None:
    """InputError where a dense decoder, which never was one, does not fit the family's layout."""
    where = f"to-{family.name}"
    for name, right in {"norm": "pre", "qk_norm": family.qk_norm}.items():
        if getattr(model, name) != right:
            raise InputError(f"{where}: model.{name} is {getattr(model, name)}; a {family.title} has {right}")
    if vocabulary.modalities[0].ranges[0][0] != 0 or len(vocabulary.modalities[0].ranges) > 1:
        raise InputError(f"{where}: the text ids of this run are not the first ones, as a table of their own has them")


def config_of(model: ModelConfig, vocabulary: Vocabulary, sequence: int, family: Family) -> dict[str, Any]:
    """The config.json of a run that was no language model before: its text ids, all of them."""
    return {
        "architectures": [family.architecture],
        "model_type": family.name,
        **decoder_described(model),
        "head_dim": model.head_size,
        "vocab_size": vocabulary.modalities[0].size,
        "max_position_embeddings": sequence,
        "rms_norm_eps": model.norm_epsilon,
        "tie_word_embeddings": model.tied_embeddings,
        "attention_bias": False,
        "bos_token_id": vocabulary.begin_document,
        "eos_token_id": vocabulary.end_document,
        "pad_token_id": vocabulary.pad,
    }
