"""How fast Hugging Face transformers' `generate` decodes, at the shape that `moma bench generate` is compared with.

    pip install -e . "torch==2.13.0" "transformers>=5.17,<6"     # on Linux plain torch brings gigabytes for CUDA
    OMP_WAIT_POLICY=PASSIVE python docs/results/generate_reference.py --width 256 --out reference.json

A Llama of random float32 weights: that family has no QK-norm, so it does a little less work for each token than a dense
moma_jax model of the same shape. Greedy, with its key-value cache, one row. Each variant generates 1 token and then
1 + N tokens, in turns with the others; decoding is the difference of the two, so reading the prompt is not in it. Ours
writes N tokens after the prompt, drawn at temperature 1, in the same process and in the same turns.

    dynamic      `generate` as it comes
    static       cache_implementation="static"
    compiled     static, with the model's forward compiled by torch.compile
    moma_dense   moma_jax, dense
    moma_4t4i    moma_jax, 4t4i, threshold routing, equal active FLOPs

Prints one JSON object: versions, threads, shape, and for each variant the median and the spread of tokens/s.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time

VARIANTS = ("dynamic", "static", "compiled", "moma_dense", "moma_4t4i")


def shape_of(width: int, layers: int, vocabulary: int) -> dict[str, int]:
    """Heads of 64 channels; the SwiGLU's hidden size is 8/3 of the width, rounded up to a multiple of 128."""
    hidden = -(-8 * width // 384) * 128
    return {"width": width, "layers": layers, "heads": width // 64, "hidden": hidden, "vocabulary": vocabulary}


def make_ours(ffn: str, shape: dict[str, int], prompt: int, new_tokens: int):
    """() -> seconds to write the new tokens with our model of the shape, half of whose ids are codes."""
    from moma_jax.bench.generate import variant_of, write
    from moma_jax.config import Config, DataConfig, Modality, ModelConfig, TrainConfig

    half = shape["vocabulary"] // 2
    modalities = (Modality("text", "t", half, quota=0.5), Modality("image", "i", half, span=256, quota=0.5))
    sizes = {name: shape[name] for name in ("width", "layers", "heads", "hidden")}
    config = Config(
        model=ModelConfig(ffn=ffn, dtype="float32", **sizes),
        data=DataConfig(kind="synthetic", modalities=modalities, sequence=512),
        train=TrainConfig(steps=1),
    )
    variant = variant_of(config, ffn)
    return lambda: write(variant, 1, prompt, new_tokens)[1]


def make_model(shape: dict[str, int], positions: int, seed: int = 0):
    """The Llama of this shape, float32, for at most `positions` tokens."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=shape["vocabulary"],
        hidden_size=shape["width"],
        intermediate_size=shape["hidden"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["heads"],
        max_position_embeddings=positions,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,  # nothing ends a row early
        pad_token_id=None,
    )
    return LlamaForCausalLM(config).to(torch.float32).eval()


def make_generate(variant: str, shape: dict[str, int], prompt: int, new_tokens: int):
    """(count) -> seconds to generate `count` tokens after the prompt, for one variant with a model of its own."""
    import torch

    model = make_model(shape, prompt + new_tokens + 1)
    if variant == "compiled":
        model.forward = torch.compile(model.forward)
    token_BS = torch.randint(shape["vocabulary"], (1, prompt), generator=torch.Generator().manual_seed(1))
    cache = {} if variant == "dynamic" else {"cache_implementation": "static"}

    def generate(count: int) -> float:
        start = time.perf_counter()
        with torch.inference_mode():
            out_BS = model.generate(
                token_BS,
                attention_mask=torch.ones_like(token_BS),
                do_sample=False,
                use_cache=True,
                min_new_tokens=count,
                max_new_tokens=count,
                **cache,
            )
        seconds = time.perf_counter() - start
        if out_BS.shape[1] != prompt + count:
            raise RuntimeError(f"{variant}: generated {out_BS.shape[1] - prompt} tokens, not {count}")
        return seconds

    return generate


def measure(variants, shape: dict[str, int], prompt: int, new_tokens: int, repeats: int, threads: int) -> dict:
    """The JSON object; variants take turns, so that what else the machine does hits them alike."""
    import torch
    import transformers

    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    theirs = [v for v in variants if not v.startswith("moma_")]
    generate = {variant: make_generate(variant, shape, prompt, new_tokens) for variant in theirs}
    ours = [v for v in variants if v not in theirs]
    writes = {v: make_ours(v.removeprefix("moma_"), shape, prompt, new_tokens) for v in ours}
    lengths = (1, 1 + new_tokens)
    for run in generate.values():  # allocates, and compiles for both lengths
        for length in (*lengths, *lengths):
            run(length)
    for write in writes.values():
        write()
    seconds = {variant: {length: [] for length in lengths} for variant in theirs}
    seconds |= {variant: [] for variant in ours}
    for _ in range(repeats):
        for variant, run in generate.items():
            for length in lengths:
                seconds[variant][length].append(run(length))
        for variant, write in writes.items():
            seconds[variant].append(write())
    return {
        "library": "transformers",
        "versions": {
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "machine": {"processor": processor(), "cores": os.cpu_count(), "load_average": os.getloadavg()[0]},
        "threads": torch.get_num_threads(),
        "shape": {**shape, "dtype": "float32", "batch": 1, "prompt_tokens": prompt, "new_tokens": new_tokens},
        "repeats": repeats,
        "variants": {variant: figures(seconds[variant], new_tokens) for variant in variants},
    }


def figures(seconds: dict[int, list[float]] | list[float], new_tokens: int) -> dict:
    """Medians of one variant: from its seconds by number of tokens, or of ours from those of the new tokens."""
    if isinstance(seconds, list):
        decode = [new_tokens / taken for taken in seconds]
        return {
            "decode_tokens_per_second": round(statistics.median(decode), 1),
            "decode_tokens_per_second_all": [round(rate, 1) for rate in sorted(decode)],
        }
    first, whole = seconds[1], seconds[1 + new_tokens]
    decode = [new_tokens / (b - a) for a, b in zip(first, whole, strict=True)]
    return {
        "decode_tokens_per_second": round(statistics.median(decode), 1),
        "decode_tokens_per_second_all": [round(rate, 1) for rate in sorted(decode)],
        "whole_call_tokens_per_second": round((1 + new_tokens) / statistics.median(whole), 1),
        "first_token_milliseconds": round(1000 * statistics.median(first), 2),
    }


def processor() -> str:
    """The CPU's name, where the system tells."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", nargs="+", default=VARIANTS, choices=VARIANTS)
    parser.add_argument("--width", type=int, default=512, help="model width, a multiple of 64")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of the prompt")
    parser.add_argument("--new-tokens", type=int, default=128, help="tokens to decode after the first")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", help="file for the JSON, beside standard output")
    options = parser.parse_args()
    try:
        shape = shape_of(options.width, options.layers, options.vocabulary)
        result = measure(options.variants, shape, options.prompt, options.new_tokens, options.repeats, options.threads)
    except ImportError as error:
        sys.exit(f"{error}; install torch and transformers (extra reference)")
    text = json.dumps(result, indent=1)
    print(text)
    if options.out:
        with open(options.out, "w", encoding="utf-8") as file:
            file.write(text + "\n")


if __name__ == "__main__":
    main()
