"""Attention by name in a preset."""

import pytest

from enerverse.presets import small, tiny, with_attention


def test_names_are_short_or_whole():
    assert (
        tiny(attention="hip").unet.attention_options == tiny(attention="attention/hip").unet.attention_options
    )
    assert tiny(attention="hip", budget=8).unet.attention_options["budget"] == 8
    assert with_attention(small(), "hip").unet.attention_options == {}
    assert tiny() == tiny(attention="dense")


def test_a_plan_comes_without_the_usual_options():
    assert tiny(attention="minference", plan="plan.json").unet.attention_options == {"plan": "plan.json"}
    assert tiny(attention="moa", plan={"a": "b.json"}).unet.attention_options == {"plan": {"a": "b.json"}}


REFUSED = {
    "attention/hip: expected options among .*, got bugdet": {"attention": "hip", "bugdet": 3},
    "budget: expected a multiple of block_k 2, got 3": {"attention": "hip", "budget": 3},
    "unknown method 'hipp': did you mean 'hip'": {"attention": "hipp"},
    "attention/tidal: expected a method for whole sequences": {"attention": "tidal"},
    "attention/s2: expected no plan, got one; plans are for": {"attention": "s2", "plan": "plan.json"},
    "attention_options: expected none for dense attention, got budget": {"attention": "dense", "budget": 3},
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_what_does_not_fit_is_refused_at_once(sentence):
    with pytest.raises(ValueError, match=sentence):
        tiny(**REFUSED[sentence])
