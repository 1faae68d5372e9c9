"""Pages: every figure is of a record, nothing is fetched, buttons do what they say."""

import base64
import dataclasses
import io
import json
import re
import shutil

import numpy as np
import pyarrow as pa
import pytest
from browser import browser, opened
from command_line import run as command
from PIL import Image
from small_stores import drawn_config
from tiny import tiny

import moma_jax
from moma_jax.config import SampleConfig
from moma_jax.config_json import to_json
from moma_jax.errors import InputError
from moma_jax.evaluation.documents import to_bytes
from moma_jax.evaluation.telemetry import hashes_in
from moma_jax.page import curves, experts
from moma_jax.page import write as write_lib
from moma_jax.page.reading import read_seen
from moma_jax.page.write import page


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A run on drawn scenes with samples, evaluated three times."""
    samples = (SampleConfig(("A red circle",)),)
    config = drawn_config(tmp_path_factory.mktemp("page"), eval_every=1, samples=samples)
    moma_jax.train(config, quiet=True)
    return config


@pytest.fixture
def seen(ran):
    return read_seen(ran.run.dir)


def data_of(content, name):
    found = re.search(rf"id='data-{name}'>(.*?)</script>", content.decode(), re.DOTALL)
    return json.loads(found[1].replace("<\\/", "</"))


def changed(seen, index, **fields):
    """The run with one of its records changed, read anew as from its files."""
    records = [dict(record) for record in seen.records]
    records[index] |= fields
    from moma_jax.studies import curves as study_curves

    rebuilt = study_curves._curves([r for r in records if r["kind"] in ("train", "eval")], seen.run.start, "choice")
    return dataclasses.replace(seen, records=records, run=dataclasses.replace(seen.run, curves=rebuilt))


def test_every_figure_follows_its_record(seen):
    """A changed record changes its figure on the page, and no other."""
    train = next(n for n, r in enumerate(seen.records) if r["kind"] == "train")
    evaluated = next(n for n, r in enumerate(seen.records) if r["kind"] == "eval" and "gap_percent" in r)
    names = ("losses", "gaps", "speeds", "shares")
    before = page("a", [seen])
    for index, fields, changes in (
        (train, {"loss": 7.25}, {"losses"}),
        (evaluated, {"loss_text": 8.5}, {"losses"}),
        (evaluated, {"gap_percent": 12.5}, {"gaps"}),
        (train, {"tokens_per_second": 12345.0}, {"speeds"}),
    ):
        after = page("a", [changed(seen, index, **fields)])
        differ = {name for name in names if data_of(before, name) != data_of(after, name)}
        (value,) = fields.values()
        assert differ == changes and str(value).rstrip("0").rstrip(".") in str(data_of(after, *changes))
    summary = seen.run.summary | {"time": seen.run.summary["time"] | {"spent_data": 999.0}}
    after = page("a", [dataclasses.replace(seen, run=dataclasses.replace(seen.run, summary=summary))])
    assert {name for name in names if data_of(before, name) != data_of(after, name)} == {"shares"}
    assert "999" in str(data_of(after, "shares"))


def test_routing_is_of_the_telemetry(seen):
    row = next(row for row in seen.experts if row["routing"] == "threshold" and row["layer"] == 1)
    assert not experts.named(dataclasses.replace(seen, experts=[row | {"load": 1.0}]))
    for load, word in ((0.01, "dead"), (3.5, "overloaded")):
        other = dataclasses.replace(seen, experts=[row | {"load": load}])
        where = f"{word}: layer 1, {row['group']} expert {row['expert']}, threshold (load {load:.2f})"
        assert experts.named(other) == [where] and where in page("a", [other]).decode()
        assert f">{load:.2f}</td>" in page("a", [other]).decode()
    assert "kept" in page("a", [seen]).decode() and {r["step"] for r in seen.experts} == {3}


def test_a_packed_row_has_its_pictures_and_the_experts_of_every_token(seen):
    content = experts.row_html(seen, "threshold")
    own = [token for token in seen.row if token["routing"] == "threshold" and token["document"]]
    masks = re.findall(r"data-experts='([\d,.]*)'", content)
    counted = [t for t in own if not (t["modality"] == 1 and t["place"] < 0)]
    bits = [[sum(1 << int(e) for e in layer.split(".") if e) for layer in mask.split(",")] for mask in masks]
    assert bits == [token["experts"] for token in counted] and max(map(max, bits)) > 1
    codec, (picture,) = seen.store.image_codec(), re.findall(r"data:image/png;base64,([\w+/=]+)", content)[:1]
    code_V = np.full(seen.store.vocabulary.size, -1)
    image = seen.store.vocabulary.modalities[1]
    code_V[image.code_ids] = np.arange(image.size)
    codes = [t for t in own if t["modality"] == 1][:256]
    (truth,) = codec.decode(code_V[[t["token"] for t in codes]][None])
    shown = Image.open(io.BytesIO(base64.b64decode(picture))).resize((16, 16), Image.Resampling.NEAREST)
    assert np.array_equal(np.asarray(shown.convert("RGB")), np.asarray(truth))


def test_a_page_needs_no_network_and_is_small(seen, tmp_path):
    content = page("one & <two>", [seen])
    own = content.decode().replace(write_lib.plotly.offline.get_plotlyjs(), "")
    assert len(content) < 8 << 20 and "one &amp; &lt;two&gt;" in own
    assert not re.findall(r"(?:src|href)='(?!data:|#)", own) and "http" not in re.sub(r"data:[^'\"]*", "", own)
    assert "Samples" in own and "base64" in own


def test_long_lines_keep_their_means_and_their_ends():
    step_N = np.arange(1.0, 10_001.0)
    thin_N, loss_N = curves.thinned(step_N, np.sin(step_N / 500) + 2)
    assert len(thin_N) == curves.MOST_POINTS and thin_N[-1] == 10_000
    np.testing.assert_allclose(loss_N[:-1], np.sin(thin_N[:-1] / 500) + 2, atol=1e-3)


def test_runs_side_by_side_tell_their_differences(seen, ran, tmp_path, capsys):
    other = tmp_path / "other"
    moma_jax.train(tiny(other, train_steps=2, model_ffn="dense"), quiet=True)
    out = tmp_path / "page.html"
    assert command(capsys, "show", ran.run.dir, other, "--html", out)[:2] == (0, f"{out}\n")
    text = out.read_text()
    assert "model.ffn" in text and "&quot;dense&quot;" in text and "run.dir" not in text
    for words, message in (
        ((ran.run.dir, other, "--html", out), "is there already"),
        ((ran.run.dir, other), "give one run or store"),
        ((other, f"{other}/", "--html", tmp_path / "b.html"), "name each run once"),
        ((tmp_path / "nothing", "--html", tmp_path / "b.html"), "no config.json here"),
    ):
        code, _, error = command(capsys, "show", *words)
        assert code == 2 and message in error and not (tmp_path / "b.html").exists()


def test_a_page_that_would_be_too_large_is_refused(seen, monkeypatch):
    monkeypatch.setattr(write_lib, "MOST_BYTES", 1000)
    with pytest.raises(InputError, match="show fewer runs"):
        page("a", [seen])


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("sheets/samples-00000003.png", b"no picture", "is damaged"),
        ("sheets/samples-00000003.png", None, "is damaged"),
        ("routing/heldout-00000003.parquet", None, "is damaged"),
        ("routing/heldout-00000003.parquet", to_bytes([pa.table({"routing": ["choice"]})]), "has no column"),
        ("routing/heldout-00000003.row.parquet", to_bytes([pa.table({"token": [1]})]), "has no column"),
    ],
)
def test_a_damaged_file_is_named(ran, tmp_path, file, content, message):
    """None: the file is cut off in its middle."""
    where = shutil.copytree(ran.run.dir, tmp_path / "run")
    whole = (where / file).read_bytes()
    (where / file).write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(InputError, match=f"{file}: {message}.*; remove it"):
        read_seen(str(where))


def test_a_store_that_was_made_anew_explains_no_ids(seen, ran, monkeypatch):
    other = {"vocabulary": "another"}
    monkeypatch.setattr("moma_jax.page.reading.hashes_in", lambda metadata: hashes_in(metadata) | other)
    anew = read_seen(ran.run.dir)
    assert seen.store is not None and not seen.unread and anew.store is None and anew.unread
    content = page("a", [anew]).decode()
    assert "ids stand for text and pictures" in content and "ids stand for" not in page("a", [seen]).decode()
    assert re.search(r">#\d+</code>", content)


def test_many_experts_have_colours_in_turn(seen):
    row = [token | {"experts": [1 << 40 | 1, 0]} for token in seen.row]
    content = page("a", [dataclasses.replace(seen, row=row)]).decode()
    assert "data-experts='0.40,'" in content and f"background:{experts.MASKS[40 % 8]}'>40</span>" in content


# In a browser ---------------------------------------------------------------------------------------------------------


def test_in_a_browser_everything_draws_and_every_button_works(seen, tmp_path):
    path = tmp_path / "page.html"
    path.write_bytes(page("a", [seen, dataclasses.replace(seen, name="again")]))
    from selenium.webdriver.support.select import Select

    with browser() as driver:
        opened(driver, path)
        assert [entry for entry in driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []
        drawn = "return [...document.querySelectorAll('.plot')].map(p => [p.id, p.querySelectorAll('svg').length > 0])"
        assert dict(driver.execute_script(drawn)) == dict.fromkeys(("losses", "gaps", "speeds", "shares"), True)
        x = "return document.getElementById('losses').data[0].x"
        flops = driver.execute_script(x)
        driver.execute_script("document.querySelector('[data-axis=tokens]').focus()")
        driver.switch_to.active_element.send_keys(" ")  # by the keyboard
        tokens = driver.execute_script(x)
        assert flops != tokens == [float(f"{v:.5g}") for v in next(iter(seen.run.curves.values())).tokens_N]
        titles = "return Object.values(document.getElementById('losses').layout).map(v => v.title && v.title.text)"
        assert "tokens" in driver.execute_script(titles) and "FLOPs" not in driver.execute_script(titles)
        pressed = "return [...document.querySelectorAll('[aria-pressed=true]')].map(b => b.textContent)"
        assert driver.execute_script(pressed) == ["tokens", "load", "load"]
        shown = "return [...document.querySelectorAll('.heat-0')].filter(m => !m.hidden).map(m => m.dataset.name)"
        driver.execute_script("document.querySelector('[data-shows=heat-0] [data-show=gate_mean]').click()")
        assert driver.execute_script(shown) == ["gate_mean"]
        colours = "return [...document.querySelectorAll('#row-0 b')].map(b => b.title)"
        after_last = driver.execute_script(colours)
        Select(driver.find_element("css selector", "select[data-row=row-0]")).select_by_value("0")
        own = [t for t in seen.row if t["routing"] == "threshold" and t["document"]]
        own = [t for t in own if not (t["modality"] == 1 and t["place"] < 0)]
        for layer, titles in ((1, after_last), (0, driver.execute_script(colours))):
            taken = [[e for e in range(2) if token["experts"][layer] >> e & 1] for token in own]
            assert titles == ["experts " + ", ".join(map(str, t)) if t else "no expert" for t in taken]


def test_without_scripts_the_tables_and_pictures_are_there(seen, tmp_path):
    path = tmp_path / "page.html"
    path.write_bytes(re.sub(rb"<script>.*?</script>", b"", page("a", [seen]), flags=re.DOTALL))
    with browser() as driver:
        driver.get(f"file://{path}")
        visible = "return [...document.querySelectorAll(arguments[0])].filter(e => e.offsetHeight > 0).length"
        assert driver.execute_script(visible, ".plot") == driver.execute_script(visible, ".controls") == 0
        assert driver.execute_script(visible, "table") > 4 and driver.execute_script(visible, "img.sheet") == 1


@pytest.mark.slow
def test_five_runs_of_100k_records_open_fast(tmp_path):
    """Reading, thinning and drawing; what it takes is printed, and a page that hangs fails."""
    runs = []
    for number in range(5):
        config = tiny(tmp_path / f"run-{number}", train_steps=20_000)
        path = tmp_path / f"run-{number}"
        path.mkdir()
        records = []
        for step in range(1, 20_001):
            loss = 3.0 + number / 10 + 100 / (step + 50)
            record = {"schema": 1, "kind": "train", "step": step, "time": 0.0, "loss": loss, "loss_text": loss}
            record |= {"loss_image": loss, "tokens_text": step, "tokens_image": step, "tokens": 2 * step}
            records.append(record | {"flops": 1e6 * step, "wall_seconds": 0.1 * step, "tokens_per_second": 20.0})
        (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        (path / "config.json").write_text(json.dumps(to_json(config)))
        (path / "status.json").write_text(json.dumps({"state": "stopped", "step": 20_000, "total": 20_000}))
        runs.append(read_seen(str(path)))
    content = page("five", runs)
    (tmp_path / "page.html").write_bytes(content)
    with browser() as driver:
        seconds = opened(driver, tmp_path / "page.html")
        print(f"{len(content) / 2**20:.1f} MiB, open in {seconds:.1f} s")
        assert driver.execute_script("return document.getElementById('losses').data.length") == 15
