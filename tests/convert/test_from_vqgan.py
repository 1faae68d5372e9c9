"""Public image tokenizers: imported, they compute what transformers and diffusers compute; what is damaged is named."""

import json

import numpy as np
import pytest

safetensors = pytest.importorskip("safetensors.numpy")
torch = pytest.importorskip("torch", reason="the extra [reference] is not installed")
transformers = pytest.importorskip("transformers", reason="the extra [reference] is not installed")
from command_line import run as moma  # noqa: E402

from moma_jax.codec.folder import open_codec  # noqa: E402
from moma_jax.codec.network import Vqgan  # noqa: E402
from moma_jax.codec.vqgan import to_network  # noqa: E402
from moma_jax.convert.from_vqgan import import_codec  # noqa: E402
from moma_jax.errors import InputError  # noqa: E402

pytestmark = pytest.mark.slow  # torch and transformers
SIDE, PICTURES = 32, 64
SHAPE = {"latent_channels": 16, "base_channels": 32, "channel_multiplier": [1, 1, 2], "num_res_blocks": 2}


def randomised(model, lowest=-1.0):
    """Its weights and biases random, none at its first value; the codes are latents of pictures, so that many occur."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(parameter + 0.2 * noise if "norm" in name else noise / max(parameter[0].numel(), 1) ** 0.5)
        model.eval()
        z_NCHW = model.encoder(as_torch(pixels(), lowest))
        z_NC = model.quant_conv(z_NCHW).permute(0, 2, 3, 1).flatten(0, 2)
        model.quantize.embedding.weight.copy_(z_NC[torch.randperm(len(z_NC))[: len(model.quantize.embedding.weight)]])
    return model


def chameleon():
    config = transformers.ChameleonVQVAEConfig(
        **SHAPE, embed_dim=12, num_embeddings=128, resolution=SIDE, attn_resolutions=[16]
    )
    from transformers.models.chameleon.modeling_chameleon import ChameleonVQVAE

    return randomised(ChameleonVQVAE(config))


def janus():
    config = transformers.models.janus.configuration_janus.JanusVQVAEConfig(
        **SHAPE, embed_dim=8, num_embeddings=128, num_patches=SIDE // 4
    )
    from transformers.models.janus.modeling_janus import JanusVQVAE

    return randomised(JanusVQVAE(config))


def pixels() -> np.ndarray:
    """Patches of colour, so that many codes occur; uint8 (N, side, side, 3)."""
    patches = np.random.default_rng(0).integers(0, 256, (PICTURES, SIDE // 8, SIDE // 8, 3), np.uint8)
    return patches.repeat(8, axis=1).repeat(8, axis=2)


def as_torch(images: np.ndarray, lowest: float = -1.0):
    return torch.tensor(lowest + images.transpose(0, 3, 1, 2).astype(np.float32) * ((1 - lowest) / 255))


def state_of(model) -> dict[str, np.ndarray]:
    return {name: np.ascontiguousarray(value.detach().numpy()) for name, value in model.state_dict().items()}


def written(folder, state, prefix="", config=None, name="model.safetensors"):
    """A folder of Hugging Face."""
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.save_file({prefix + key: value for key, value in state.items()}, folder / name)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


CHAMELEON = {"model_type": "chameleon", "vq_config": {"resolution": SIDE}}
JANUS = {"model_type": "janus", "vq_config": {"num_patches": SIDE // 4}}


def assert_same_codes(codec, images, code_NK, lowest=-1.0):
    """All codes are equal but where two distances are, to 1e-5."""
    found_NK = codec.encode(list(images))
    if (found_NK == code_NK).all():
        return
    z_NhwC = Vqgan(codec.config).apply({"params": codec.params}, to_network(codec.config, images), method="latents")
    z_NKC, row_VC = np.asarray(z_NhwC).reshape(*code_NK.shape, -1), codec.params["codebook_VC"]
    for n, k in np.argwhere(found_NK != code_NK):
        ours, theirs = (np.square(z_NKC[n, k] - row_VC[c]).sum() for c in (found_NK[n, k], code_NK[n, k]))
        assert abs(ours - theirs) <= 1e-5 * theirs


def test_chameleons_safetensors_encode_and_have_no_decoder(tmp_path):
    model = chameleon()
    folder = written(tmp_path / "chameleon", state_of(model), "model.vqmodel.", CHAMELEON)
    codec = import_codec(str(folder), str(tmp_path / "codec"))
    assert codec.config.attention_levels == (1,) and codec.config.middle_attention and not codec.draws
    with torch.no_grad():
        codes = model.encode(as_torch(pixels())).image_tokens.numpy().reshape(PICTURES, -1)
    assert len(np.unique(codes)) > 100
    assert_same_codes(open_codec(str(tmp_path / "codec")), pixels(), codes)


@pytest.mark.parametrize("unit_length", ["codes", "both"])
def test_janus_encodes_and_draws(tmp_path, unit_length):
    model = janus()
    folder = written(tmp_path / "janus", state_of(model), "model.vqmodel.", JANUS)
    codec = import_codec(str(folder), str(tmp_path / "codec"), unit_length=unit_length)
    with torch.no_grad():
        if unit_length == "both":  # as the network was trained; transformers compares latents as they are
            z_NCHW = torch.nn.functional.normalize(model.quant_conv(model.encoder(as_torch(pixels()))), dim=1)
            model.quantize.embedding.weight.copy_(torch.nn.functional.normalize(model.quantize.embedding.weight, dim=1))
            codes = model.quantize(z_NCHW)[2].numpy().reshape(PICTURES, -1)
        else:
            codes = model.encode(as_torch(pixels())).image_tokens.numpy().reshape(PICTURES, -1)
        drawn = model.decode(torch.tensor(codes)).numpy().transpose(0, 2, 3, 1)
    assert_same_codes(codec, pixels(), codes)
    ours = Vqgan(codec.config).apply({"params": codec.params}, codes, method="pixels")
    np.testing.assert_allclose(ours, drawn, atol=1e-4)


def test_names_of_llamagen_are_known(tmp_path):
    """Janus' own files call the same network's parts otherwise."""
    state = {}
    for name, value in state_of(janus()).items():
        name = name.replace(".down.", ".conv_blocks.").replace(".up.", ".conv_blocks.").replace(".block.", ".res.")
        for number, part in enumerate(("block_1", "attn_1", "block_2")):
            name = name.replace(f"mid.{part}", f"mid.{number}")
        state[f"gen_vision_model.{name}"] = value
    one = import_codec(str(written(tmp_path / "own", state)), str(tmp_path / "a"), side=SIDE)
    folder = written(tmp_path / "janus", state_of(janus()), "model.vqmodel.", JANUS)
    assert one.hash == import_codec(str(folder), str(tmp_path / "b")).hash and one.config.unit_length == "both"


def test_amused_encodes_and_draws(tmp_path):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    model = diffusers.VQModel(
        block_out_channels=(32, 32, 64), down_block_types=("DownEncoderBlock2D",) * 3, layers_per_block=2,
        up_block_types=("UpDecoderBlock2D",) * 3, latent_channels=16, num_vq_embeddings=128, vq_embed_dim=8,
        mid_block_add_attention=False, sample_size=32, lookup_from_codebook=True,
    )  # fmt: skip
    randomised(model, lowest=0.0).save_pretrained(tmp_path / "vqvae")
    codec = import_codec(str(tmp_path / "vqvae"), str(tmp_path / "codec"), side=SIDE)
    assert codec.config.lowest == 0 and not codec.config.middle_attention
    with torch.no_grad():
        z_NCHW = model.encode(as_torch(pixels(), lowest=0.0)).latents
        codes = model.quantize(z_NCHW)[2][2].numpy().reshape(PICTURES, -1)
        drawn = model.decode(z_NCHW).sample.numpy().transpose(0, 2, 3, 1)
    assert_same_codes(codec, pixels(), codes, lowest=0.0)
    ours = Vqgan(codec.config).apply({"params": codec.params}, codes, method="pixels")
    np.testing.assert_allclose(ours, drawn, atol=1e-4)


def taming_state() -> dict[str, np.ndarray]:
    """As vqgan.ckpt: the decoder's levels from the largest picture, and what its training left."""
    state = {}
    for name, value in state_of(janus()).items():
        number = name.split(".")[2] if name.startswith("decoder.up.") else None
        state[name if number is None else name.replace(f"up.{number}.", f"up.{2 - int(number)}.", 1)] = value
    return state | {"loss.discriminator.main.0.weight": np.zeros((2, 2), np.float32)}


