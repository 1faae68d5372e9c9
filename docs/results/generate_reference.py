"""How fast Hugging Face transformers' `generate` decodes, at the shape that `moma bench generate` is compared with.

    pip install "torch==2.13.0" "transformers>=5.17,<6"     # on Linux plain torch brings gigabytes for CUDA
    python docs/results/generate_reference.py --out reference.json

A Llama of random float32 weights: that family has no QK-norm, so it does a little less work for each token than a dense
moma_jax model of the same shape. Greedy, with its key-value cache, one row. Each variant generates 1 token and then
1 + N tokens, in turns with the others; decoding is the difference of the two, so reading the prompt is not in it.

    dynamic    `generate` as it comes
    static     cache_implementation="static"
    compiled   static, with the model's forward compiled by torch.compile

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

SHAPE = {"width": 512, "layers": 8, "heads": 8, "hidden": 1408, "vocabulary": 8192}
VARIANTS = ("dynamic", "static", "compiled")


def make_model(positions: int, seed: int = 0):
    """The Llama of SHAPE, float32, for at most `positions` tokens."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=SHAPE["vocabulary"],
        hidden_size=SHAPE["width"],
        intermediate_size=SHAPE["hidden"],
        num_hidden_layers=SHAPE["layers"],
        num_attention_heads=SHAPE["heads"],
        num_key_value_heads=SHAPE["heads"],
        max_position_embeddings=positions,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,  # nothing ends a row early
        pad_token_id=None,
    )
    return LlamaForCausalLM(config).to(torch.float32).eval()


def make_generate(variant: str, prompt: int, new_tokens: int):
    """(count) -> seconds to generate `count` tokens after the prompt, for one variant with a model of its own."""
    import torch

    model = make_model(prompt + new_tokens + 1)
    if variant == "compiled":
        model.forward = torch.compile(model.forward)
    token_BS = torch.randint(SHAPE["vocabulary"], (1, prompt), generator=torch.Generator().manual_seed(1))
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


def measure(variants, prompt: int, new_tokens: int, repeats: int, threads: int) -> dict:
    """The JSON object; variants take turns, so that what else the machine does hits them alike."""
    import torch
    import transformers

    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    generate = {variant: make_generate(variant, prompt, new_tokens) for variant in variants}
    lengths = (1, 1 + new_tokens)
    for run in generate.values():  # allocates, and compiles for both lengths
        for length in (*lengths, *lengths):
            run(length)
    seconds = {variant: {length: [] for length in lengths} for variant in variants}
    for _ in range(repeats):
        for variant, run in generate.items():
            for length in lengths:
                seconds[variant][length].append(run(length))
    return {
        "library": "transformers",
        "versions": {
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "machine": {"processor": processor(), "cores": os.cpu_count(), "load_average": os.getloadavg()[0]},
        "threads": torch.get_num_threads(),
        "shape": {**SHAPE, "dtype": "float32", "batch": 1, "prompt_tokens": prompt, "new_tokens": new_tokens},
        "repeats": repeats,
        "variants": {variant: figures(seconds[variant], new_tokens) for variant in variants},
    }


def figures(seconds: dict[int, list[float]], new_tokens: int) -> dict:
    """Medians of one variant from its seconds by number of tokens."""
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
    parser.add_argument("--prompt", type=int, default=64, help="tokens of the prompt")
    parser.add_argument("--new-tokens", type=int, default=128, help="tokens to decode after the first")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", help="file for the JSON, beside standard output")
    options = parser.parse_args()
    try:
        result = measure(options.variants, options.prompt, options.new_tokens, options.repeats, options.threads)
    except ImportError as error:
        sys.exit(f"{error}; install torch and transformers (extra reference)")
    text = json.dumps(result, indent=1)
    print(text)
    if options.out:
        with open(options.out, "w", encoding="utf-8") as file:
            file.write(text + "\n")


if __name__ == "__main__":
    main()
