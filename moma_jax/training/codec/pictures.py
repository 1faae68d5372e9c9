"""The pictures that an image tokenizer learns from: read from a source in windows, shuffled, made pixels ahead of need.

The order depends on the seed alone: units of the source (files, row groups) are shuffled in each pass, pictures within
a window of consecutive units. A cursor says how far into which window, so going on reads at most one window again.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypedDict

import grain
import numpy as np

from moma_jax.codec.pictures import BrokenPicture
from moma_jax.config import PrepareConfig
from moma_jax.data.documents import Document, Picture, is_held_out
from moma_jax.data.fit import ordered_map
from moma_jax.data.sources import open_source
from moma_jax.data.stream import Plans, Stream
from moma_jax.errors import InputError, RunError, require
from moma_jax.fields import Count, read_file
from moma_jax.training.codec.config import PicturesConfig

Read = Callable[[Any], np.ndarray]
"""A picture's file to pixels, uint8 (N, N, 3); raises BrokenPicture (`Codec.read`)."""


class Named(NamedTuple):
    """A picture's file or pixels, and the document that it is in."""

    document: str
    image: Any


class PictureBatch(NamedTuple):
    """Pictures of one update.

    Attributes:
      batch: uint8 (B, N, N, 3), this process's rows.
      cursor: where the stream stands after it, the same on every process. epochs: passes so far, {"pictures": 1.5}.
    """

    batch: np.ndarray
    cursor: dict[str, Any]
    epochs: dict[str, float]


class Pictures:
    """The pictures of a source, those to learn from and those held out."""

    def __init__(self, config: PicturesConfig, called: Mapping[str, str] | None = None):
        """Opens the source; InputError where it has no pictures. `called`: what the user calls its fields."""
        self.config, self._called = config, called or {}
        if config.kind == "auto" and config.source == "scenes":
            raise self._error(
                "data.source: scenes are drawn to be a palette's; give a folder of pictures or of Parquet"
            )
        try:
            self._source = open_source(PrepareConfig(source=config.source, kind=config.kind), captions=False)
        except InputError as error:
            message = str(error).replace("prepare.source", "data.source").replace("prepare.kind", "data.kind")
            raise self._error(message.partition(', or "scenes"')[0]) from error
        if not (units := self._source.picture_units()):
            raise self._error(f"data.source: {config.source} has no pictures")
        self.units = units

    def _error(self, message: str) -> InputError:
        for field, name in self._called.items():
            message = message.replace(field, name)
        return InputError(message)

    def require_some(self) -> None:
        """Raises InputError where there is no picture to learn from."""
        if not any(self.of_unit(unit, False) for unit in self.units):
            raise self._error(
                f"data.source: {self.config.source} has no pictures to learn from; lower data.held_out, or give it a "
                "folder train beside validation"
            )

    @property
    def fingerprint(self) -> str:
        """Changes with what the source reads."""
        return self._source.fingerprint()

    def of_unit(self, unit: int, held_out: bool) -> list[Named]:
        """The pictures of one unit that are held out, or those that are not, always in the same order."""
        found = []
        for document in self._source.read(unit):
            if isinstance(document, Document) and is_held_out(document, self.config.held_out) == held_out:
                found += [Named(document.id, s.image) for s in document.segments if isinstance(s, Picture)]
        return found

    def held_out(self, read: Read, most: int | None = None, at_once: int = 64) -> Iterator[np.ndarray]:
        """Held-out pictures in the order of the source, at most so many, some at a time: uint8 (B, N, N, 3).

        Raises:
          InputError: there are none.
        """
        sound = (
            pixels for each in self._each_held_out() if (pixels := _pixels(read, each, "it is left out")) is not None
        )
        chosen, empty = itertools.islice(sound, most), True
        while some := list(itertools.islice(chosen, at_once)):
            empty = False
            yield np.stack(some)
        if empty:
            raise self._error(
                f"data.source: {self.config.source} has no held-out pictures that can be read; raise data.held_out, or "
                "give it a folder validation beside train"
            )

    def _each_held_out(self) -> Iterator[Named]:
        units = self._source.picture_units("validation")
        for pictures in ordered_map(lambda unit: self.of_unit(unit, True), units):
            yield from pictures

    def stream(self, read: Read, batch: int, mine: Sequence[int], cursor: dict[str, Any] | None = None) -> Stream:
        """Batches of pictures to learn from, without end: an iterator of PictureBatch that must be closed.

        Args:
          batch: pictures of an update, over all processes. mine: those of each batch that are wanted, ascending.
          cursor: of a PictureBatch, to go on after it; None begins.
        """

        def make(plan: _Plan) -> PictureBatch:
            return PictureBatch(np.stack(list(_without_broken(read, plan.pictures))), plan.cursor, plan.epochs)

        plans = Plans(lambda: _Order(self, batch, tuple(mine), cursor))
        return Stream(plans, make, self.config.prefetch, self.config.threads)


