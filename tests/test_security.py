"""What docs/security.md says of files of strangers: none of it runs, leaves its folder, or fills the memory."""

import ast
import dataclasses
import gzip
import importlib.util
import io
import json
import re
import struct
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command_line import run as command
from paths import ROOT
from PIL import Image
from small_pictures import small_training
from tiny import tiny

import moma_jax
from moma_jax import recipes
from moma_jax.addresses import require_no_credentials, without_credentials
from moma_jax.codec.pictures import BrokenPicture, read_picture
from moma_jax.config import Config, PrepareConfig, RunConfig
from moma_jax.config_json import to_json
from moma_jax.data.documents import Broken, Document
from moma_jax.data.sources import files, lookup, open_source, tars
from moma_jax.errors import InputError
from moma_jax.page import experts, reading
from moma_jax.page import write as write_lib
from moma_jax.runs.directory import RunDir
from moma_jax.runs.directory import command as command_of_process
from moma_jax.storage.directory import Directory
from moma_jax.studies import records
from moma_jax.training.codec import config as codec_config
from moma_jax.training.load import config_of

# Code that runs -------------------------------------------------------------------------------------------------------

RUNS_CODE = re.compile(
    "eval|exec|compile|__import__|load_module|exec_module|spec_from_file_location|import_module|system|popen|Popen|"
    "check_output|check_call|run_path|run_module"
)
NAMED = {
    "recipes.py": {"exec_module", "spec_from_file_location"},  # recipes that the user names
    "rules.py": {"exec_module", "spec_from_file_location", "import_module"},  # routing rules and functions, likewise
    "late.py": {"import_module"},  # this package's own names and libraries'
    "commands/__init__.py": {"import_module"},  # this package's own commands
    "bench/suite.py": {"Popen"},  # this package's own commands
    "plan/compile.py": {"compile"},  # a function of its own of that name: XLA's compiler
}
MODULES = {str(p.relative_to(ROOT / "moma_jax")): p for p in sorted((ROOT / "moma_jax").rglob("*.py"))}
PICKLES = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "yaml", "serialize_executable"}


def calls_of(path: Path) -> set[str]:
    """Names of what a file calls that can run code; methods of a compiled program apart."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            method = isinstance(node.func, ast.Attribute)
            if RUNS_CODE.fullmatch(name) and not (method and name in ("compile", "eval")):
                found.add(name)
    return found


def test_code_runs_in_named_places_alone():
    assert {name: calls for name, path in MODULES.items() if (calls := calls_of(path))} == NAMED


def test_nothing_opens_pickles_but_the_one_place_that_builds_weights_alone():
    loads = []
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                words = {part for alias in node.names for part in alias.name.split(".")}
                words |= set((getattr(node, "module", None) or "").split("."))
                assert not words & PICKLES, name
            if isinstance(node, ast.keyword):
                assert node.arg not in ("allow_pickle", "trust_remote_code", "shell"), name
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                loads.append((name, {each.arg: ast.unparse(each.value) for each in node.keywords}["weights_only"]))
    assert loads == [("convert/from_vqgan.py", "True")]


def test_the_code_of_a_recorded_perceptual_loss_is_not_run(tmp_path, capsys):
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\ndef far(a, b): return a\n")
    named = f"{tmp_path}/mine.py:far"
    config = small_training(tmp_path, tmp_path / "run", loss={"perceptual": named})
    (tmp_path / "config.json").write_text(json.dumps(codec_config.to_json(config)))
    code, out, err = command(capsys, "codec", "train", tmp_path / "config.json")
    assert code == 2 and f"name it: --loss.perceptual {named}" in err and not (tmp_path / "ran").exists()
    with pytest.raises(InputError, match="whose code is not run for that"):
        codec_config.load(tmp_path / "config.json")
    assert codec_config.load(tmp_path / "config.json", named).loss.perceptual == named
    code, out, err = command(capsys, "codec", "train", tmp_path / "config.json", "--loss.perceptual", named)
    assert code == 2 and (tmp_path / "ran").exists(), "whoever names it runs it"


def test_compiled_programs_of_a_record_are_not_used(tmp_path):
    """They are machine code."""
    for cache, kept in ((str(tmp_path / "theirs"), None), ("off", "off"), (None, None)):
        config = Config(run=RunConfig(dir=str(tmp_path), compilation_cache=cache))
        (tmp_path / "config.json").write_text(json.dumps(to_json(config)))
        assert recipes.load(tmp_path).run.compilation_cache == kept
        assert config_of(str(tmp_path)).run.compilation_cache == kept


# Archives -------------------------------------------------------------------------------------------------------------


def tar_of(*members, packed=False) -> bytes:
    """A tar of (name, content or header) pairs."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz" if packed else "w") as archive:
        for name, content in members:
            header = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                header.size = len(content)
                archive.addfile(header, io.BytesIO(content))
            else:
                header.type, header.linkname = content
                archive.addfile(header)
    return buffer.getvalue()


