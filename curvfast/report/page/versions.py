"""Files that a page is made of: of the version that is read here, or refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from curvfast.errors import FormatError


def require_version(content: Mapping[str, Any], kind: str, version: int) -> None:
    """Refuse a file's JSON of another version.

    Raises:
        FormatError: If it is not of ``version``.
    """
    found = content.get("version")
    if found != version:
        raise FormatError(f"version {found} of {kind}; this curvfast reads {version}: upgrade it")
