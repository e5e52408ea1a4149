"""One-sentence errors."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def closest(name: str, options: Iterable[str]) -> str:
    """The option most like `name`, or "" when none is near enough to be a typing error."""
    found = difflib.get_close_matches(str(name), list(options), n=1, cutoff=0.5)
    return found[0] if found else ""


def unknown(kind: str, name: str, options: Iterable[str]) -> ValueError:
    """The error for a name that is not among `options`; the caller raises it.

    Example: `unknown preset 'tny': did you mean 'tiny'? (available: paper, small, tiny)`.
    """
    options = sorted(options)
    near = closest(name, options)
    question = f": did you mean {near!r}?" if near else ""
    available = ", ".join(options) if options else "none"
    return ValueError(f"unknown {kind} {name!r}{question} (available: {available})")
