"""The README and the pages do what they say: the README's Python snippets run in order, every command is taken.

A line `<!-- no-run -->` directly above a snippet leaves it out.
"""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from enerverse.cli.main import parse
from sims import TASKS

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


def commands(code: str) -> list[list[str]]:
    """The words of each line that calls `enerverse` or `make`; a backslash at the end joins lines."""
    lines = (shlex.split(line, comments=True) for line in code.replace("\\\n", " ").splitlines())
    return [words for words in lines if words and words[0] in ("enerverse", "make")]


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z][\w-]*):(?!=)", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))


def problem(words: Sequence[str]) -> str | None:
    """What is wrong with a command, None if nothing: an unknown target of make, a verb, flag or value that `enerverse`
    does not take."""
    if words[0] == "make":
        targets = [word for word in words[1:] if "=" not in word and not word.startswith("-")]
        return next((f"no target {word}" for word in targets if word not in make_targets()), None)
    try:
        verb = parse(words[1:])
    except ValueError as error:
        return str(error)
    except SystemExit as stop:
        return None if stop.code == 0 else f"exit code {stop.code}"
    task = getattr(verb, "task", "Lift")
    return None if task in TASKS else f"no task {task}"


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def snippets(language: str, page: Path = ROOT / "README.md") -> list:
    found = read_snippets(page.read_text(encoding="utf-8"))
    return [
        pytest.param(item, id=f"{page.stem}-line{item.line}") for item in found if item.language == language
    ]


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


@pytest.mark.parametrize("snippet", [item for page in pages() for item in snippets("bash", page)])
def test_bash_snippet_holds_commands_that_the_program_takes(snippet: Snippet) -> None:
    for words in commands(snippet.code):
        assert problem(words) is None, f"near line {snippet.line}: {shlex.join(words)}: {problem(words)}"


def test_snippets_are_found_in_order_and_skipped_when_marked() -> None:
    text = f"a\n```python\nx = 1\n```\n\n{SKIP}\n```python\nfail\n```\n```text\nno\n```\n"
    text += "```bash\nmake demo\n```\n"
    found = read_snippets(text)
    assert [(item.language, item.code, item.line) for item in found] == [
        ("python", "x = 1\n", 3),
        ("bash", "make demo\n", 14),
    ]


def test_commands_are_read_from_bash() -> None:
    code = "git clone x\nmake demo   # two minutes\nenerverse imagine \\\n  --device cpu\nenerverse --help\n"
    assert commands(code) == [
        ["make", "demo"], ["enerverse", "imagine", "--device", "cpu"], ["enerverse", "--help"]
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "wrong"),
    [
        ("enerverse imagin --data a", "did you mean 'imagine'"),
        ("enerverse imagine --dataset a", "exit code 2"),
        ("enerverse rollout --task Lift --episodes many", "exit code 2"),
        ("enerverse rollout --task Lfit", "no task Lfit"),
        ("make demmo", "no target demmo"),
    ],
)
def test_a_command_that_does_not_exist_is_found(words: str, wrong: str) -> None:
    assert wrong in (problem(words.split()) or "nothing")


def test_a_command_that_exists_has_no_problem() -> None:
    for words in ("enerverse --help", "make test-gpu PY=python3", "enerverse record --task Lift --out a"):
        assert problem(words.split()) is None


def test_make_targets_are_read() -> None:
    assert {"install", "demo", "test", "tiny", "test-gpu"} <= make_targets()
    assert "READY" not in make_targets()
