# SPDX-License-Identifier: Apache-2.0
"""`--set data.batch=4`: changing single fields of a recipe by name, and telling what each field means."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import difflib
import functools
import inspect
import types
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from pidecode.errors import SettingError

R = TypeVar("R")


class FieldDoc(NamedTuple):
    """One field of a recipe: dotted name, value, and the sentence that explains it."""

    name: str
    value: Any
    words: str


def apply_settings(recipe: R, settings: Sequence[str]) -> R:
    """`recipe` with every `name=value` of `settings` applied in turn.

    Raises SettingError for a name that does not exist (naming the closest) or a value of the wrong type.
    """
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise SettingError(f"{setting!r} is no setting; write name=value, for instance data.batch=4.")
        recipe = _with(recipe, name.strip(), name.strip().split("."), text.strip())
    return recipe


def _with(record: Any, full_name: str, path: list[str], text: str) -> Any:
    name, rest = path[0], path[1:]
    known = [field.name for field in fields(record)]
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise SettingError(f"There is no setting {full_name!r}.{hint} Known here are {', '.join(known)}.")
    current = getattr(record, name)
    if rest:
        if not is_dataclass(current):
            raise SettingError(f"{full_name!r} goes too deep: {name} is a single value.")
        return replace(record, **{name: _with(current, full_name, rest, text)})
    if is_dataclass(current):
        inner = ", ".join(f"{full_name}.{field.name}" for field in fields(current)[:3])
        raise SettingError(f"{full_name!r} is a group of settings; set one of them ({inner}, ...).")
    hint = get_type_hints(type(record))[name]
    return replace(record, **{name: _read(full_name, text, hint)})


def _read(name: str, text: str, hint: Any) -> Any:
    for value in _readings(text):
        fitted = _fit(value, hint)
        if fitted is not _MISFIT:
            return fitted
    raise SettingError(f"{name} cannot be {text!r}; it must be {_plain(hint)}.")


def _readings(text: str) -> Iterator[Any]:
    words = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False, "none": None}
    if text.lower() in words:
        yield words[text.lower()]
    with contextlib.suppress(ValueError, SyntaxError):
        yield ast.literal_eval(text)
    yield text
    yield tuple(part.strip() for part in text.split(",") if part.strip())


_MISFIT = object()


def _fit(value: Any, hint: Any) -> Any:
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return value if value in inner else _MISFIT
    if origin in (Union, types.UnionType):
        return next((fit for fit in (_fit(value, option) for option in inner) if fit is not _MISFIT), _MISFIT)
    if origin is tuple:
        if not isinstance(value, (tuple, list)):
            return _MISFIT
        kinds = [inner[0]] * len(value) if len(inner) == 2 and inner[1] is Ellipsis else list(inner)
        parts = [_fit(part, kind) for part, kind in zip(value, kinds, strict=False)]
        return tuple(parts) if len(kinds) == len(value) and _MISFIT not in parts else _MISFIT
    if hint is float and type(value) is int:
        return float(value)
    if hint is type(None):
        return None if value is None else _MISFIT
    return value if isinstance(hint, type) and type(value) is hint else _MISFIT


def _plain(hint: Any) -> str:
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return " or ".join(repr(choice) for choice in inner)
    if origin in (Union, types.UnionType):
        return " or ".join(_plain(option) for option in inner)
    if origin is tuple:
        return f"a list of {_plain(inner[0])}"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "none"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))


@functools.cache
def field_words(record_type: type) -> dict[str, str]:
    """The sentence under each field of a dataclass, read from its source."""
    body = ast.parse(inspect.cleandoc("\n" + inspect.getsource(record_type))).body[0]
    assert isinstance(body, ast.ClassDef)
    words: dict[str, str] = {}
    for node, after in zip(body.body, [*body.body[1:], ast.Pass()], strict=True):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            text = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else ""
            words[node.target.id] = " ".join(str(text).split())
    return words


def describe(record: Any, prefix: str = "") -> Iterator[FieldDoc]:
    """Every single field of a recipe and of the records in it, in order."""
    kind: type = type(record)
    words = field_words(kind)
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        if is_dataclass(value) and not isinstance(value, type):
            yield from describe(value, f"{prefix}{field.name}.")
        else:
            yield FieldDoc(prefix + field.name, value, words.get(field.name, ""))
