"""Version check of the JSON files of a report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from curvfast.errors import FormatError


def require_version(content: Mapping[str, Any], kind: str, version: int) -> None:
    """Raise if a file's JSON is of another version.

    Raises:
        FormatError: If it is not of ``version``.
    """
    found = content.get("version")
    if found != version:
        raise FormatError(f"version {found} of {kind}; this curvfast reads {version}: upgrade it")
