"""WebDataset tars, as img2dataset writes them: a sample is the run of members that share a name up to its first dot.

A sample is a pair: KEY.jpg and KEY.txt, or a caption in KEY.json, which may give split, group, source and weight
besides. A sample without a picture, such as one of img2dataset whose download failed, is broken.
"""

from __future__ import annotations

import io
import itertools
import json
import posixpath
import re
import tarfile
from collections.abc import Iterator

import pyarrow as pa

from moma_jax.data.documents import Broken, Document, Picture, Text
from moma_jax.data.sources.columns import CAPTIONS, PICTURES, chosen
from moma_jax.data.sources.files import (
    MAX_FILE_BYTES,
    SPLIT_WORDS,
    Folder,
    fingerprint,
    first_line,
    is_packed,
    printable,
    splits,
)
from moma_jax.data.sources.rows import Refused, assembled, captions_in, facts_of, of_row, unharmed
from moma_jax.errors import InputError

TARS = (".tar", ".tar.gz", ".tgz", ".tar.zst")
NO_CONTENT = (".cls", ".__key__", ".__url__")
"""Suffixes of members that are about a sample and not of it."""
DAMAGES = (OSError, EOFError, ValueError, OverflowError, RecursionError, tarfile.TarError, pa.ArrowException)
"""What a tar that is damaged, or made to do harm, makes tarfile and unpacking raise."""
LOOKED_AT = 100
"""Samples of the first tar among which one must be sound."""


