"""The README does what it says: Python snippets run in order, named commands exist.

A line `<!-- no-run -->` directly above a snippet leaves it out.
"""

import re
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SKIP = "<!-- no-run -->"
_SNIPPET = re.compile(r"^```(python|bash)[ \t]*\n(.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Snippet:
    """A fenced block: its language, its code, and the line of the README on which the code begins."""

    language: str
    code: str
    line: int


def read_snippets(text: str) -> list[Snippet]:
    """Return the Python and bash blocks of a Markdown text in order, without those marked as not to run."""
    found = []
    for match in _SNIPPET.finditer(text):
        above = text[: match.start()].rstrip("\n").rpartition("\n")[2]
        if above.strip() != SKIP:
            line = text.count("\n", 0, match.start(2)) + 1
            found.append(Snippet(language=match.group(1), code=match.group(2), line=line))
    return found


def commands(code: str) -> list[tuple[str, str]]:
    """Return (program, first plain word after it) for each line that calls `enerverse` or `make`."""
    lines = (line.split("#")[0].split() for line in code.splitlines())
    words = (
        (line[0], [word for word in line[1:] if re.fullmatch(r"[a-z][\w-]*", word)]) for line in lines if line
    )
    return [(program, rest[0] if rest else "") for program, rest in words if program in ("enerverse", "make")]


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z][\w-]*):(?!=)", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))


@cache
def enerverse_verbs() -> set[str]:
    code = "import sys; from enerverse.cli.main import main; sys.argv = ['enerverse', '--help']; main()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(re.findall(r"[a-z][\w-]+", done.stdout))


def snippets(language: str) -> list:
    found = read_snippets((ROOT / "README.md").read_text(encoding="utf-8"))
    return [pytest.param(item, id=f"line{item.line}") for item in found if item.language == language]


@pytest.fixture(scope="module")
def reader_folder(tmp_path_factory) -> Path:
    """One folder for all snippets: a later one may use what an earlier one wrote."""
    return tmp_path_factory.mktemp("reader")


@pytest.mark.parametrize("snippet", snippets("python"))
def test_python_snippet_runs(snippet: Snippet, reader_folder: Path, monkeypatch) -> None:
    monkeypatch.chdir(reader_folder)
    # Empty lines in front make a traceback point at the line of the README.
    program = compile("\n" * (snippet.line - 1) + snippet.code, str(ROOT / "README.md"), "exec")
    namespace = {"__name__": "__main__"}
    exec(program, namespace)
    assert namespace


@pytest.mark.parametrize("snippet", snippets("bash"))
def test_bash_snippet_names_commands_that_exist(snippet: Snippet) -> None:
    for program, word in commands(snippet.code):
        known = make_targets() if program == "make" else enerverse_verbs()
        assert not word or word in known, (
            f"README.md near line {snippet.line}: `{program} {word}` does not exist"
        )


def test_snippets_are_found_in_order_and_skipped_when_marked() -> None:
    text = f"a\n```python\nx = 1\n```\n\n{SKIP}\n```python\nfail\n```\n```text\nno\n```\n"
    text += "```bash\nmake demo\n```\n"
    found = read_snippets(text)
    assert [(item.language, item.code, item.line) for item in found] == [
        ("python", "x = 1\n", 3),
        ("bash", "make demo\n", 14),
    ]


def test_commands_are_read_from_bash() -> None:
    code = "git clone x\nmake demo   # two minutes\nenerverse imagine --device cpu 'push'\nenerverse --help\n"
    assert commands(code) == [("make", "demo"), ("enerverse", "imagine"), ("enerverse", "")]


def test_make_targets_are_read() -> None:
    assert {"install", "demo", "test", "tiny", "test-gpu"} <= make_targets()
    assert "READY" not in make_targets()
