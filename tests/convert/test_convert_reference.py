"""Converted Chameleons, Llamas and Qwen3s compute what transformers computes, and go back as they came."""

import numpy as np
import pytest

pytest.importorskip("safetensors", reason="the extra [convert] is not installed")
torch = pytest.importorskip("torch", reason="the extra [reference] is not installed")
transformers = pytest.importorskip("transformers", reason="the extra [reference] is not installed")
import chameleons  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import languages  # noqa: E402
from small_codecs import small_codec  # noqa: E402

from moma_jax.codec.folder import write_codec  # noqa: E402
from moma_jax.convert import from_chameleon, from_language_model, to_chameleon, to_language_model  # noqa: E402
from moma_jax.model.parameters import unembedding_of  # noqa: E402
from moma_jax.training.load import load  # noqa: E402

pytestmark = pytest.mark.slow  # torch and transformers

VISION = {"embed_dim": 8, "latent_channels": 8, "base_channels": 32, "num_res_blocks": 1, "resolution": 4}


def chameleon(swin: bool, **options):
    """A tiny one; norms, scales and biases are random too."""
    vision = {**VISION, "num_embeddings": chameleons.CODES, "channel_multiplier": [1, 1]}
    changed = {"swin_norm": swin, "vq_config": vision, "pad_token_id": None, **options}
    settings = {k: v for k, v in chameleons.described(**changed).items() if k not in ("architectures", "model_type")}
    settings |= {
        "dtype": "float32",
        "rope_parameters": {"rope_type": "default", "rope_theta": settings.pop("rope_theta")},
    }
    torch.manual_seed(0)
    model = transformers.ChameleonForConditionalGeneration(transformers.ChameleonConfig(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(parameter + 0.3 * noise if "norm" in name else noise / parameter.shape[-1] ** 0.5)
    return model.eval()


def tokens() -> np.ndarray:
    """Two rows: text with a picture inside; a picture, then text. int32 (2, 12)."""
    ids, begin, end = chameleons.code_ids(), chameleons.BEGIN_IMAGE, chameleons.END_IMAGE
    first = [begin, *(ids[code] for code in (3, 11, 0, 7)), end]
    second = [begin, *(ids[code] for code in (6, 5, 5, 9)), end]
    text = [chameleons.BYTES + n for n in (70, 3, 200, 41, 120)]
    return np.array([[0, *text[:3], *first, text[3], 2], [0, *second, *text]], np.int32)


def reference_logits(model, token_BS) -> np.ndarray:
    """Logits without the minimum that transformers sets those of image codes to."""
    with torch.no_grad():
        hidden = model.model(input_ids=torch.tensor(token_BS, dtype=torch.long)).last_hidden_state
        return model.lm_head(hidden).numpy()


def our_logits(run, token_BS) -> np.ndarray:
    loaded = load(str(run))
    group = loaded.config.data.group_rows
    token_BS = np.tile(token_BS, (group // len(token_BS), 1))
    position_BS = np.broadcast_to(np.arange(token_BS.shape[1]), token_BS.shape)
    output = loaded.decoder.apply(
        {"params": loaded.params},
        jnp.asarray(token_BS),
        jnp.ones_like(token_BS),
        jnp.asarray(position_BS),
        jnp.asarray(loaded.vocabulary.modality_V.astype(np.int32)[token_BS]),
        key=jax.random.key(0),
        routing_state=loaded.routing_state,
    )
    return np.asarray(output.hidden_BSD @ unembedding_of(loaded.params))


@pytest.mark.parametrize(("swin", "keys"), [(False, 2), (True, 2), (True, 1)], ids=["pre", "swin", "shared keys"])
def test_logits_are_those_of_transformers(swin, keys, tmp_path):
    """Chameleon-34B's heads share keys."""
    model, token_BS = chameleon(swin, num_key_value_heads=keys), tokens()
    model.save_pretrained(tmp_path / "source", max_shard_size="20KB")
    (tmp_path / "source" / "tokenizer.json").write_text(chameleons.tokenizer().to_str())
    assert len(list((tmp_path / "source").glob("*.safetensors"))) > 1
    from_chameleon(str(tmp_path / "source"), str(tmp_path / "run"), quiet=True)
    wanted_BSV = reference_logits(model, token_BS)
    found_BSV = our_logits(tmp_path / "run", token_BS)[: len(token_BS)]
    assert wanted_BSV.std() > 0.3
    np.testing.assert_allclose(found_BSV, wanted_BSV, atol=1e-4, rtol=0)
    loaded = load(str(tmp_path / "run"))
    assert loaded.config.model.norm == ("swin" if swin else "pre")
    code_ids = loaded.vocabulary.modalities[1].code_ids.tolist()
    assert dict(enumerate(code_ids)) == model.model.vocabulary_mapping.img2bpe

    to_chameleon(str(tmp_path / "run"), str(tmp_path / "back"), like=str(tmp_path / "source"), quiet=True)
    again, info = transformers.ChameleonForConditionalGeneration.from_pretrained(
        tmp_path / "back", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    np.testing.assert_array_equal(reference_logits(again.eval(), token_BS), wanted_BSV)


@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("llama", True), ("qwen3", False), ("qwen3", True)])
def test_logits_of_language_models_are_those_of_transformers(family, tied, tmp_path):
    """On ids of text, before any training; and what comes back is the model that it was."""
    folder = languages.write(tmp_path / "source", family, tied=tied)
    write_codec(str(tmp_path / "codec"), small_codec())
    from_language_model(family, str(folder), str(tmp_path / "run"), codec=str(tmp_path / "codec"), quiet=True)
    token_BS = np.random.default_rng(0).integers(0, languages.IDS, (2, 48)).astype(np.int32)
    token_BS[:, 0] = languages.tokenizer(family).token_to_id(
        {"llama": "<|begin_of_text|>", "qwen3": "<|im_end|>"}[family]
    )
    ours_BS = token_BS + languages.SHIFT
    ours_BS[:, 0] = 0  # <s>

    def reference(where):
        read = transformers.AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32, output_loading_info=True)
        model, info = read
        assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        with torch.no_grad():
            return model.eval()(torch.tensor(token_BS, dtype=torch.long)).logits.numpy()

    wanted_BSV = reference(folder)
    found_BSV = our_logits(tmp_path / "run", ours_BS)[:2, :, languages.SHIFT : languages.SHIFT + languages.IDS]
    assert wanted_BSV.std() > 0.3
    np.testing.assert_allclose(found_BSV, wanted_BSV, atol=1e-4, rtol=0)
    to_language_model(family, str(tmp_path / "run"), str(tmp_path / "back"), quiet=True)
    np.testing.assert_array_equal(reference(tmp_path / "back"), wanted_BSV)
