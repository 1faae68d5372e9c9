"""Tiny Chameleons in Hugging Face's layout, random weights, made without torch."""

import json

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from moma_jax.codec.layouts import TAMING, places
from moma_jax.codec.network import VqganConfig
from moma_jax.config_json import to_json
from moma_jax.model.decoder import first_routing_state
from moma_jax.rules import rule_name
from moma_jax.runs.checkpoint import Checkpoints, Saved
from moma_jax.runs.directory import RunDir
from moma_jax.training.step import create_state, make_program
from moma_jax.vocab import contiguous

WIDTH, HEADS, HIDDEN, LAYERS, SEQUENCE = 16, 2, 24, 3, 32
CODES, IDS = 12, 320
FIRST_CODE, BEGIN_IMAGE, END_IMAGE = 5, 30, 31
MARKS = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<racm3:break>": BEGIN_IMAGE, "<eoss>": END_IMAGE}
BYTES = 40
"""Id of the first byte of text."""


def code_name(code: int) -> str:
    return "IMGIMG" + "".join(chr(ord("A") + int(digit)) for digit in str(code)) + "Z"


def code_ids() -> dict[int, int]:
    """Codes among text ids, in two runs and not in order: 6..11 come before 0..5, with an id of text between."""
    return {code: FIRST_CODE + (code + 6) % CODES + (code < 6) for code in range(CODES)}


def tokenizer() -> Tokenizer:
    """Bytes alone, with the marks and the image codes as tokens; the latter not marked as special."""
    names = {**MARKS, **{code_name(code): number for code, number in code_ids().items()}, "<reserved08707>": 32}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({**names, **{byte: BYTES + n for n, byte in enumerate(alphabet)}}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens(list(MARKS)[:4])
    made.add_tokens(["<eoss>", code_name(3)])  # splits text that contains their names
    made.enable_truncation(8)
    return made


def described(**changed) -> dict:
    """The content of config.json."""
    names = json.loads(tokenizer().to_str())["model"]["vocab"]
    return {
        "architectures": ["ChameleonForConditionalGeneration"],
        "model_type": "chameleon",
        "vocab_size": IDS,
        "hidden_size": WIDTH,
        "intermediate_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "max_position_embeddings": SEQUENCE,
        "rope_theta": 500.0,
        "swin_norm": False,
        "vq_config": {"num_embeddings": CODES, "resolution": 4, "channel_multiplier": [1, 1]},
        "vocabulary_map": {**names, "<image>": 32},
        "dtype": "bfloat16",
        **changed,
    }


def shapes(layers: int = LAYERS) -> dict[str, tuple[int, ...]]:
    head = (HEADS, WIDTH // HEADS)
    layer = {f"self_attn.{name}_proj.weight": (WIDTH, WIDTH) for name in "qkvo"}
    layer |= {f"self_attn.{name}_norm.{part}": head for name in "qk" for part in ("weight", "bias")}
    layer |= {f"mlp.{name}_proj.weight": (HIDDEN, WIDTH) for name in ("gate", "up")}
    layer |= {"mlp.down_proj.weight": (WIDTH, HIDDEN)}
    layer |= {f"{name}_layernorm.weight": (WIDTH,) for name in ("input", "post_attention")}
    found = {"model.embed_tokens.weight": (IDS, WIDTH), "lm_head.weight": (IDS, WIDTH), "model.norm.weight": (WIDTH,)}
    found |= {f"model.layers.{n}.{name}": shape for n in range(layers) for name, shape in layer.items()}
    return found | vision_shapes()


def vision_shapes() -> dict[str, tuple[int, ...]]:
    """The image tokenizer: 4 x 4 pixels become 2 x 2 codes; no decoder, of which one convolution is left."""
    config = VqganConfig(
        side=4, channels=32, multipliers=(1, 1), blocks=1, latent=8, codebook=CODES, code_width=3, decoder=False
    )
    found = {place.name: place.shape for place in places(config, TAMING)} | {"post_quant_conv.bias": (8,)}
    return {f"model.vqmodel.{name}": shape for name, shape in found.items()}


def weights(seed: int = 0) -> dict[str, np.ndarray]:
    """Random tensors of all three types: bfloat16, but norms float32 and one projection float16."""
    rng = np.random.default_rng(seed)
    found = {}
    for name, shape in shapes().items():
        value = rng.normal(size=shape) / np.sqrt(shape[-1])
        kind = np.float32 if "norm" in name else np.float16 if "v_proj" in name else ml_dtypes.bfloat16
        found[name] = (1 + value if "norm" in name else value).astype(kind)
    return found


def write(folder, tensors=None, shards: int = 1, with_tokenizer: bool = True, **changed):
    """Writes the folder, with its weights in one file, or in so many shards with an index; returns it."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(described(**changed)))
    (folder / "preprocessor_config.json").write_text('{"size": 4}')
    if with_tokenizer:
        (folder / "tokenizer.json").write_text(tokenizer().to_str())
    tensors = weights() if tensors is None else tensors
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    index = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {name: value for n, (name, value) in enumerate(tensors.items()) if n % shards == shard}
        save_file(part, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


def everything_below(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def tensors_of(folder):
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def require_equal(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype, name
        np.testing.assert_array_equal(found[name].view(np.uint8), value.view(np.uint8), err_msg=name)


def untrained_run(config, hashes=None, change=lambda state: state):
    """What training begins with, or what `change` makes of it, saved as a run."""
    vocabulary, run = contiguous(config.data.modalities), RunDir(config.run.dir)
    state = change(create_state(make_program(config), first_routing_state(config)))
    hashes = {"vocabulary": vocabulary.hash} if hashes is None else hashes
    meta = {"vocabulary": vocabulary.to_json(), "hashes": hashes, "router": rule_name(config.model.router)}
    with Checkpoints(run, write=True) as checkpoints:
        checkpoints.save(state, Saved(0, None, meta))
    run.write_json("config.json", to_json(config))
