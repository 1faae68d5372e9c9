"""Addresses that hold a password, a key or a token: they are refused, as they would stand in the records of runs."""

from __future__ import annotations

import re

from moma_jax.errors import InputError

_BEFORE_HOST = re.compile(r"(?<=://)[^/?#\s'\"]*@")
"""NAME:PASSWORD@, as of s3://KEY:SECRET@bucket."""
_ASKED = re.compile(r"(?i)(?<=[?&])([\w.-]*(?:key|token|secret|signature|sig|password|credential)[\w.-]*)=[^&#\s'\"]+")
"""A word of a signed address's query: ?token=..., &X-Amz-Signature=..."""


def without_credentials(text: str) -> str:
    """The text with dots for the credentials of the addresses in it."""
    return _ASKED.sub(r"\1=...", _BEFORE_HOST.sub("...@", text))


def require_no_credentials(address: str, field: str = "") -> None:
    """InputError, which does not repeat them, where an address holds credentials; `field` is what it was given for."""
    if "://" in address and (shown := without_credentials(address)) != address:
        named = f"{field}: " if field else ""
        raise InputError(
            f"{named}{shown} holds credentials, which would stand in records; take them out, and give them by the "
            "environment or a file in the home directory (docs/storage.md)"
        )
