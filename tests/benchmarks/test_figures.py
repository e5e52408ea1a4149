"""The README and docs/multiview.md show what the result files say."""

import pytest

from benchmarks import figures
from benchmarks.results_io import Result


@pytest.mark.parametrize("page", figures.PAGES, ids=lambda page: page.name)
def test_pages_and_figures_are_current(page):
    block, drawn = figures.render(page)
    assert block in page.read_text(encoding="utf-8"), f"{page.name} is stale; run make figures"
    for name, svg in drawn.items():
        assert (figures.FIGURES / f"{name}.svg").read_text(encoding="utf-8") == svg, (
            f"{name}: run make figures"
        )


def result(case, commit, *passed):
    trials = [{"passed": held, "conditions": {"mass": held, "bytes": True}} for held in passed]
    values = {
        "claim": "Two is more.",
        "value": 2,
        "control": 1,
        "oracle": None,
        "seeds": len(passed),
        "trials": trials,
    }
    return Result(case=case, values=values, seconds=1, device="cpu", commit=commit, versions={})


def test_claims_say_their_commit_and_what_more_seeds_did():
    once = {"claims/attention/a": result("claims/attention/a", "abc1234-dirty", True, False)}
    more = {"more_seeds/attention/a": result("more_seeds/attention/a", "def5678", True, False, True)}
    text = figures.claims_section(once, more)
    assert "| attention/a | Two is more. | 2.000 | 1.000 | - | 1 of 2 | abc1234-dirty |" in text
    assert "With more seeds: attention/a holds in 2 of 3, failing on mass (def5678)." in text
    assert "more seeds" not in figures.claims_section(once, {})


def test_interval_and_rate_reach_the_policy_table():
    row = {"success": 0.5, "interval": [0.25, 0.75], "episodes": 50}
    text, drawn = figures.policies_section({"latents": {"Lift": row}, "state": {"Lift": row}})
    assert "| latents only (control) | 50 [25, 75] |" in text
    assert drawn["policies"].startswith("<svg")
