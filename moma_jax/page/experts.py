"""What experts do, as HTML: heat maps by layer, the dead and the overloaded, the ids and places that each takes."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from moma_jax.codec.pictures import data_uri
from moma_jax.generation.output import enlarged
from moma_jax.page.reading import Seen

FIGURES = {
    "load": ("taken tokens over the expert's due share", 2.0),
    "gate_mean": ("mean gate of the tokens taken", 1.0),
    "specialisation": ("bits by which its ids differ from those that it could take", None),
    "kept": ("share of its tokens that it kept since the evaluation before", 1.0),
}
"""What heat maps show: words, and the value of the darkest colour (None: the largest)."""
DEAD, OVERLOADED = 0.1, 2.0
"""Loads below and above which an expert is named."""
MASKS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#666666")
"""Of experts, by number; the ninth has the first one's again."""
TOP_SHOWN = 12


class Group(NamedTuple):
    """Rows of one group of experts under one routing, by layer and expert."""

    name: str
    routing: str
    rows: dict[tuple[int, int], dict[str, Any]]

    @property
    def layers(self) -> list[int]:
        """Their numbers."""
        return sorted({layer for layer, _ in self.rows})

    @property
    def experts(self) -> int:
        """How many there are."""
        return 1 + max(expert for _, expert in self.rows)


def groups(seen: Seen) -> list[Group]:
    """Every group under every routing."""
    found: dict[tuple[str, str], dict[tuple[int, int], dict[str, Any]]] = {}
    for row in seen.experts:
        found.setdefault((row["group"], row["routing"]), {})[row["layer"], row["expert"]] = row
    return [Group(*key, rows) for key, rows in found.items()]


def named(seen: Seen) -> list[str]:
    """A line for every expert that takes far fewer or more tokens than its share."""
    lines = []
    for group in groups(seen):
        for (layer, expert), row in group.rows.items():
            load = row["load"]
            if load is not None and not DEAD <= load <= OVERLOADED:
                word = "dead" if load < DEAD else "overloaded"
                where = f"layer {layer}, {group.name} expert {expert}, {group.routing}"
                lines.append(f"{word}: {where} (load {load:.2f})")
    return lines


def heat_map(group: Group, figure: str) -> str:
    """A table with a cell for every layer and expert, darker where the figure is larger; it needs no script."""
    words, most = FIGURES[figure]
    values = {place: row[figure] for place, row in group.rows.items()}
    known = [value for value in values.values() if value is not None]
    most = most or max(known, default=1.0) or 1.0
    head = "".join(f"<th scope='col'>{expert}</th>" for expert in range(group.experts))
    body = "".join(
        f"<tr><th scope='row'>{layer}</th>"
        + "".join(_cell(values.get((layer, expert)), most) for expert in range(group.experts))
        + "</tr>"
        for layer in group.layers
    )
    caption = html.escape(f"{group.name}, {group.routing}: {words}")
    return (
        f"<table class='heat'><caption>{caption}</caption><thead><tr><th>layer</th>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table>"
    )


def _cell(value: float | None, most: float) -> str:
    if value is None:
        return "<td>-</td>"
    depth = min(max(value / most, 0.0), 1.0)
    red, green, blue = (round(255 + (end - 255) * depth) for end in (0, 69, 122))
    ink = "white" if depth > 0.55 else "black"
    return f"<td style='background:rgb({red},{green},{blue});color:{ink}'>{value:.2f}</td>"


def favourites(seen: Seen, group: Group) -> str:
    """What each expert of the last layer takes most beyond its share: words, or places in pictures as a map."""
    layer, cells = group.layers[-1], []
    for expert in range(group.experts):
        row = group.rows.get((layer, expert))
        if row is not None:
            cells.append(f"<tr><th scope='row'>{expert}</th><td>{_words(seen, row)}</td><td>{_places(row)}</td></tr>")
    caption = html.escape(
        f"{group.name}, {group.routing}, layer {layer}: ids taken beyond the expert's share, and places"
    )
    return f"<table class='favourites'><caption>{caption}</caption><tbody>{''.join(cells)}</tbody></table>"


