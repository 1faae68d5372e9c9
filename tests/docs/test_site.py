"""The site: it builds strictly, no link is broken, no page loads anything from elsewhere, what is public is told."""

import dataclasses
import html
import importlib.util
import logging
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from paths import ROOT

import moma_jax
from moma_jax import commands, config, router, rules, studies
from moma_jax.codec.network import VqganConfig
from moma_jax.config_json import to_json
from moma_jax.fields import leaves
from moma_jax.generation import Settings
from moma_jax.training.codec import config as codec_config

for needed in ("mkdocs", "material", "mkdocstrings", "mkdocstrings_handlers"):
    if importlib.util.find_spec(needed) is None:
        pytest.skip("needs the extra [docs]", allow_module_level=True)


class Page(HTMLParser):
    """Ids of a page, where its links lead, and what it loads when it is opened."""

    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.loaded = set(), [], []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.ids |= {given[name] for name in ("id", "name") if given.get(name)}
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        self.loaded += [given[name] for name in ("src", "srcset", "data", "poster") if given.get(name)]
        if tag == "link" and given.get("rel") not in ("canonical", "prev", "next"):
            self.loaded.append(given.get("href"))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the site, built with warnings as errors."""
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    settings = load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(folder))
    logging.getLogger("mkdocs").setLevel(logging.INFO)
    settings.plugins.on_startup(command="build", dirty=False)
    build(settings)
    settings.plugins.on_shutdown()
    return folder


@pytest.fixture(scope="module")
def pages(site):
    return {path: Page(path) for path in site.rglob("*.html")}


def test_every_page_of_the_folder_is_there(site):
    sources = [path.relative_to(ROOT / "docs").with_suffix("") for path in (ROOT / "docs").rglob("*.md")]
    assert sources and all((site / source / "index.html").is_file() for source in sources)
    assert not [path for path in site.rglob("*") if path.suffix in (".py", ".zip", ".parquet", ".md")]


def test_no_link_is_broken(site, pages):
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or path.name == "404.html":
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            assert target.is_file() and target.is_relative_to(site.resolve()), (path, link)
            if parts.fragment and target in pages:
                assert unquote(parts.fragment) in pages[target].ids | {"__top"}, (path, link)


def test_no_page_loads_anything_from_elsewhere(site, pages):
    for path, page in pages.items():
        assert not [url for url in page.loaded if urlsplit(url).netloc], path
    for path in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import\s*)[\"']?(https?:)?//", path.read_text()), path


def text_of(site, name):
    """A page of the reference without tags."""
    found = (site / "reference" / name / "index.html").read_text()
    return html.unescape(re.sub(r"<[^>]+>", "", found))


def test_every_public_function_is_in_the_reference(site):
    page = (site / "reference" / "functions" / "index.html").read_text()
    for name in moma_jax.__all__:
        function = getattr(moma_jax, name)
        assert re.search(rf'id="{function.__module__}.{function.__qualname__}"', page), name
        assert f"moma_jax.{name}" in text_of(site, "functions")
    assert ":::" not in page and "Raises" in page


def test_every_config_field_is_in_the_reference(site):
    page, text = (site / "reference" / "config" / "index.html").read_text(), text_of(site, "config")
    for name, _ in leaves(to_json(moma_jax.recipe("quickstart"))):
        field = re.sub(r"\.\d+(?=\.|$)", ".N", name).removesuffix(".N").removesuffix(f".{rules.NAME}")
        field = re.sub(r"(\.share)\..*", r"\1", field)
        assert name == "format_version" or f"<code>{field}</code>" in page, name
    kinds = [*classes_of(config), *classes_of(codec_config), VqganConfig, *rules.built_in().values()]
    assert len(kinds) > 15
    for kind in kinds:
        assert kind.__name__ in text
        for field in dataclasses.fields(kind):
            assert re.search(rf"<code>([\w.]+\.)?{field.name}</code>", page) or is_section(field), (kind, field.name)


def classes_of(module):
    """Dataclasses that a module defines."""
    own = [each for each in vars(module).values() if dataclasses.is_dataclass(each) and isinstance(each, type)]
    return [each for each in own if each.__module__ == module.__name__]


def is_section(field):
    return dataclasses.is_dataclass(field.default)


@pytest.mark.parametrize(
    ("page", "kinds"),
    [
        ("studies", (studies.Study, studies.Sweep, studies.Variant, studies.Upcycled)),
        ("generation", (Settings,)),
        ("routers", (router.Router, router.Selection, router.Routed, router.Score, router.Quota)),
    ],
)
def test_classes_that_users_make_are_in_the_reference(site, page, kinds):
    found = text_of(site, page)
    for kind in kinds:
        names = [f.name for f in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else kind._fields
        assert all(re.search(rf"\b{name}\b", found) for name in (kind.__name__, *names)), kind
    if page == "routers":
        assert all(name in found for name in ("select", "decide", "lacks", "for_depth"))


def test_every_command_is_in_the_reference(site):
    found = text_of(site, "commands")
    for name in commands.COMMANDS:
        module = importlib.import_module(f"moma_jax.commands.{name}")
        for subname in getattr(module, "SUBCOMMANDS", {"": None}):
            assert f"moma {name} {subname}".strip() in found
    for option in ("--routing", "--guidance.text", "--index", "--topology", "--dry-run", "RECIPE", "SEED_RUN"):
        assert option in found
    assert Path(ROOT / "docs" / "commands.md").is_file()


def test_a_link_to_a_missing_file_fails_the_build(monkeypatch, caplog):
    spec = importlib.util.spec_from_file_location("site_links", ROOT / "docs" / "site_links.py")
    links = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(links)
    page = type("Page", (), {"file": type("File", (), {"src_uri": "data.md"})})
    text = "[config](../moma_jax/config.py), [x](../moma_jax/none.py), `a`\n```sh\n[y](z)\n```\n"
    written = links.on_page_markdown(text, page=page, config=None, files=[])
    assert "config (`moma_jax/config.py`), x, `a`" in written and "[y](z)" in written
    assert "points to ../moma_jax/none.py, which does not exist" in caplog.text