class _Plan(NamedTuple):
    pictures: list[tuple[Named, bool]]
    cursor: dict[str, Any]
    epochs: dict[str, float]


class Place(TypedDict):
    """The cursor."""

    step: Count
    epoch: Count
    unit: Count
    offset: Count


class _Order(grain.DatasetIterator):
    """Which pictures make up each batch, and which of them are mirrored; its state is the cursor."""

    def __init__(self, pictures: Pictures, batch: int, mine: tuple[int, ...], cursor: dict[str, Any] | None):
        super().__init__()
        self._pictures, self._batch, self._mine = pictures, batch, mine
        self._state: dict[str, int] = {}
        self.set_state(cursor or {"step": 0, "epoch": 0, "unit": 0, "offset": 0})

    def __next__(self) -> _Plan:
        state, chosen, passes = dict(self._state), [], 0
        while len(chosen) < self._batch:
            if state["offset"] == len(self._window):
                state["unit"], state["offset"] = state["unit"] + self._read_units, 0
                if state["unit"] >= len(self._pictures.units):
                    state["epoch"], state["unit"], passes = state["epoch"] + 1, 0, passes + 1
                    if passes > 1 and not chosen:
                        raise InputError(f"data.source: {self._pictures.config.source} has no pictures to learn from")
                self._read(state["epoch"], state["unit"])
            taken = self._window[state["offset"] : state["offset"] + self._batch - len(chosen)]
            state["offset"] += len(taken)
            chosen += taken
        self._state = state | {"step": state["step"] + 1}
        within = state["unit"] + self._read_units * state["offset"] / max(len(self._window), 1)
        epochs = {"pictures": state["epoch"] + within / len(self._pictures.units)}
        return _Plan([chosen[i] for i in self._mine], self._state, epochs)

    def get_state(self) -> dict[str, int]:
        return self._state

    def set_state(self, state: dict[str, Any]) -> None:
        where = "the checkpoint's data position (cursor)"
        self._state = dict(read_file(Place, state, where))
        known = self._state["unit"] < len(self._pictures.units)
        if known:
            self._read(self._state["epoch"], self._state["unit"])
        # Beyond the window nothing would ever be taken.
        require(known and self._state["offset"] <= len(self._window), f"{where}: has no such picture; it is damaged")

    def _read(self, epoch: int, first: int) -> None:
        """Reads the window that begins with a unit of a pass and ends with the one that fills it: its pictures in their
        order, and whether they are mirrored."""
        config, units = self._pictures.config, self._pictures.units
        order = np.random.default_rng([config.seed, epoch]).permutation(len(units))
        pictures, self._read_units = [], 0
        with contextlib.closing(ordered_map(lambda n: self._pictures.of_unit(units[n], False), order[first:])) as read:
            for found in read:
                pictures += found
                self._read_units += 1
                if len(pictures) >= config.window:
                    break
        random = np.random.default_rng([config.seed, epoch, first])
        shuffled = random.permutation(len(pictures))
        mirrored = random.random(len(pictures)) < 0.5
        self._window = [(pictures[i], config.mirror and bool(mirrored[i])) for i in shuffled]


def _without_broken(read: Read, pictures: list[tuple[Named, bool]]) -> Iterator[np.ndarray]:
    """Pixels of all; the next sound picture stands in for a broken one."""
    pixels = [_pixels(read, named, "another takes its place") for named, _ in pictures]
    sound = [i for i, each in enumerate(pixels) if each is not None]
    if not sound:
        raise RunError(f"not one of {len(pixels)} pictures can be read, such as that of {pictures[0][0].document}")
    for i, (_, mirrored) in enumerate(pictures):
        own = pixels[next((j for j in sound if j >= i), sound[0])]
        yield own[:, ::-1] if mirrored else own


def _pixels(read: Read, picture: Named, instead: str) -> np.ndarray | None:
    """A picture's pixels; None, and a word on it and on what happens instead, where it is broken."""
    try:
        return read(picture.image)
    except BrokenPicture as error:
        logging.getLogger(__name__).warning("picture of %s: %s; %s", picture.document, error, instead)
        return None
