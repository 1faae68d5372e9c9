"""Compilation for tests: tiny shapes, where compiling takes far longer than running."""

import functools

import jax

OPTIONS = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
XLA_FLAGS = " ".join(f"--{name}={str(value).lower()}" for name, value in OPTIONS.items())

# jax.jit that compiles six times faster into slower code.
jit = functools.partial(jax.jit, compiler_options=OPTIONS)