class TarSource:
    """A folder of tars, or one. A tar is one unit of work, read from its first byte to its last."""

    def __init__(
        self,
        name: str,
        folder: Folder,
        files: list[tuple[str, int]],
        caption: str | None = None,
        image: str | None = None,
        captions: bool = True,
    ):
        """Args: caption, image: key of KEY.json and suffix of the picture, where the usual ones are not meant;
        captions: whether a picture without one is broken, or stands alone."""
        self.name, self.folder, self.files = name, folder, files
        self.caption, self.suffix, self.captions = caption, None if image is None else f".{image.lstrip('.')}", captions
        self.splits = splits((path for path, _ in files), True)

    def require_known(self) -> None:
        """Raises InputError where the first tar holds nothing that can be read, or no picture where one was named."""
        path, first = self.files[0][0], None
        for item in itertools.islice(self.read(0), LOOKED_AT):
            if isinstance(item, Document):
                return
            first = first or item
        if first is None:
            raise InputError(f"prepare.source: {path} holds no samples (KEY.jpg with KEY.txt or KEY.json)")
        raise InputError(
            f"prepare.source: {first.id}: {first.reason}; check that {path} is a tar of samples, sorted by name"
        )

    def units(self) -> int:
        """Tars."""
        return len(self.files)

    def describe(self) -> list[str]:
        """A line for each tar."""
        rest = "" if self.suffix is None else f"; not read: members but {self.suffix}, .txt and .json"
        split = "by member or hash"
        return [f"{path}: samples, split {self.splits[path] or split}{rest}" for path, _ in self.files]

    def picture_units(self, split: str | None = None) -> list[int]:
        """Tars that may have pictures of the split."""
        return [n for n, (path, _) in enumerate(self.files) if split is None or self.splits[path] in (None, split)]

    def read(self, unit: int) -> Iterator[Document | Broken]:
        """The documents of one tar."""
        yield from unharmed(self._read(self.files[unit][0]), self.folder, self.files[unit][0])

    def _read(self, path: str) -> Iterator[Document | Broken]:
        seen: set[str] = set()
        folders = _Folders(self.splits[path])
        for key, members in self._samples(path):
            row_id = printable(f"{path}:{key}")
            if key in seen:
                yield Broken(row_id, "its members do not follow each other; sort the tar by name")
                continue
            seen.add(key)
            try:
                alternatives, facts = self._sample(members, folders.split_of(key))
            except (ValueError, RecursionError) as error:
                yield Broken(row_id, first_line(error))
                continue
            yield from assembled(row_id, alternatives, facts)

    def _samples(self, path: str) -> Iterator[tuple[str, dict[str, bytes | None]]]:
        """(key, content by suffix) of each sample; None for the content of a member that is too large or doubled."""
        key, members, number, held = None, {}, 0, 0
        with self.folder.open(path) as file:
            try:
                packed = is_packed(path)
                whole = io.BufferedReader(file, 1 << 20)
                if packed:
                    whole = _Forward(io.BufferedReader(self.folder.stream(path), 1 << 20))
                for member in members_of(whole):
                    name = member.name
                    if member.isdir() or posixpath.basename(name).startswith("._"):  # of macOS, beside each file
                        continue
                    own, suffix = _parts(name)
                    if own != key and key is not None:
                        yield key, members
                        members, number, held = {}, number + 1, 0
                    # All members of a sample together: a packed tar of a few KiB can hold many large ones.
                    sound = member.isreg() and not member.sparse and held + member.size <= MAX_FILE_BYTES
                    content = _content(whole, member) if sound else None
                    held += member.size if sound else 0
                    key = own
                    members[suffix] = None if suffix in members else content
            except DAMAGES as error:
                # Nothing behind can be found. As many samples count as broken as the rest of a whole tar would hold, so
                # that the 5% limit sees what was lost; the one that was being read may lack members.
                share = 0.5 if packed else whole.tell() / max(file.size(), 1)
                lost = max(1, round(number / max(share, 1e-3) - number))
                reason = f"the tar is damaged behind {key or 'its begin'}: {first_line(error)}"
                for other in range(lost):
                    yield f"{key or ''}+{other}", {"damaged": printable(reason).encode()}
                return
        if key is not None:
            yield key, members

    def _sample(self, members: dict[str, bytes | None], split: str | None):
        """(segments of each of its documents, their facts); raises Refused."""
        if "damaged" in members:
            raise Refused(members["damaged"].decode())
        for suffix, content in members.items():
            if content is None:
                most = f"{MAX_FILE_BYTES >> 20} MiB"
                raise Refused(f"{suffix} is doubled, a link, or larger than {most} with the sample's other members")
        about = json.loads(members[".json"]) if ".json" in members else {}
        if not isinstance(about, dict):
            raise Refused("its .json is not an object")
        facts = facts_of(about, self.name, split)
        pictures = [s for s in members if s == self.suffix or (self.suffix is None and s in PICTURES)]
        known = (*pictures, ".txt", ".json", *NO_CONTENT)
        other = [s for s in members if s not in known] if self.suffix is None else []
        if len(pictures) > 1 or other:
            raise Refused(
                f"has {', '.join(sorted(pictures[1:] + other))} besides; name its picture with --image-column"
            )
        if not pictures and about.get("status") not in (None, "success"):
            raise Refused(f"was not downloaded: {str(about.get('error_message') or about['status'])[:80]}")
        if not pictures:
            raise Refused(f"has no picture {self.suffix or ''}".rstrip())
        captions = self._captions(members, about)
        if not captions and self.captions:
            raise Refused("its caption is missing or empty")
        shown = [Picture(members[suffix]) for suffix in pictures]
        return [[Text(caption), *shown] for caption in captions] or [shown], facts

    def _captions(self, members: dict[str, bytes | None], about: dict) -> list[str]:
        if self.caption in (None, "txt") and ".txt" in members:
            caption = members[".txt"].decode("utf-8-sig").strip()
            others = [about[key] for key in about if key.lower() in CAPTIONS and about[key]]
            if self.caption is None and not all(_says(other, caption) for other in others):
                raise Refused(
                    "has captions in .txt and another in .json; say which with --caption-column (txt: the file)"
                )
            return [caption] if caption else []
        key = of_row(chosen, about, CAPTIONS, self.caption, "--caption-column", "its .json")
        return captions_in(about[key]) if key is not None and about[key] else []

    def fingerprint(self) -> str:
        """Changes with the tars' names and sizes."""
        return fingerprint("tar", self.files)


