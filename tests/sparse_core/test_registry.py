"""Methods by name."""

import pytest

from sparse_core import registry


def test_methods_are_listed_and_found():
    assert "attention/s2" in registry.list_methods()
    method = registry.get_method("attention/s2")
    assert method.paper == "2407.17678"
    assert method.make(method.config(), 2).num_heads == 2


def test_an_unknown_method_names_the_closest():
    with pytest.raises(ValueError, match="unknown method 'attention/s3': did you mean 'attention/s2'"):
        registry.get_method("attention/s3")


def test_a_name_is_given_once():
    with pytest.raises(ValueError, match="attention/s2: expected a new name, got one that is taken"):
        registry.register(registry.get_method("attention/s2"))