def _words(seen: Seen, row: dict[str, Any]) -> str:
    shown = list(zip(row["top_ids"], row["top_taken"], row["top_seen"], strict=True))[:TOP_SHOWN]
    return " ".join(
        f"<code title='{taken:,} of {possible:,}'>{html.escape(seen.name_of_id(token))}</code>"
        for token, taken, possible in shown
    )


def _places(row: dict[str, Any]) -> str:
    """Share of each place of a picture that the expert took, as a small picture."""
    if not row["place_seen"] or (side := math.isqrt(len(row["place_seen"]))) ** 2 != len(row["place_seen"]):
        return ""
    share = np.array(row["place_taken"]) / np.maximum(row["place_seen"], 1)
    grey = (255 * (1 - share / max(share.max(), 1e-9))).astype(np.uint8).reshape(side, side)
    words = f"share of each place in a picture that it took, at most {share.max():.0%}"
    return _image(np.repeat(grey[..., None], 3, -1), words, 96)


def _image(pixels_NN3: np.ndarray, words: str, side: int) -> str:
    words, content = html.escape(words), data_uri(enlarged(Image.fromarray(pixels_NN3)))
    return f"<img width='{side}' alt='{words}' title='{words}' src='{content}'>"


# One packed row -------------------------------------------------------------------------------------------------------


def row_html(seen: Seen, routing: str) -> str:
    """The packed row under one routing, coloured by the experts of the last layer (a script changes the layer)."""
    own = [token for token in seen.row if token["routing"] == routing]
    return "".join(_span(seen, own, start, stop) for start, stop in _spans(own))


def _spans(own: list[dict[str, Any]]) -> Iterator[tuple[int, int]]:
    """Stretches of one document and modality, padding left out."""
    start = 0
    for place in range(1, len(own) + 1):
        key = lambda token: (token["document"], token["modality"])  # noqa: E731
        if place == len(own) or key(own[place]) != key(own[start]):
            if own[start]["document"]:
                yield start, place
            start = place


def _span(seen: Seen, own: list[dict[str, Any]], start: int, stop: int) -> str:
    document, modality = own[start]["document"], own[start]["modality"]
    shade, tokens = "odd" if document % 2 else "even", own[start:stop]
    span = 0 if seen.store is None else seen.store.vocabulary.modalities[modality].span
    if not span:
        words = "".join(_token(token, html.escape(seen.name_of_id(token["token"]))) for token in tokens)
        return f"<span class='text {shade}' title='document {document}'>{words}</span>"
    cells = "".join(_token(token, "", token["place"]) for token in tokens if token["place"] >= 0)
    side, back = math.isqrt(span), _picture(seen, tokens, modality)
    return f"<span class='picture {shade}' title='document {document}' style='--side:{side};{back}'>{cells}</span>"


def experts_in(mask: int) -> list[int]:
    """The numbers of the experts whose bits are set."""
    return [expert for expert in range(mask.bit_length()) if mask >> expert & 1]


def _token(token: dict[str, Any], words: str, place: int | None = None) -> str:
    masks = ",".join(".".join(map(str, experts_in(mask))) for mask in token["experts"])
    at = "" if place is None else f" style='--place:{place}'"
    return f"<b data-experts='{masks}'{at}>{words}</b>"


def _picture(seen: Seen, own: list[dict[str, Any]], modality: int) -> str:
    """The picture itself as a background, where all its codes are in the row and the codec draws."""
    vocabulary, codec = seen.store.vocabulary, seen.codec
    name = vocabulary.modalities[modality].name
    if codec is None or not codec.draws or len(own) != codec.codes_per_image or name != "image":
        return ""
    (picture,) = codec.decode(vocabulary.code_V[[token["token"] for token in own]][None])
    return f"background-image:url({data_uri(enlarged(picture))})"
