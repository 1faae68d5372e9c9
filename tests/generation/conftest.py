"""A store of drawn scenes and a stand-in for a model that was trained on it."""

import pytest
import scripted

from moma_jax.config import Config, DataConfig, Modality, PrepareConfig, StoreConfig
from moma_jax.data.prepare import prepare
from moma_jax.data.store import open_store
from moma_jax.generation.generating import Generator


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("store") / "scenes")
    modalities = (Modality("text", "t", size=700, quota=0.5), Modality("image", "i", size=8, span=16, quota=0.5))
    settings = PrepareConfig(source="scenes", documents=60, text_size=700, image_side=4, colours=8, parts=1)
    prepare(settings, path, modalities=modalities, progress=False)
    return path


@pytest.fixture
def loaded(store, monkeypatch):
    """A loaded model; `loaded.model` is what writes."""
    opened = open_store(store)
    layout = tuple(Modality(m.name, m.letter, m.size, m.span) for m in opened.vocabulary.modalities)
    data = DataConfig(modalities=layout, stores=(StoreConfig("scenes", store),), sequence=scripted.CONTEXT)
    standin = scripted.StandIn(
        config=Config(data=data),
        vocabulary=opened.vocabulary,
        hashes=opened.codecs.hashes,
        model=scripted.make(opened.vocabulary.size),
    )
    monkeypatch.setattr(Generator, "model", lambda self, routing: self._loaded.model)
    return standin
