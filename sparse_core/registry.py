"""The methods of `sparse_core.methods`, by name: `family/name`, one paper and one file each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, Literal, TypeVar

from sparse_core.attention.layer import AttentionLayer
from sparse_core.errors import unknown

Settings = TypeVar("Settings")
FAMILIES = ("attention",)
_methods: dict[str, Method] = {}


@dataclass(frozen=True, kw_only=True)
class Place:
    """An attention that gets a layer: its heads of `width` channels, and that it is number `index` of the `count` that get
    one together."""

    heads: int
    kv_heads: int
    width: int
    index: int = 0
    count: int = 1


@dataclass(frozen=True, kw_only=True)
class Method:
    """One method: `name` as `family/name`, the paper, how close to it we are, its config class, and what the config makes.

    kind: `prefill` and `train` attend to whole sequences, the second only after training with it; `decode` serves one new
    token after another. make(config, ..): what does the work; what else it takes is the method's own.
    layer(config, heads, kv_heads, width): the method as an `AttentionLayer`, None for those that only decode.
    needs: what must be done before use, such as calibration or training; without: what a layer does where it was not.
    plan: the class of its plans, with a `load(path)`, where it has some; planned(config, plan, place): a layer that knows
    its place in a model, by such a plan, or without one by None.
    """

    name: str
    paper: str
    fidelity: Literal["exact", "adapted", "simplified"]
    config: type
    kind: Literal["prefill", "decode", "train"]
    make: Callable[..., Any]
    layer: Callable[[Any, int, int, int], AttentionLayer] | None = None
    needs: tuple[str, ...] = ()
    without: str = ""
    plan: type | None = None
    planned: Callable[[Any, Any, Place], AttentionLayer] | None = None


def register(method: Method) -> Method:
    """Add a method; ValueError for a name that is taken."""
    if method.name in _methods:
        raise ValueError(f"{method.name}: expected a new name, got one that is taken; choose another")
    _methods[method.name] = method
    return method


def configure(config: Callable[..., Settings], options: Mapping[str, Any]) -> Settings:
    """The config class `config` with these options; ValueError naming the closest for one that it does not have."""
    names = [field.name for field in fields(config)]  # type: ignore[arg-type]
    for name in options:
        if name not in names:
            raise unknown("option", name, names)
    return config(**options)


def list_methods() -> list[str]:
    """Names of all methods, sorted."""
    for family in FAMILIES:
        package = import_module(f"sparse_core.methods.{family}")
        for found in iter_modules(package.__path__):
            import_module(f"{package.__name__}.{found.name}")
    return sorted(_methods)


def get_method(name: str) -> Method:
    """The method called `name`, with its family or without (`hip`); ValueError names the closest where there is none."""
    if name not in _methods:
        names = list_methods()
        short = {full.split("/")[1]: full for full in names}
        if name not in names and name not in short:
            raise unknown("method", name, names if "/" in str(name) else short)
        name = short.get(name, name)
    return _methods[name]


def make_attention(
    name: str, *, heads: int = 1, kv_heads: int | None = None, width: int = 64, **options: Any
) -> Any:
    """The method called `name` with these options of its config: an `AttentionLayer` where it serves whole sequences, else
    what decodes by it.

    heads, kv_heads (as many unless given), width: of the tokens it will serve, for methods with weights or a pattern per
    head. Raises ValueError for an unknown name or option.
    """
    method = get_method(name)
    config = configure(method.config, options)
    if method.layer is None:
        return method.make(config)
    return method.layer(config, heads, kv_heads or heads, width)