class _Folders:
    """The split of a tar's samples, in order: of the tar's name, or else of the outermost folders of their keys, where
    that of the first sample is called as a split is. Elsewhere a folder of that name may be a class."""

    def __init__(self, split: str | None):
        self._split, self._decide = split, None

    def split_of(self, key: str) -> str | None:
        """That of one sample; raises Refused where folders say a split for some samples and not for others."""
        if self._split is not None:
            return self._split
        folder = posixpath.normpath(key).split("/")[0] if "/" in key else ""
        own = SPLIT_WORDS.get(re.sub(r"^split=|[-_]?\d+$", "", folder.lower()))
        if self._decide is None:
            self._decide = own is not None
        if (own is not None) != self._decide:
            other = "says a split, and the first sample's none" if own else "says no split, and the first sample's does"
            raise Refused(f"its folder {folder!r} {other}; say the split in the tar's name, or use other folders")
        if own == "test":
            raise Refused("is of the split test, which no store holds")
        return own


# Members --------------------------------------------------------------------------------------------------------------


def members_of(file) -> Iterator[tarfile.TarInfo]:
    """The members of a tar; raises what tarfile does, OSError, EOFError and OverflowError.

    Raises:
      ValueError: there is more behind the last member than an end, or no end: tarfile takes both for the end.
    """
    with tarfile.open(fileobj=file, mode="r:", tarinfo=_Member) as tar:
        for member in tar:
            yield member
            tar.members = []  # or it remembers them all
        file.seek(tar.offset)
        blocks = 0
        while rest := file.read(1 << 16):
            if rest.strip(b"\0"):
                raise ValueError("no member and no end of a tar stands here")
            blocks += len(rest) // tarfile.BLOCKSIZE
        if not blocks:
            raise ValueError("no end of a tar stands here")


def _says(value, caption: str) -> bool:
    """Whether a key's value is a caption, or nothing but it."""
    return all(isinstance(v, str) and v.strip() == caption for v in (value if isinstance(value, list) else [value]))


def _content(file, member: tarfile.TarInfo) -> bytes:
    file.seek(member.offset_data)
    content = file.read(member.size)
    if len(content) < member.size:
        raise ValueError("unexpected end of data")
    return content


class _Member(tarfile.TarInfo):
    """A header; one that asks for a long name to be read has no more of it than a name can have."""

    MOST = 1 << 20

    @classmethod
    def frombuf(cls, buf, encoding, errors):
        """See tarfile."""
        found = super().frombuf(buf, encoding, errors)
        if not found.isreg() and found.size > cls.MOST:
            raise tarfile.ReadError("a header that is too large")
        return found


class _Forward:
    """A stream that can only be read forward, with `seek`: forward by reading, back within the last bytes."""

    KEPT = 1 << 16

    def __init__(self, stream: io.BufferedReader):
        self._stream, self._tail, self._end, self._at = stream, b"", 0, 0

    def tell(self) -> int:
        """The position."""
        return self._at

    def seek(self, position: int) -> int:
        """Goes there, or to the end of the stream; raises ValueError for what is too far back."""
        if position < self._end - len(self._tail):
            raise ValueError("a tar that goes back")
        self._at = min(position, self._end)
        while self._at < position and self.read(min(position - self._at, 1 << 20)):
            pass
        return self._at

    def read(self, size: int) -> bytes:
        """Reads `size` bytes, fewer at the end alone."""
        held = self._tail[len(self._tail) - (self._end - self._at) :][:size] if self._at < self._end else b""
        fresh = self._stream.read(size - len(held)) if size > len(held) else b""
        self._tail = fresh[-self.KEPT :] if len(fresh) >= self.KEPT else (self._tail + fresh)[-self.KEPT :]
        self._end += len(fresh)
        self._at += len(held) + len(fresh)
        return held + fresh


def _parts(name: str) -> tuple[str, str]:
    """A member's key and its suffix from the first dot of its base name on, in lower case."""
    folder, base = posixpath.split(name)
    stem, dot, suffix = base.partition(".")
    return posixpath.join(folder, stem), f"{dot}{suffix}".lower()
