"""Variants by name: settings objects of several classes, to and from JSON."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from crosslayer.errors import UserError


def write_variant(kinds: Mapping[str, type], variant: Any) -> dict[str, Any]:
    """The JSON form of a variant: its kind and its settings."""
    kind = next(name for name, cls in kinds.items() if type(variant) is cls)
    return {"kind": kind, **asdict(variant)}


def read_variant(what: str, kinds: Mapping[str, type], record: Mapping[str, Any]) -> Any:
    """The variant that a JSON form describes.

    Raises:
        UserError: for an unknown kind, naming those there are, and for a setting that this kind does not have.
    """
    settings = dict(record)
    kind = settings.pop("kind", None)
    if kind not in kinds:
        raise UserError(f"{what} is {kind!r}; choose one of {', '.join(kinds)}")
    known = kinds[kind].__dataclass_fields__
    if unknown := [name for name in settings if name not in known]:
        has = f"its settings are {', '.join(known)}" if known else "it has no settings"
        raise UserError(f"{what} {kind} has no setting {unknown[0]}; {has}")
    try:
        return kinds[kind](**settings)
    except TypeError as error:
        raise UserError(f"{what} {kind}: {error}") from None
