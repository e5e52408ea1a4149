"""One-sentence errors: argument, what was expected, what came, what to do."""

import difflib
from collections.abc import Iterable


class RenderingError(RuntimeError):
    """There is no working OpenGL context; the message names the system packages to install."""


def expect(condition: bool, argument: str, expected: str, got: object, advice: str = "") -> None:
    """Raise ``ValueError`` in the house's one-sentence form unless ``condition`` holds."""
    if not condition:
        raise ValueError(f"{argument}: expected {expected}, got {got}" + (f"; {advice}" if advice else ""))


def expect_name(name: object, known: Iterable[str], argument: str) -> str:
    """Return ``name`` when it is one of ``known``; otherwise name the closest ones."""
    names = list(known)
    if isinstance(name, str) and name in names:
        return name
    close = difflib.get_close_matches(str(name), names, n=3, cutoff=0.4)
    advice = f"did you mean {' or '.join(map(repr, close))}?" if close else "choose one of them"
    raise ValueError(f"{argument}: expected one of {', '.join(names)}, got {name!r}; {advice}")
