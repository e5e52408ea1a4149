"""Configs: frozen, keyword-only dataclasses that go to JSON and come back checked.

A config class only declares its fields and validates them in `__post_init__`. The functions here read the
type hints, so an unknown key or a value of the wrong type is refused with a sentence that names its place.
"""

from __future__ import annotations

import dataclasses
import json
import types
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from enerverse.files import atomic_write
from sparse_core.errors import closest as closest
from sparse_core.errors import unknown as unknown

T = TypeVar("T")
_UNIONS = (Union, types.UnionType)


def to_dict(config: Any) -> dict[str, Any]:
    """Return the JSON-ready form of a config: nested configs become dicts, tuples and lists become lists.

    Raises TypeError naming the field when a value has no JSON form.
    """
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        raise TypeError(f"config: expected a dataclass instance, got {_name(type(config))}")
    place = type(config).__name__
    fields = [field for field in dataclasses.fields(config) if field.init]
    return {field.name: _plain(getattr(config, field.name), f"{place}.{field.name}") for field in fields}


def to_json(config: Any) -> str:
    """Return `to_dict(config)` as indented JSON text that ends with a newline."""
    return json.dumps(to_dict(config), indent=2) + "\n"


def from_dict(cls: type[T], data: Mapping[str, Any]) -> T:
    """Build a `cls` from the form `to_dict` returns; keys left out take their defaults.

    Understands nested dataclasses, tuple, list, dict, Optional and other unions, Literal, and plain values.
    An int is taken where a float is expected; nothing else is converted.
    Raises ValueError for an unknown or missing key and for a wrong type, naming the place.
    """
    return _build(cls, data, cls.__name__)


def from_json(cls: type[T], text: str) -> T:
    """Build a `cls` from JSON text. Raises ValueError where the text is no JSON or does not fit `cls`."""
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}"
        raise ValueError(
            f"{cls.__name__}: expected JSON, got text that breaks at {where}: {error.msg}"
        ) from None
    return from_dict(cls, data)


def save(config: Any, path: str | PathLike[str]) -> Path:
    """Write `to_json(config)` to `path` atomically and return the path."""
    text = to_json(config)
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)


def load(cls: type[T], path: str | PathLike[str]) -> T:
    """Read a `cls` from a JSON file. Raises FileNotFoundError or ValueError, each naming the file."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a {cls.__name__} in JSON, found no file; check the path")
    try:
        return from_json(cls, path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _plain(value: Any, place: str) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_dict(value)
    if isinstance(value, (tuple, list)):
        return [_plain(item, f"{place}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _plain(item, f"{place}[{key!r}]") for key, item in value.items()}
    raise TypeError(f"{place}: expected a value with a JSON form, got {_name(type(value))}")


def _build(cls: type[T], data: Any, place: str) -> T:
    if not isinstance(data, Mapping):
        raise _wrong(place, f"the keys of a {cls.__name__}", data)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    for key in data:
        if key not in fields:
            raise ValueError(f"{place}: {unknown('key', key, fields)}")
    hints = get_type_hints(cls)
    for name, field in fields.items():
        if name not in data and _required(field):
            raise ValueError(
                f"{place}: key {name!r} is missing; add it, a value of type {_name(hints[name])}"
            )
    return cls(**{name: _read(hints[name], value, f"{place}.{name}") for name, value in data.items()})


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _read(hint: Any, value: Any, place: str) -> Any:
    """Check `value` against one type hint and return it in the form the config holds."""
    origin = get_origin(hint)
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, place)  # type: ignore[arg-type]
    if origin in _UNIONS:
        return _read_union(hint, value, place)
    if origin is Literal:
        return _read_literal(hint, value, place)
    if origin is tuple or hint is tuple:
        return _read_tuple(hint, value, place)
    if origin is list or hint is list:
        return _read_list(hint, value, place)
    if origin is dict or hint is dict:
        return _read_mapping(hint, value, place)
    return _read_scalar(hint, value, place)


def _read_scalar(hint: Any, value: Any, place: str) -> Any:
    if hint is float and type(value) is int:
        return float(value)
    fits = value is None if hint is type(None) else type(value) is hint
    if not fits:
        raise _wrong(place, _name(hint), value)
    return value


def _read_literal(hint: Any, value: Any, place: str) -> Any:
    choices = get_args(hint)
    if any(value == choice and type(value) is type(choice) for choice in choices):
        return value
    if isinstance(value, str):
        raise ValueError(f"{place}: {unknown('value', value, map(str, choices))}")
    raise _wrong(place, "one of " + ", ".join(map(repr, choices)), value)


def _read_tuple(hint: Any, value: Any, place: str) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise _wrong(place, _name(hint), value)
    arguments = get_args(hint) or (Any, ...)
    if arguments[-1] is Ellipsis:
        arguments = (arguments[0],) * len(value)
    if len(arguments) != len(value):
        raise ValueError(f"{place}: expected {len(arguments)} values, got {len(value)}: {value!r}")
    pairs = enumerate(zip(arguments, value, strict=True))
    return tuple(_read(argument, item, f"{place}[{index}]") for index, (argument, item) in pairs)


def _read_list(hint: Any, value: Any, place: str) -> list[Any]:
    if not isinstance(value, (list, tuple)):
        raise _wrong(place, _name(hint), value)
    kind = (get_args(hint) or (Any,))[0]
    return [_read(kind, item, f"{place}[{index}]") for index, item in enumerate(value)]


def _read_mapping(hint: Any, value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise _wrong(place, _name(hint), value)
    kind = (get_args(hint) or (str, Any))[1]
    return {key: _read(kind, item, f"{place}[{key!r}]") for key, item in value.items()}


def _read_union(hint: Any, value: Any, place: str) -> Any:
    """Take the one member that fits; an exact scalar wins over a converted one, two configs are ambiguous."""
    members = get_args(hint)
    if type(value) in members:
        return value
    if len(rest := [member for member in members if member is not type(None)]) == 1:
        return _read(rest[0], value, place)
    found = []
    for member in rest:
        try:
            found.append(_read(member, value, place))
        except ValueError:
            continue
    if not found:
        raise _wrong(place, _name(hint), value)
    if len(found) > 1 and dataclasses.is_dataclass(found[0]):
        names = " and ".join(type(item).__name__ for item in found)
        raise ValueError(
            f"{place}: expected a form that fits one config, got one that fits {names}; add its `kind`"
        )
    return found[0]


def _wrong(place: str, expected: str, value: Any) -> ValueError:
    shown = repr(value)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    return ValueError(f"{place}: expected {expected}, got {shown} ({type(value).__name__})")


def _name(hint: Any) -> str:
    """Write a type hint the way the author of a config thinks of it: `int`, `str | None`."""
    if hint is type(None):
        return "None"
    if isinstance(hint, type) and get_origin(hint) is None:
        return hint.__name__
    if get_origin(hint) in _UNIONS:
        return " | ".join(_name(member) for member in get_args(hint))
    return str(hint).replace("typing.", "")