def png(width=4, height=4) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


def read_all(path, **options):
    source = open_source(PrepareConfig(source=str(path), **options))
    return [item for unit in range(source.units()) for item in source.read(unit)]


def test_members_of_a_tar_are_names_and_no_places(tmp_path):
    (tmp_path / "secret.png").write_bytes(png())
    home = tmp_path / "home"
    home.mkdir()
    content = tar_of(
        ("../x.png", png()), ("../x.txt", b"up"), (f"{tmp_path}/y.png", png()), (f"{tmp_path}/y.txt", b"absolute"),
        ("z.png", (tarfile.SYMTYPE, "../secret.png")), ("z.txt", b"a link"),
        ("w.png", (tarfile.LNKTYPE, "../secret.png")), ("w.txt", b"a hard link"),
    )  # fmt: skip
    (home / "a.tar").write_bytes(content)
    before = sorted(tmp_path.rglob("*"))
    found = read_all(home)
    assert [type(item) for item in found] == [Document, Document, Broken, Broken]
    assert all("a link" in item.reason for item in found[2:])
    assert sorted(tmp_path.rglob("*")) == before, "nothing is written"


def test_a_packed_tar_of_zeros_fills_no_memory(tmp_path, monkeypatch):
    for module in (files, tars):
        monkeypatch.setattr(module, "MAX_FILE_BYTES", 1 << 20)
    many = [(f"b.{number}", bytes(700_000)) for number in range(50)]
    (tmp_path / "a.tar.gz").write_bytes(
        tar_of(("a.png", png()), ("a.txt", b"a"), *many, ("c.png", png()), ("c.txt", b"c"), packed=True)
    )
    assert (tmp_path / "a.tar.gz").stat().st_size < 1 << 18
    source = open_source(PrepareConfig(source=str(tmp_path)))
    held = [sum(len(c) for c in members.values() if c) for _, members in source._samples("a.tar.gz")]
    assert max(held) <= 1 << 20
    found = read_all(tmp_path)
    assert [type(item) for item in found] == [Document, Broken, Document]
    assert "larger than 1 MiB with the sample's other members" in found[1].reason


