"""Training an image tokenizer: losses beside slow NumPy, codebooks, the critic, exact resumes, refusals."""

import dataclasses
import functools
import json
import re
import signal
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loopback import Blown
from processes import output, spawn
from runs import records
from small_pictures import small_training, write_pictures
from tiers import long_but

from moma_jax.codec.folder import open_codec
from moma_jax.codec.network import Vqgan
from moma_jax.codec.vqgan import to_network
from moma_jax.errors import InputError, RunError
from moma_jax.training.codec import stage
from moma_jax.training.codec.config import from_json, load, resolve, to_json
from moma_jax.training.codec.pictures import Pictures
from moma_jax.training.codec.stage import train_codec
from moma_jax.training.codec.step import (
    create_codec_state,
    far_latents,
    make_codec_program,
    make_codec_step,
)

ROUNDED = {"rtol": 0, "atol": 5e-5}
"""A latent plus what is missing to its row is the row but for a rounding, which norms amplify."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures") / "source")


def pixels_of(seed=0, count=8):
    return np.random.default_rng(seed).integers(0, 256, (count, 16, 16, 3)).astype(np.uint8)


def updates(config, batches, state=None):
    """(program, states, reports) of updates on batches of pixels."""
    program = make_codec_program(resolve(config))
    states, reports, step = [state or create_codec_state(program)], [], jax.jit(make_codec_step(program))
    for pixels in batches:
        new, report = step(states[-1], pixels)
        states.append(new)
        reports.append(jax.device_get(report))
    return program, [jax.device_get(state) for state in states], reports


def seen_by(program, params, pixels):
    """What the network makes of pixels, as NumPy."""
    truth = to_network(program.config.network, pixels)
    return jax.device_get(program.network.apply({"params": params}, truth, method="reconstruct")), np.asarray(truth)


def warm(config):
    """The config with its codebook as it was made: no row is put on a latent."""
    return dataclasses.replace(config, loss=dataclasses.replace(config.loss, dead_below=0.0))


# Losses ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit_length", ["neither", "codes", "both"])
def test_reconstruction_is_what_codes_draw(unit_length):
    network = dataclasses.replace(small_training("x").network, unit_length=unit_length)
    pixels = to_network(network, pixels_of())
    params = Vqgan(network).init(jax.random.key(1), pixels)["params"]
    apply = lambda method, x: Vqgan(network).apply({"params": params}, x, method=method)  # noqa: E731
    seen = apply("reconstruct", pixels)
    np.testing.assert_array_equal(seen.code_BK, apply("codes", pixels))
    np.testing.assert_allclose(seen.pixels_BHW3, apply("pixels", seen.code_BK), **ROUNDED)


def test_the_encoder_learns_as_if_it_had_drawn_its_rows():
    """The gradient at the latents is that at the rows (van den Oord et al., 2017, section 3.2)."""
    network = small_training("x").network
    pixels = to_network(network, pixels_of())
    params = Vqgan(network).init(jax.random.key(1), pixels)["params"]
    weight = np.random.default_rng(0).normal(size=pixels.shape)

    def through_latents(bias):
        moved = {**params, "before": {**params["before"], "bias": bias}}
        return jnp.sum(weight * Vqgan(network).apply({"params": moved}, pixels, method="reconstruct").pixels_BHW3)

    def through_rows(shift):
        rows = {**params, "codebook_VC": params["codebook_VC"] + shift}
        code_BK = Vqgan(network).apply({"params": params}, pixels, method="codes")
        return jnp.sum(weight * Vqgan(network).apply({"params": rows}, code_BK, method="pixels"))

    one, other = jax.grad(through_latents)(params["before"]["bias"]), jax.grad(through_rows)(jnp.zeros(4))
    np.testing.assert_allclose(one, other, rtol=1e-4)


@pytest.mark.parametrize("kind", ["absolute", "squared"])
def test_losses_are_those_of_numpy(kind):
    config = warm(small_training("x", loss={"reconstruction": kind, "codebook": "gradient"}))
    program, states, (report,) = updates(config, [pixels_of()])
    seen, truth = seen_by(program, states[0].params, pixels_of())
    difference = seen.pixels_BHW3 - truth
    error = {"absolute": np.abs(difference), "squared": difference**2}[kind].mean()
    apart = np.square(seen.latent_BKC - states[0].params["codebook_VC"][seen.code_BK]).mean()
    assert report.losses["reconstruction"] == pytest.approx(error, rel=1e-5)
    assert report.losses["commitment"] == report.losses["codebook"] == pytest.approx(apart, rel=1e-5)
    error_B = np.square((np.clip(seen.pixels_BHW3, -1, 1) - truth) / 2).mean((1, 2, 3))
    assert report.psnr == pytest.approx(np.mean(-10 * np.log10(error_B)), rel=1e-5)
    np.testing.assert_array_equal(report.chosen_V, np.bincount(seen.code_BK.ravel(), minlength=16))
    assert report.pictures_M == [8] and report.finite


@pytest.mark.long
def test_a_perceptual_loss_of_ones_own(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def darkness(drawn, truth):\n    return (drawn.mean((1, 2, 3)) - truth.mean((1, 2, 3))) ** 2\n")
    config = small_training("x", loss={"perceptual": f"{file}:darkness", "perceptual_weight": 0.5})
    program, states, (report,) = updates(config, [pixels_of()])
    seen, truth = seen_by(program, states[0].params, pixels_of())
    expected = np.mean((seen.pixels_BHW3.mean((1, 2, 3)) - truth.mean((1, 2, 3))) ** 2)
    assert report.losses["perceptual"] == pytest.approx(expected, rel=1e-4)
    _, without, _ = updates(dataclasses.replace(config, loss=dataclasses.replace(config.loss, perceptual_weight=0.0)),
                            [pixels_of()])  # fmt: skip
    assert not np.array_equal(
        states[1].params["decoder"]["conv_out"]["kernel"], without[1].params["decoder"]["conv_out"]["kernel"]
    )
    for name in (f"{file}:nothing", f"{file}", "no_such_module:f"):
        with pytest.raises(InputError, match=re.escape(f"loss.perceptual: {name}")):
            make_codec_program(dataclasses.replace(config, loss=dataclasses.replace(config.loss, perceptual=name)))


# The codebook ---------------------------------------------------------------------------------------------------------


def test_an_average_codebook_is_a_running_mean():
    config = warm(small_training("x", loss={"codebook": "average", "average_decay": 0.7}))
    batches = [pixels_of(seed) for seed in range(3)]
    program, states, _ = updates(config, batches)
    usage_V, sum_VC, row_VC = np.zeros(16), np.zeros((16, 4)), states[0].params["codebook_VC"]
    for before, after, pixels in zip(states[:-1], states[1:], batches, strict=True):
        seen, _ = seen_by(program, before.params, pixels)
        code_N, latent_NC = seen.code_BK.ravel(), seen.latent_BKC.reshape(-1, 4)
        for row in range(16):
            usage_V[row] = 0.7 * usage_V[row] + 0.3 * (code_N == row).sum()
            sum_VC[row] = 0.7 * sum_VC[row] + 0.3 * latent_NC[code_N == row].sum(0)
        row_VC = np.where(usage_V[:, None] > 0, sum_VC / np.maximum(usage_V, 1e-20)[:, None], row_VC)
        np.testing.assert_allclose(after.usage_V, usage_V, rtol=1e-5)
        np.testing.assert_allclose(after.params["codebook_VC"], row_VC, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("codebook", long_but("gradient", of=["gradient", "average"]))
def test_dead_rows_are_put_on_latents(codebook):
    config = small_training("x", loss={"codebook": codebook, "average_decay": 0.5, "dead_below": 0.5})
    batches = [pixels_of(seed) for seed in range(8)]
    program, states, reports = updates(config, batches)
    for before, after, report, pixels in zip(states[:-1], states[1:], reports, batches, strict=True):
        mean_use = report.chosen_V.sum() / 16
        usage_V = 0.5 * before.usage_V + 0.5 * report.chosen_V
        dead_V = usage_V < 0.5 * mean_use
        assert report.restarted == dead_V.sum()
        np.testing.assert_allclose(after.usage_V, np.where(dead_V, mean_use, usage_V), rtol=1e-6)
        latent_NC = seen_by(program, before.params, pixels)[0].latent_BKC.reshape(-1, 4)
        for row in after.params["codebook_VC"][dead_V]:
            assert np.abs(latent_NC - row).max(1).min() < 1e-5  # another compiled program made these
    assert reports[0].restarted > 0
    assert sum(report.restarted for report in reports[1:]) > 0


def test_far_latents_are_drawn_by_their_squared_distance():
    latent_NC = jnp.asarray([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0], [3.0, 3.0]])
    drawn = np.asarray(far_latents(latent_NC, jnp.zeros((4, 2)), 20_000, jax.random.key(0)))
    share = [(drawn == np.asarray(latent)).all(1).mean() for latent in latent_NC]
    # Three standard deviations of a share of 20,000 draws.
    np.testing.assert_allclose(share, np.array([0, 1, 4, 18]) / 23, atol=0.011)


# The critic -----------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_the_critics_weight_is_a_ratio_of_gradients():
    """As by two backward passes through everything (Esser et al., 2021, equation 7)."""
    config = small_training("x", loss={"adversarial": 0.5})
    program, states, (report,) = updates(config, [pixels_of()])
    params, critic = states[0].params, states[0].critic
    truth = to_network(config.network, pixels_of())

    def drawn(params):
        return program.network.apply({"params": params}, truth, method="reconstruct").pixels_BHW3

    def reconstruction(params):
        return jnp.mean(jnp.abs(drawn(params) - truth))

    def fooling(params):
        return -jnp.mean(program.critic.apply({"params": critic}, drawn(params)))

    ours, its = (
        np.linalg.norm(jax.grad(f)(params)["decoder"]["conv_out"]["kernel"]) for f in (reconstruction, fooling)
    )
    assert report.losses["adversarial_weight"] == pytest.approx(0.5 * ours / (its + 1e-4), rel=1e-3)
    assert report.losses["adversarial"] == pytest.approx(float(fooling(params)), rel=1e-4)
    true, false = (np.asarray(program.critic.apply({"params": critic}, x)) for x in (truth, drawn(params)))
    hinge = (np.maximum(1 - true, 0).mean() + np.maximum(1 + false, 0).mean()) / 2
    assert report.losses["critic"] == pytest.approx(hinge, rel=1e-4)


@pytest.mark.long
def test_the_critic_waits_for_its_step():
    config = small_training("x", loss={"adversarial": 0.5, "adversarial_from": 2, "adaptive": False})
    _, states, reports = updates(config, [pixels_of(seed) for seed in range(4)])
    changed = [
        any(jax.tree.leaves(jax.tree.map(lambda a, b: (a != b).any(), one.critic, other.critic)))
        for one, other in zip(states[:-1], states[1:], strict=True)
    ]
    assert changed == [False, False, True, True]
    assert [report.losses["adversarial_weight"] for report in reports] == [0, 0, 0.5, 0.5]
    _, without, _ = updates(small_training("x"), [pixels_of(seed) for seed in range(3)])
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), states[2].params, without[2].params
    )


def test_an_update_that_is_not_finite_changes_only_the_step():
    config = small_training("x", loss={"codebook": "average", "adversarial": 0.5})
    program = make_codec_program(resolve(config))
    state = create_codec_state(program)
    broken = jax.tree.map(lambda x: x, state)
    broken.params["after"]["bias"] = broken.params["after"]["bias"].at[0].set(jnp.nan)
    _, (before, after), (report,) = updates(config, [pixels_of()], broken)
    assert not report.finite and after.step == before.step + 1
    jax.tree.map(np.testing.assert_array_equal, dataclasses.replace(after, step=before.step), before)


# Runs -----------------------------------------------------------------------------------------------------------------


def trained_files(run):
    return {name: (Path(run) / name).read_bytes() for name in ("codec.json", "codec.safetensors")}


def journal(run):
    timed = {"pictures_per_second"}
    return [{k: v for k, v in record.items() if k not in timed} for record in records(str(run))]


FULL = {"codebook": "average", "adversarial": 0.5, "adversarial_from": 5}


@pytest.mark.slow
def test_killed_and_gone_on_is_bit_for_bit(folder, tmp_path):
    killed, calm = (small_training(folder, tmp_path / name, FULL) for name in ("killed", "calm"))
    process = spawn(__file__, killed.run.dir, folder, signal.SIGKILL.value, 8)
    _, err = process.communicate(timeout=600)
    assert process.returncode == -signal.SIGKILL, err[-3000:]
    assert not (tmp_path / "killed" / "codec.json").exists()
    for config in (killed, calm):
        summary = train_codec(config, quiet=True)
    assert journal(killed.run.dir) == journal(calm.run.dir)
    assert trained_files(killed.run.dir) == trained_files(calm.run.dir)
    assert (tmp_path / "killed/sheets/heldout-00000012.png").read_bytes() == (
        tmp_path / "calm/sheets/heldout-00000012.png"
    ).read_bytes()
    assert summary["steps"] == 12 and summary["final"]["pictures"] == 96
    assert summary["eval"]["heldout"]["pictures"] == 6
    assert train_codec(calm, quiet=True) == summary


@pytest.mark.long
def test_sigterm_saves_and_says_where_it_goes_on(folder, tmp_path):
    config = small_training(folder, tmp_path / "run", FULL)
    process = spawn(__file__, config.run.dir, folder, signal.SIGTERM.value, 8)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 143, err[-3000:]
    assert "goes on from there" in out
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "stopped"
    assert train_codec(config, quiet=True)["steps"] == 12


@pytest.mark.long
def test_devices_change_nothing_but_rounding(folder, tmp_path):
    one = small_training(folder, tmp_path / "one", FULL)
    train_codec(one, quiet=True)
    output(spawn(__file__, tmp_path / "four", folder, 0, 0, devices=4))
    for alone, spread in zip(journal(tmp_path / "one"), journal(tmp_path / "four"), strict=True):
        assert alone.keys() == spread.keys()
        one, other = ({k: v for k, v in record.items() if k not in ("kind", "eval_set")} for record in (alone, spread))
        # Sums over pictures in another order; Adam's first steps and a critic amplify that from update to update.
        assert other == pytest.approx(one, rel=1e-3 if one["step"] <= 4 else 5e-2, abs=1e-5)


def test_a_trained_codec_opens_and_is_what_was_judged(folder, tmp_path):
    config = small_training(folder, tmp_path / "run", network={"unit_length": "both"})
    summary = train_codec(config, quiet=True)
    codec = open_codec(config.run.dir)
    (pictures,) = Pictures(config.data).held_out(codec.read)
    codes = codec.encode(list(pictures))
    drawn = np.stack([np.asarray(each) for each in codec.decode(codes)])
    error_B = np.square(drawn / 255 - pictures / 255).mean((1, 2, 3))
    assert summary["eval"]["heldout"]["psnr"] == pytest.approx(np.mean(-10 * np.log10(error_B)), abs=1e-3)
    assert summary["eval"]["heldout"]["codebook_use"] == len(np.unique(codes)) / 16


@pytest.mark.long
def test_a_loss_that_is_not_finite_stops_or_is_skipped(folder, tmp_path, monkeypatch):
    original = stage.compile_codec_step

    def broken(program, state):
        step = original(program, state)

        def run(state, pixels):
            state, report = step(state, pixels)
            return state, report._replace(finite=report.finite & (state.step != 5))

        return run

    monkeypatch.setattr(stage, "compile_codec_step", broken)
    with pytest.raises(RunError, match="step 5: a loss or its gradient is not finite.*checkpoints/3"):
        train_codec(small_training(folder, tmp_path / "stop"), quiet=True)
    train_codec(small_training(folder, tmp_path / "skip", train={"on_nan": "skip"}), quiet=True)
    assert [r["step"] for r in records(str(tmp_path / "skip")) if r["kind"] == "event"] == [5]


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"network": {"side": 18}}, "codec.side: 18 pixels cannot be halved 1 times in squares of 2; use a multiple"),
        ({"network": {"decoder": False}}, "network.decoder"),
        ({"train": {"batch": 0}}, "train.batch: must be positive"),
        ({"loss": {"reconstruction": "cubed"}}, "loss.reconstruction"),
    ],
)
def test_configs_that_contradict_themselves(change, message, folder):
    with pytest.raises(InputError, match=re.escape(message)):
        resolve(small_training(folder, **change))


def test_another_config_other_pictures_or_another_run(folder, tmp_path):
    config = small_training(folder, tmp_path / "run", train={"steps": 2})
    train_codec(config, quiet=True)
    before = trained_files(config.run.dir)
    changed = dataclasses.replace(config, network=dataclasses.replace(config.network, codebook=32))
    with pytest.raises(InputError, match="network.codebook: 16 -> 32"):
        train_codec(changed, quiet=True)
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, log_every=1))
    assert train_codec(longer, quiet=True)["steps"] == 2
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"format_version": 2}))
    with pytest.raises(InputError, match="holds no run of this moma_jax"):
        train_codec(dataclasses.replace(config, run=dataclasses.replace(config.run, dir=str(other))), quiet=True)
    assert trained_files(config.run.dir) == before


def test_configs_survive_json(folder, tmp_path):
    config = resolve(small_training(folder, tmp_path / "run"))
    assert from_json(json.loads(json.dumps(to_json(config)))) == config
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps(to_json(config)))
    assert load(tmp_path / "run") == config
    with pytest.raises(InputError, match="no config of an image tokenizer"):
        from_json({"format_version": 2})


def main(directory, folder, number, at):
    """Trains; sends itself a signal before batch `at`, counted from 1, where it is not 0."""
    original = Pictures.stream

    def stream(self, *arguments):
        return Blown(original(self, *arguments), Path(directory) / "checkpoints" / "6", int(at), int(number))

    if int(at):
        Pictures.stream = stream
    train_codec(small_training(folder, directory, FULL))


if __name__ == "__main__":
    main(*sys.argv[1:])
