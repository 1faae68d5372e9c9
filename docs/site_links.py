"""What pages of the site may point to: a hook of MkDocs (mkdocs.yml).

README.md is the first page. A link to a file of the repository that is no page of the site, such as
`[config.py](../moma_jax/config.py)`, works where the repository is read; in the site it becomes the file's name. One to
a file that does not exist is a warning, which fails the build.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path

from mkdocs.structure.files import File, InclusionLevel

ROOT = Path(__file__).parents[1]
HOME = "index.md"
LINK = re.compile(r"(?<!!)\[([^\]\n]+(?:\n[^\]\n]+)?)\]\((?!\w+:|#)([^)\s]+)\)")
FENCED = re.compile(r"^(```.*?^```)", re.M | re.S)

log = logging.getLogger("mkdocs.hooks.site_links")


def on_files(files, config):
    """README.md becomes the first page."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    files.append(File.generated(config, HOME, content=text.replace("](docs/", "](")))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links that leave the site become names of files; code blocks stay as they are."""
    source = page.file.src_uri
    home = ROOT if source == HOME else (ROOT / "docs" / source).parent
    pages = {file.src_uri for file in files if file.inclusion != InclusionLevel.EXCLUDED}

    def written(link: re.Match) -> str:
        text, target = link[1], link[2].partition("#")[0]
        inside = ROOT / "docs" / target if source == HOME else home / target
        if _below(inside, ROOT / "docs") in pages:
            return link[0]
        path = next((each for each in (home / target, inside) if each.exists()), None)
        if path is None:
            log.warning("%s points to %s, which does not exist", source, target)
            return text
        name = _below(path, ROOT)
        plain = text.strip("`")
        return f"`{name}`" if name.rstrip("/").endswith(plain.rstrip("/")) else f"{text} (`{name}`)"

    blocks = FENCED.split(markdown)
    return "".join(block if block.startswith("```") else LINK.sub(written, block) for block in blocks)


def _below(path: Path, folder: Path) -> str:
    """The path relative to a folder; as it is where it is not below it."""
    path = path.resolve()
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)
