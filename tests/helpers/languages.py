"""Tiny Llamas and Qwen3s in Hugging Face's layout, random weights, made without torch."""

import json

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

WIDTH, HEADS, KEYS, HIDDEN, LAYERS = 16, 4, 2, 24, 2
IDS = 320
"""Of the vocabulary; the tokenizer has fewer."""
SHIFT = 6
"""Our id of the source's id 0, behind the marks of documents and pictures."""
WORDS = ["the cat sat on the mat", "the dog and the cat", "that then there", "a red square, a blue circle"] * 4
SPECIAL = {
    "llama": ["<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>"],
    "qwen3": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
}
MARKS = {
    "llama": {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"},
    "qwen3": {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": None},
}
OWN = {
    "llama": {
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 100.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 40,
        },
        "rms_norm_eps": 1e-5,
    },
    "qwen3": {"rope_theta": 1000.0, "head_dim": 6, "rms_norm_eps": 1e-6},
}  # fmt: skip
WIDTHS = {"llama": WIDTH // HEADS, "qwen3": 6}
"""Channels of a head."""


def tokenizer(family: str) -> Tokenizer:
    """Bytes and some merges, words taken whole where there are such; special tokens behind, and one that is not."""
    made = Tokenizer(models.BPE(ignore_merges=True))
    words = pre_tokenizers.Split(Regex(r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+"), "isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    made.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made.train_from_iterator(WORDS, trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, show_progress=False))
    made.add_special_tokens(SPECIAL[family])
    made.add_tokens(["<think>"])
    return made


def described(family: str, **changed) -> dict:
    """The content of config.json."""
    names = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
    return {
        "architectures": [names.get(family)],
        "model_type": family,
        "vocab_size": IDS,
        "hidden_size": WIDTH,
        "intermediate_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEYS,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "bos_token_id": 5,
        "eos_token_id": [7, 8],
        **OWN[family],
        **changed,
    }


def weights(family: str, tied: bool = False, seed: int = 0) -> dict[str, np.ndarray]:
    """Random tensors, bfloat16, norms float32."""
    width = WIDTHS[family]
    shapes = {"model.embed_tokens.weight": (IDS, WIDTH), "model.norm.weight": (WIDTH,)}
    shapes |= {} if tied else {"lm_head.weight": (IDS, WIDTH)}
    for layer in range(LAYERS):
        own = {
            "self_attn.q_proj.weight": (HEADS * width, WIDTH),
            "self_attn.k_proj.weight": (KEYS * width, WIDTH),
            "self_attn.v_proj.weight": (KEYS * width, WIDTH),
            "self_attn.o_proj.weight": (WIDTH, HEADS * width),
            "mlp.gate_proj.weight": (HIDDEN, WIDTH),
            "mlp.up_proj.weight": (HIDDEN, WIDTH),
            "mlp.down_proj.weight": (WIDTH, HIDDEN),
            "input_layernorm.weight": (WIDTH,),
            "post_attention_layernorm.weight": (WIDTH,),
        }
        own |= {f"self_attn.{x}_norm.weight": (width,) for x in "qk"} if family == "qwen3" else {}
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in own.items()}
    rng = np.random.default_rng(seed)
    found = {}
    for name, shape in shapes.items():
        value = rng.normal(size=shape) / (1 if "embed" in name else np.sqrt(shape[-1]))
        found[name] = (1 + value).astype(np.float32) if "norm" in name else value.astype(ml_dtypes.bfloat16)
    return found


def write(folder, family: str, tensors=None, *, tied: bool = False, marks=None, **changed):
    """Writes the folder; returns it."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(described(family, **{"tie_word_embeddings": tied, **changed})))
    (folder / "tokenizer.json").write_text(tokenizer(family).to_str())
    (folder / "tokenizer_config.json").write_text(json.dumps(MARKS[family] if marks is None else marks))
    save_file(tensors or weights(family, tied), folder / "model.safetensors", metadata={"format": "pt"})
    return folder