def test_a_checkpoint_of_torch_is_read_as_weights_alone(tmp_path):
    state = {name: torch.tensor(value) for name, value in taming_state().items()}
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "vqgan.ckpt")
    codec = import_codec(str(tmp_path / "vqgan.ckpt"), str(tmp_path / "a"), side=SIDE, unit_length="both")
    folder = written(tmp_path / "janus", state_of(janus()), "model.vqmodel.", JANUS)
    assert codec.hash == import_codec(str(folder), str(tmp_path / "b")).hash
    with pytest.raises(InputError, match="give --side"):
        import_codec(str(tmp_path / "vqgan.ckpt"), str(tmp_path / "c"))


class Runs:
    def __reduce__(self):
        return (print, ("a pickle ran",))


def test_a_checkpoint_with_more_than_weights_is_refused(tmp_path, capsys):
    torch.save({"state_dict": {}, "more": Runs()}, tmp_path / "vqgan.ckpt")
    code, out, err = moma(capsys, "codec", "import", str(tmp_path / "vqgan.ckpt"), "--out", str(tmp_path / "codec"))
    assert code == 2 and "weights alone" in err and err.count("\n") == 1 and "a pickle ran" not in out
    assert not (tmp_path / "codec").exists()


def test_shards_and_bfloat16(tmp_path):
    model = janus().to(torch.bfloat16)
    state = dict(sorted(model.state_dict().items()))
    names, folder = list(state), tmp_path / "janus"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(JANUS))
    index = {}
    from safetensors.torch import save_file

    for number, part in enumerate((names[:50], names[50:]), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({f"model.vqmodel.{name}": state[name].contiguous() for name in part}, folder / file)
        index |= {f"model.vqmodel.{name}": file for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    codec = import_codec(str(folder), str(tmp_path / "codec"))
    np.testing.assert_array_equal(codec.params["codebook_VC"], model.quantize.embedding.weight.detach().float().numpy())


def cut(folder, state):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def without(name):
    return lambda folder, state: written(folder, {k: v for k, v in state.items() if k != name}, "model.vqmodel.")


def changed(name, value):
    return lambda folder, state: written(folder, state | {name: value}, "model.vqmodel.")


BROKEN = {
    "cut off": (cut, "damaged or cut off"),
    "missing": (without("decoder.mid.block_1.conv1.bias"), "tensor decoder.mid.block_1.conv1.bias is missing"),
    "no codebook": (without("quantize.embedding.weight"), "tensor quantize.embedding.weight is missing"),
    "misshapen": (
        changed("decoder.conv_out.weight", np.zeros((4, 32, 3, 3), np.float32)),
        r"decoder.conv_out.weight has shape \(4, 32, 3, 3\), not \(3, 32, 3, 3\)",
    ),
    "unknown": (
        changed("encoder.style.weight", np.zeros(3, np.float32)), "tensor encoder.style.weight has no place"
    ),
    "another model": (lambda folder, state: written(folder, {"lm_head.weight": np.zeros(3)}), "of a VQGAN"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_damaged_is_named_and_nothing_is_written(tmp_path, capsys, name):
    breakage, message = BROKEN[name]
    state = state_of(janus())
    folder = written(tmp_path / "janus", state, "model.vqmodel.", JANUS)
    breakage(folder, state)
    code, _, err = moma(capsys, "codec", "import", str(folder), "--out", str(tmp_path / "new" / "codec"))
    assert code == 2 and err.count("\n") == 1
    with pytest.raises(InputError, match=message):
        import_codec(str(folder), str(tmp_path / "new" / "codec"))
    assert not (tmp_path / "new").exists()


def test_a_codec_that_is_there_is_not_overwritten(tmp_path):
    folder = written(tmp_path / "janus", state_of(janus()), "model.vqmodel.", JANUS)
    import_codec(str(folder), str(tmp_path / "codec"))
    with pytest.raises(InputError, match="is there already"):
        import_codec(str(folder), str(tmp_path / "codec"))


ODD = {
    "side": ({"side": -32}, None, "codec.side"),
    "a word": ({}, {"model_type": "chameleon", "vq_config": {"resolution": "512"}}, "codec.side"),
    "a fraction": ({}, {"model_type": "chameleon", "vq_config": {"resolution": 512.5}}, "codec.side"),
    "no patches": ({}, {"model_type": "janus", "vq_config": {"num_patches": -4}}, "codec.side"),
    "nothing": ({}, {}, "give --side"),
}


@pytest.mark.parametrize("name", ODD)
def test_a_side_that_cannot_be_is_refused(tmp_path, name):
    asked, config, message = ODD[name]
    folder = written(tmp_path / "janus", state_of(janus()), "model.vqmodel.", config)
    with pytest.raises(InputError, match=message):
        import_codec(str(folder), str(tmp_path / "codec"), **asked)
    assert not (tmp_path / "codec").exists()


def test_weights_that_are_no_numbers_are_refused(tmp_path):
    state = state_of(janus())
    state["quantize.embedding.weight"][3, 2] = np.nan
    folder = written(tmp_path / "janus", state, "model.vqmodel.", JANUS)
    with pytest.raises(InputError, match="quantize.embedding.weight has values that are no numbers"):
        import_codec(str(folder), str(tmp_path / "codec"))
    written(folder, state | {"quant_conv.bias": np.zeros(8, np.int8)}, "model.vqmodel.")
    with pytest.raises(InputError, match="quant_conv.bias is int8"):
        import_codec(str(folder), str(tmp_path / "codec"))