def test_a_chain_of_headers_is_a_damaged_tar(tmp_path):
    """tarfile calls itself for each."""
    header = tarfile.TarInfo("pax")
    header.type = tarfile.XHDTYPE
    record = b"%d comment=x\n" % (len(b"comment=x\n") + 3)
    header.size = len(record)
    link = header.tobuf(tarfile.USTAR_FORMAT) + record.ljust(tarfile.BLOCKSIZE, b"\0")
    whole = tar_of(("a.png", png()), ("a.txt", b"a"))
    end = len(whole) - len(whole.rstrip(b"\0"))
    first = whole[: -(end // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE]
    (tmp_path / "a.tar").write_bytes(first + link * 5000 + bytes(1024))
    with pytest.raises(InputError, match="the tar is damaged behind a: maximum recursion depth"):
        read_all(tmp_path)
    with pytest.raises(InputError, match="is damaged"):
        lookup.Lookup(str(tmp_path / "a.tar"), None).read("a.png")


def test_a_line_that_unpacks_to_more_than_a_line_is_broken(tmp_path, monkeypatch):
    from moma_jax.data.sources import jsonl

    monkeypatch.setattr(jsonl, "MAX_LINE_BYTES", 1 << 16)
    bomb = b'{"text": "' + bytes(8 << 20).replace(b"\0", b"a") + b'"}\n'
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "first"}\n' + bomb + b'{"text": "last"}\n'))
    found = read_all(tmp_path)
    assert [type(item) for item in found] == [Document, Broken, Document] and "a line longer than" in found[1].reason


@pytest.mark.parametrize("name", ["../status.json", "/etc/passwd", "checkpoints/x", "config.json/../../x"])
def test_a_record_holds_its_own_files_alone(tmp_path, name):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as record:
        record.writestr(name, b"{}")
    with pytest.raises(InputError, match="which is no part of a run's record"):
        records.read_record(tmp_path / "a.zip")


def entry_of(path, name="config.json", content=b"{}", packing=zipfile.ZIP_DEFLATED, twice=False):
    with zipfile.ZipFile(path, "w") as record:
        for _ in range(1 + twice):
            record.writestr(name, content, packing)
    return path


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_record_cannot_fill_the_memory(tmp_path, monkeypatch):
    path = tmp_path / "a.zip"
    for packing in (zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2):
        with pytest.raises(InputError, match="packed as no record is"):
            records.read_record(entry_of(path, packing=packing))
    with pytest.raises(InputError, match="doubled"):
        records.read_record(entry_of(path, twice=True))
    monkeypatch.setattr(records, "MOST_BYTES", 1 << 20)
    bomb = entry_of(path, content=bytes(8 << 20)).read_bytes()
    with pytest.raises(InputError, match="no record is so large"):
        records.read_record(path)
    small = struct.pack("<L", 100)
    path.write_bytes(bomb.replace(struct.pack("<L", 8 << 20), small))  # a header that lies
    with pytest.raises(InputError, match="damaged or no record"):
        records.read_record(path)


# Pictures -------------------------------------------------------------------------------------------------------------


def test_a_picture_that_unpacks_to_gigabytes_is_not_tried():
    def chunk(kind, data):
        return struct.pack(">L", len(data)) + kind + data + struct.pack(">L", zlib.crc32(kind + data))

    def bomb(side):
        header, data = struct.pack(">LLBBBBB", side, side, 8, 2, 0, 0, 0), zlib.compress(bytes(1 << 20))
        return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")

    with pytest.raises(BrokenPicture, match="decompression bomb"):
        read_picture(bomb(60_000), 16)
    with pytest.raises(BrokenPicture, match="6000 x 6000 pixels, more than 33554432"):
        read_picture(bomb(6000), 16)


def test_programs_that_pillow_starts_stay_out_of_reach(tmp_path):
    """PostScript is a program, and Pillow has Ghostscript run it."""
    with pytest.raises(BrokenPicture, match="not a picture of"):
        read_picture(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\nshowpage\n", 16)


# Pages ----------------------------------------------------------------------------------------------------------------

EVIL = "<script>alert(1)</script><!--<script>"


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A run on random tokens, whose records a stranger may have changed."""
    config = tiny(tmp_path_factory.mktemp("secure"), train_steps=2, train_log_every=1, train_eval_every=2)
    moma_jax.train(config, quiet=True)
    return config


def test_pages_escape_what_they_show(ran, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    for name in ("config.json", "summary.json", "status.json", "metrics.jsonl"):
        text = (Path(ran.run.dir) / name).read_text()
        (run / name).write_text(text)
    lines = moma_jax.read_metrics(run)  # without their sums, which would give what is changed away
    evaluated = next(line for line in lines if line["kind"] == "eval")
    lines += [evaluated | {"eval_set": EVIL}, evaluated | {"routing": EVIL}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = json.loads((run / "summary.json").read_text())
    summary |= {"device": {"kind": EVIL, "count": EVIL}, "commit": EVIL}
    (run / "summary.json").write_text(json.dumps(summary))
    (run / "sheets").mkdir()
    (run / "sheets" / "<img src=x onerror=alert(1)>-00000002.png").write_bytes(png())
    content = write_lib.page(EVIL, [reading.read_seen(str(run), EVIL)]).decode()
    own = content.count("<script")
    assert "alert(1)<" not in content and "<img src=x" not in content and "<!--" not in _without_scripts(content)
    assert EVIL not in content and own == write_lib.page("a", [reading.read_seen(ran.run.dir)]).decode().count(
        "<script"
    )


def _without_scripts(content: str) -> str:
    return re.sub(r"<script>.*?</script>", "", content, flags=re.DOTALL)


@pytest.mark.parametrize("column", ["layer", "document", "place", "experts"])
def test_words_in_the_place_of_numbers_are_no_telemetry(ran, tmp_path, column):
    """A page shows numbers as they are."""
    run = tmp_path / "run"
    folder = run / reading.FOLDER
    folder.mkdir(parents=True)
    (run / "config.json").write_bytes((Path(ran.run.dir) / "config.json").read_bytes())
    (run / "metrics.jsonl").write_bytes((Path(ran.run.dir) / "metrics.jsonl").read_bytes())
    for end, names in reading.COLUMNS_OF.items():
        own = EVIL if column != "experts" else [EVIL]
        values = {name: ["a"] if name in reading.NAMES else [own] if name == column else [1] for name in names}
        pq.write_table(pa.table(values), folder / f"heldout-00000002{end}")
    with pytest.raises(InputError, match=rf"{column} holds .*string.*, no numbers; remove the file"):
        reading.read_seen(str(run))


def test_sheets_of_a_run_are_pngs_of_a_bounded_size(ran, tmp_path, monkeypatch):
    run = tmp_path / "run"
    (run / "sheets").mkdir(parents=True)
    (run / "config.json").write_bytes((Path(ran.run.dir) / "config.json").read_bytes())
    (run / "sheets" / "a-00000001.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\nshowpage\n")
    with pytest.raises(InputError, match="is damaged"):
        reading.read_seen(str(run))
    monkeypatch.setattr(reading, "MAX_PIXELS", 15)
    (run / "sheets" / "a-00000001.png").write_bytes(png())
    with pytest.raises(InputError, match="4 x 4 pixels, more than 15"):
        reading.read_seen(str(run))


def test_words_of_experts_are_escaped(ran):
    seen = dataclasses.replace(reading.read_seen(ran.run.dir))
    seen.__dict__["name_of_id"] = lambda token: EVIL
    token = {"routing": "choice", "token": 1, "document": 1, "modality": 0, "place": -1, "experts": [1]}
    shown = experts.row_html(dataclasses.replace(seen, row=[token]), "choice")
    assert "<script" not in shown


# Credentials ----------------------------------------------------------------------------------------------------------

SECRET = "hunter2hunter2"
ADDRESSES = (
    f"s3://AKIA:{SECRET}@bucket/run", f"gs://bucket/run?token={SECRET}", f"https://a/b?x=1&X-Amz-Signature={SECRET}",
    f"s3://bucket/a?secret_key={SECRET}",
)  # fmt: skip


@pytest.mark.parametrize("address", ADDRESSES)
def test_addresses_with_credentials_are_refused_and_not_repeated(address, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert SECRET not in without_credentials(f"moma train a --run.dir '{address}'")
    for refused in (Directory, files.locate, require_no_credentials):
        with pytest.raises(InputError) as error:
            refused(address)
        assert SECRET not in str(error.value) and "holds credentials" in str(error.value)
    for words in (
        ("train", "quickstart", "--run.dir", address), ("train", "quickstart", "--data.prepare.source", address),
        ("prepare", address, "--out", "x"), ("show", address), ("eval", address),
        ("train", "quickstart", "--run.init-from", address),
    ):  # fmt: skip
        code, out, err = command(capsys, *words)
        assert code == 2 and err.count("\n") == 1 and SECRET not in out + err, words
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("address", ["s3://bucket/a@b", "gs://bucket/run", "https://a.b/@me/key?page=2", "a?key=b"])
def test_other_addresses_stay_as_they_are(address):
    require_no_credentials(address)
    assert without_credentials(address) == address or "://" not in address


def test_no_secret_of_the_environment_or_the_command_line_stands_in_a_run(tmp_path, monkeypatch):
    names = ("AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY", "HF_TOKEN", "GOOGLE_APPLICATION_CREDENTIALS")
    for name in names:
        monkeypatch.setenv(name, f"{SECRET}{name}")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    wandb = "studies" if importlib.util.find_spec("wandb") else None
    monkeypatch.setattr(sys, "argv", ["moma", "train", "a", f"--x=s3://A:{SECRET}@bucket/run"])
    assert SECRET not in command_of_process() and "s3://...@bucket/run" in command_of_process()
    moma_jax.train(tiny(tmp_path, train_steps=2, run_wandb=wandb, run_tensorboard=True), quiet=True)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"config.json", "summary.json", "metrics.jsonl"} <= {path.name for path in written}
    telling = [str(path) for path in written if SECRET.encode() in path.read_bytes()]
    assert not telling
    assert "command" in RunDir(str(tmp_path)).read_json("summary.json")
