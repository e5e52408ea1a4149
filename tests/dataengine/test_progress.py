"""How long work may take and what is said of it where there is no terminal."""

import pytest

from dataengine import progress
from dataengine.progress import Lines, about, counted, fit_seconds, make_bar


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.3, "about 5 seconds"),
        (38, "about 40 seconds"),
        (61, "about a minute"),
        (100, "about 2 minutes"),
        (3590, "about 60 minutes"),
        (9000, "about 2 hours"),
    ],
)
def test_times_in_words(seconds, words):
    assert about(seconds) == words


def test_a_log_gets_a_line_now_and_then(monkeypatch, capsys):
    """A clock that goes on by 12 seconds a step."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    bar = make_bar(total=8, initial=2, desc="fit", unit="step")
    assert isinstance(bar, Lines)  # standard error is no terminal here
    for _ in counted(2, 8, bar):
        now[0] += 12
        bar.set_postfix(loss=1)
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == "fit: 5 of 8 steps, about 35 seconds left\nfit: 8 of 8 steps\n"


def test_who_wants_quiet_gets_it(monkeypatch, capsys):
    monkeypatch.setattr(progress, "EVERY", 0.0)
    bar = make_bar(total=3, desc="fit", unit="step", quiet=True)
    assert list(counted(0, 3, bar)) == [0, 1, 2]
    assert capsys.readouterr().err == ""


def test_a_fit_takes_longer_with_more_of_anything():
    plain = fit_seconds(400, 2, 40, 64**2)
    assert 10 < plain < 60
    assert plain < min(
        fit_seconds(800, 2, 40, 64**2), fit_seconds(400, 4, 40, 64**2), fit_seconds(400, 2, 40, 128**2)
    )
