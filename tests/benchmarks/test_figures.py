"""The README shows what the result files say."""

from benchmarks import figures


def test_readme_and_figures_are_current():
    block, drawn = figures.render()
    assert block in figures.README.read_text(encoding="utf-8"), "README.md is stale; run make figures"
    for name, svg in drawn.items():
        assert (figures.FIGURES / f"{name}.svg").read_text(encoding="utf-8") == svg, (
            f"{name}: run make figures"
        )


def test_interval_and_rate_reach_the_policy_table():
    row = {"success": 0.5, "interval": [0.25, 0.75], "episodes": 50}
    text, drawn = figures.policies_section({"latents": {"Lift": row}, "state": {"Lift": row}})
    assert "| latents only (control) | 50 [25, 75] |" in text
    assert drawn["policies"].startswith("<svg")
