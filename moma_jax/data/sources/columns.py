"""Which column of a table, or key of a JSON object, holds what: by the usual names, by Arrow's types, or as told."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import pyarrow as pa

from moma_jax.errors import InputError

CAPTIONS = ("caption", "captions", "text", "texts", "txt", "prompt", "description", "alt_text", "sentence", "sentences")
"""What people call the text beside a picture; capitals do not matter."""
PICTURE_NAMES = ("image", "file_name", "image_path", "image_file", "img", "img_path", "picture", "photo")
"""Keys of JSON lines and metadata that name a picture's file; columns that hold pictures, or should."""
PICTURE_TEXT = (
    *PICTURE_NAMES,
    *("images", "pictures", "photos", "image_paths", "image_name", "image_base64", "image_bytes_b64", "base64"),
    *("jpg", "jpeg", "png", "webp", "image_url", "img_url", "image_urls"),
)
"""Columns of text that stand for pictures: paths, addresses, or base64."""
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm")
"""Suffixes of picture files that are read."""
ABOUT = ("id", "source", "group", "split", "weight")
"""Columns and keys about a document; capitals do not matter."""
UNREAD_PICTURES = (".avif", ".heic", ".heif", ".jxl", ".svg", ".psd", ".jp2")
"""Those of picture files that are not."""
LIKE_SPLIT = ("set", "subset", "partition", "fold")
"""What else people call a split, and other things too."""
ADDRESSES = ("url", "image_url", "img_url", "image_urls", "urls")
OF_PICTURES = {
    "width",
    "height",
    "original_width",
    "original_height",
    "similarity",
    "punsafe",
    "pwatermark",
    "aesthetic",
}
"""Columns that are beside the addresses of pictures, and not beside those of texts."""


def pictures_meant(row: dict, caption: str | None) -> str | None:
    """Which column of a row of text stands for a picture, and why, as a clause; None where none does.

    By names and values: what people write is known, and what they mean is not, so `--caption-column` is the way to say
    that the text stands alone.
    """
    rest = {str(key): value for key, value in row.items() if key != caption and value not in (None, "", [], {})}
    for key, value in rest.items():
        words = list(_strings(value))
        if key.lower() in PICTURE_TEXT and words:
            return f"{key} stands for pictures"
        if key.lower() not in (*ABOUT, *CAPTIONS, *ADDRESSES) and any(map(_is_file_of_picture, words)):
            return f"{key} names a picture"
    address = next((key for key in rest if key.lower() in ADDRESSES), None)
    hints = sum(key.lower() in OF_PICTURES for key in rest) + 2 * ((caption or "").lower() in ("caption", "alt_text"))
    hints += (address or "").isupper() + (caption or "").isupper()
    return f"{address} is the address of a picture" if address is not None and hints >= 2 else None


def _strings(value) -> Iterator[str]:
    """The texts within a value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)


def _is_file_of_picture(text: str) -> bool:
    return len(text) < 300 and "\n" not in text and text.lower().endswith((*PICTURES, *UNREAD_PICTURES))


def chosen(names: Iterable[str], usual: Iterable[str], asked: str | None, option: str, where: str) -> str | None:
    """The one of `names` that is meant: `asked`, or the only one with a usual name; None where there is none.

    Raises:
      InputError: there is no column `asked`, or several have usual names.
    """
    names, usual = list(names), set(usual)
    if asked is not None:
        if asked not in names:
            raise InputError(f"{option}: {where} has no column {asked}; it has {', '.join(sorted(names))}")
        return asked
    found = [name for name in names if name.lower() in usual]
    if len(found) > 1:
        raise InputError(f"{where}: both {' and '.join(found)} may be meant; say which with {option}")
    return found[0] if found else None


def caption_column(schema: pa.Schema, asked: str | None, where: str) -> str | None:
    """The column of text, or of lists of text."""
    textual = {f.name: f.type for f in schema if is_text(item_of(f.type))}
    if asked is not None and asked not in textual:
        textual |= {f.name: f.type for f in schema if is_bytes(f.type)}  # UTF-8 that was written as bytes
        if asked in schema.names and asked not in textual:
            raise InputError(f"--caption-column: {asked} of {where} holds {schema.field(asked).type}, which is no text")
        if asked not in textual:
            raise InputError(f"--caption-column: {where} has no column {asked}; it has {', '.join(schema.names)}")
    return chosen(textual, CAPTIONS, asked, "--caption-column", where)


def image_column(schema: pa.Schema, asked: str | None, where: str, but: str | None = None) -> str | None:
    """The column of pictures: bytes of files, or structs {bytes, path}; not `but`, which holds the text."""
    kinds = {f.name: f.type for f in schema}
    if asked is not None and asked not in kinds:
        raise InputError(f"--image-column: {where} has no column {asked}; it has {', '.join(schema.names)}")
    if asked is not None and not is_picture(kinds[asked]):
        raise InputError(f"--image-column: {asked} of {where} holds {kinds[asked]}, which are no pictures' bytes")
    pictures = [name for name, kind in kinds.items() if is_picture(kind) and name != but]
    if asked is None and len(pictures) > 1:
        raise InputError(f"{where}: both {' and '.join(pictures)} hold bytes; say which with --image-column")
    return asked or (pictures[0] if pictures else None)


# Arrow's types --------------------------------------------------------------------------------------------------------


def _any_of(*names: str) -> Callable[[pa.DataType], bool]:
    tests = [getattr(pa.types, f"is_{name}") for name in names if hasattr(pa.types, f"is_{name}")]
    return lambda kind: any(test(kind) for test in tests)


is_list = _any_of("list", "large_list", "fixed_size_list", "list_view", "large_list_view")
_is_string = _any_of("string", "large_string", "string_view")
_is_binary = _any_of("binary", "large_binary", "binary_view", "fixed_size_binary")


def item_of(kind: pa.DataType) -> pa.DataType:
    """What a list is of, whatever the kind of list; the type itself of what is no list."""
    return kind.value_type if is_list(kind) else kind


def _plain(kind: pa.DataType) -> pa.DataType:
    """The type without Arrow's ways of saying equal values once."""
    if isinstance(kind, pa.BaseExtensionType):
        return _plain(kind.storage_type)
    return _plain(kind.value_type) if _any_of("dictionary", "run_end_encoded")(kind) else kind


def is_text(kind: pa.DataType) -> bool:
    """Whether values are text."""
    return _is_string(_plain(kind))


def is_bytes(kind: pa.DataType) -> bool:
    """Whether values are bytes."""
    return _is_binary(_plain(kind))


def holds_bytes(kind: pa.DataType) -> bool:
    """Whether bytes are anywhere within the values of a type."""
    kind = _plain(kind)
    return is_bytes(kind) or any(holds_bytes(kind.field(i).type) for i in range(kind.num_fields))


def is_picture(kind: pa.DataType) -> bool:
    """Whether values may be pictures' files: bytes, or a struct with bytes as Hugging Face's datasets write it."""
    kind = _plain(kind)
    return is_bytes(kind) or any(name == "bytes" and is_bytes(field) for name, field in fields_of(kind).items())


def fields_of(kind: pa.DataType) -> dict[str, pa.DataType]:
    """Fields of a struct by name; {} of anything else."""
    return {kind.field(i).name: kind.field(i).type for i in range(kind.num_fields)} if pa.types.is_struct(kind) else {}
