"""Encoding by Chameleon's VQGAN, random weights: beside torch on the same weights and cores; for a TPU chip, estimated.

python docs/results/codec_speed.py torch --side 128 --pictures 4 --repeats 5
python docs/results/codec_speed.py tpu --side 512 --pictures 4
"""

from __future__ import annotations

import argparse
import json
import os
import platform

import jax
import numpy as np
from flax.traverse_util import unflatten_dict

from moma_jax.bench.timing import in_turns, summarise
from moma_jax.codec.layouts import TAMING, abstract_parameters, places
from moma_jax.codec.network import VqganConfig
from moma_jax.codec.vqgan import VqganCodec, encode_pixels, to_network


def random_state(config: VqganConfig) -> dict[str, np.ndarray]:
    """Tensors by the names of the original, of a size that keeps activations near 1."""
    random = np.random.default_rng(0)
    return {
        place.name: (random.normal(size=place.shape) / max(1, np.prod(place.shape[1:])) ** 0.5).astype(np.float32)
        for place in places(config, TAMING)
    }


def beside_torch(side: int, pictures: int, repeats: int) -> dict:
    """Seconds of a call of each, in turns, and whether they give the same codes."""
    import torch
    from transformers import ChameleonVQVAEConfig
    from transformers.models.chameleon.modeling_chameleon import ChameleonVQVAE

    torch.set_num_threads(os.cpu_count())
    config = VqganConfig(side=side, decoder=False).check()
    state = random_state(config)
    model = ChameleonVQVAE(ChameleonVQVAEConfig(resolution=side)).eval()
    model.load_state_dict({name: torch.tensor(value) for name, value in state.items()}, strict=False)
    params = unflatten_dict({p.path: p.to_ours(state[p.name]) for p in places(config, TAMING)})
    pixels = np.random.default_rng(1).integers(0, 256, (pictures, side, side, 3), np.uint8)
    theirs = torch.tensor(np.asarray(to_network(config, pixels)).transpose(0, 3, 1, 2).copy())

    def with_torch():
        with torch.inference_mode():
            return model.encode(theirs).image_tokens.numpy().reshape(pictures, -1)

    codec = VqganCodec(config, params)
    ours = jax.jit(lambda params, pixels: encode_pixels(config, params, pixels))
    same = float((codec.encode(list(pixels)) == with_torch()).mean())
    seconds = in_turns({"moma_jax": lambda: ours(params, pixels), "torch": with_torch}, repeats)
    (mine, spread), (other, other_spread) = (summarise(seconds[name]) for name in ("moma_jax", "torch"))
    return {
        "side": side, "pictures": pictures, "equal_codes": same, "moma_jax_seconds": mine, "torch_seconds": other,
        "spread": [spread, other_spread], "torch_over_moma_jax": other / mine, "processor": platform.processor(),
        "versions": {"jax": jax.__version__, "torch": torch.__version__},
    }  # fmt: skip


def on_tpu(side: int, pictures: int, name: str) -> dict:
    """The encode step compiled for one chip: estimated seconds, pictures/s, bytes."""
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

    from moma_jax.plan import hlo, network
    from moma_jax.plan.compile import topology_devices
    from moma_jax.plan.estimate import estimate
    from moma_jax.plan.topology import topology_of

    topology, config = topology_of(name), VqganConfig(side=side, decoder=False)
    mesh = Mesh(np.array(topology_devices(topology)[:1]), ("rows",), axis_types=(AxisType.Auto,))
    whole = NamedSharding(mesh, PartitionSpec())

    def abstract(shape):
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=whole)

    params = jax.tree.map(abstract, abstract_parameters(config))
    pixels = jax.ShapeDtypeStruct((pictures, side, side, 3), np.uint8, sharding=whole)
    compiled = jax.jit(lambda params, pixels: encode_pixels(config, params, pixels)).lower(params, pixels).compile()
    memory = compiled.memory_analysis()
    found = estimate(hlo.parse(compiled.as_text()), network.layout_of(mesh, topology.shape), topology.kind)
    used = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
    return {
        "chip": name.split(":")[0], "side": side, "pictures": pictures, "estimated_seconds": found.seconds,
        "estimated_pictures_per_second": pictures / found.seconds, "gigabytes": used / 1e9,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=["torch", "tpu"])
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--pictures", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--topology", default="v5e:2x2")
    words = parser.parse_args()
    if words.what == "torch":
        print(json.dumps(beside_torch(words.side, words.pictures, words.repeats)))
    else:
        print(json.dumps(on_tpu(words.side, words.pictures, words.topology)))


if __name__ == "__main__":
    main()
