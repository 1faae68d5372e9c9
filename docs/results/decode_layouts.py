"""How to read experts when a few tokens are decoded: five arrangements of the same weights, timed in turns.

    python docs/results/decode_layouts.py [ROWS]

8 layers of 8 experts, d=512, F=1408, float32, random weights; every row enters one expert in each layer, another one at
every token. Dense is one expert for all. Prints milliseconds per token and the ratio to dense.
"""

from __future__ import annotations

import statistics
import sys

import jax
import jax.numpy as jnp

from moma_jax.bench.timing import in_turns

LAYERS, EXPERTS, WIDTH, HIDDEN, TOKENS = 8, 8, 512, 1408, 8


def swiglu(x_BD, gate_DF, up_DF, down_FD):
    return (jax.nn.silu(x_BD @ gate_DF) * (x_BD @ up_DF)) @ down_FD


def entered(rows: int, layer: int, token):
    """Which expert each row enters: bool (rows, experts)."""
    return jnp.arange(EXPERTS) == ((5 * jnp.arange(rows)[:, None] + token + layer) % EXPERTS)


def apart(weights, x_BD, takes_BE, layer):
    """Each expert an array of its own, behind a condition."""
    return _conditional(x_BD, takes_BE, lambda e: weights[layer][e])


def stacked(weights, x_BD, takes_BE, layer):
    """All experts of all layers in one stack, behind a condition."""
    return _conditional(x_BD, takes_BE, lambda e: [w[layer, e] for w in weights])


def _conditional(x_BD, takes_BE, expert):
    y_BD = jnp.zeros_like(x_BD)
    for e in range(EXPERTS):
        one_B1 = takes_BE[:, e : e + 1]
        y_BD = jax.lax.cond(
            one_B1.any(), lambda y, e=e, one=one_B1: y + one * swiglu(x_BD, *expert(e)), lambda y: y, y_BD
        )
    return y_BD


def loop(weights, x_BD, takes_BE, layer):
    """A loop over the experts that are entered, sliced out of the stack."""
    used_E = takes_BE.any(0)
    order_E = jnp.argsort(~used_E, stable=True)

    def one(number, y_BD):
        e = order_E[number]
        return y_BD + takes_BE[:, e][:, None] * swiglu(x_BD, *(w[layer, e] for w in weights))

    return jax.lax.fori_loop(0, used_E.sum(), one, jnp.zeros_like(x_BD))


def gathered(weights, x_BD, takes_BE, layer):
    """Every row's own weights gathered."""
    gate_BDF, up_BDF, down_BFD = (w[layer, jnp.argmax(takes_BE, 1)] for w in weights)
    hidden_BF = jax.nn.silu(jnp.einsum("bd,bdf->bf", x_BD, gate_BDF)) * jnp.einsum("bd,bdf->bf", x_BD, up_BDF)
    return jnp.einsum("bf,bfd->bd", hidden_BF, down_BFD)


def everything(weights, x_BD, takes_BE, layer):
    """All experts computed, most of them weighted by zero."""
    return sum(takes_BE[:, e : e + 1] * swiglu(x_BD, *weights[layer][e]) for e in range(EXPERTS))


def dense(weights, x_BD, takes_BE, layer):
    return swiglu(x_BD, *weights[layer][0])


def main() -> None:
    """Measures and prints."""
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else 1
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(WIDTH, HIDDEN), (WIDTH, HIDDEN), (HIDDEN, WIDTH)]
    stack = [jax.random.normal(k, (LAYERS, EXPERTS, *s)) / s[0] ** 0.5 for k, s in zip(keys, shapes, strict=False)]
    single = [[[w[n, e] for w in stack] for e in range(EXPERTS)] for n in range(LAYERS)]
    x_BD = jax.random.normal(keys[3], (rows, WIDTH))

    def tokens(body, weights):
        @jax.jit
        def run(weights, x_BD):
            def token(number, x_BD):
                for layer in range(LAYERS):
                    x_BD = x_BD + body(weights, x_BD, entered(rows, layer, number), layer)
                    x_BD = x_BD * jax.lax.rsqrt(jnp.square(x_BD).mean(-1, keepdims=True) + 1e-5)
                return x_BD

            return jax.lax.fori_loop(0, TOKENS, token, x_BD)

        return lambda: run(weights, x_BD)

    cases = {dense: single, apart: single, stacked: stack, loop: stack, gathered: stack, everything: single}
    seconds = in_turns({body.__name__: tokens(body, weights) for body, weights in cases.items()}, 7)
    medians = {name: statistics.median(times) / TOKENS for name, times in seconds.items()}
    for name, median in medians.items():
        print(f"{name:12} {1000 * median:8.2f} ms   {median / medians['dense']:.2f} of dense")


if __name__ == "__main__":
    main()
