"""Which words stand for which object, and where a text uses them."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path

from crosslayer.errors import UserError
from crosslayer.zoo.emoji_llava.world import OBJECTS

COCO, EMOJI = "coco", "emoji"
"""Tables that come with the package: COCO's 80 categories, and the bundled world's 48 objects."""
NOTHING = "-"
"""Begins a line of phrases that name no object, though a word of theirs would ("home plate")."""


@dataclass(frozen=True)
class Named:
    """An object that a text names, and where."""

    object: str
    chars: tuple[int, int]
    """The end excluded."""


@dataclass(frozen=True)
class SynonymTable:
    """Objects and the phrases that name them, the name itself being one.

    A phrase is matched whatever its case, in the singular and in the regular plural, wherever it stands as whole words
    (a word joined by a hyphen is another word). Where several begin at the same place the longest counts, so that a
    "hot dog" is no dog.
    """

    name: str
    phrases: Mapping[str, tuple[str, ...]]
    """By object; what they are called otherwise."""
    nothing: tuple[str, ...] = ()
    """Phrases that name none of the objects."""

    def __post_init__(self):
        owners: dict[str, str] = {}
        for phrase, object in self._all():
            if owners.setdefault(phrase, object) != object:
                raise UserError(f"synonym table {self.name}: {phrase!r} is both {owners[phrase]!r} and {object!r}")

    def find(self, text: str) -> list[Named]:
        """Every place where the text names an object, in its order."""
        found = [(self._objects[_plain(match[0])], match.span()) for match in self._pattern.finditer(text)]
        return [Named(object, chars) for object, chars in found if object != NOTHING]

    def object(self, phrase: str, place: str) -> str:
        """The object that a phrase is the name of, or another name of.

        Args:
            phrase: as an annotation has it.
            place: what to call that in an error.

        Raises:
            UserError: when the table does not have it.
        """
        found = self._objects.get(_plain(phrase), NOTHING)
        if found == NOTHING:
            raise UserError(
                f"{place}: names the object {phrase!r}, which the synonym table {self.name} lacks; add a line for it "
                "to a table of your own (--synonyms)"
            )
        return found

    def _all(self) -> Iterable[tuple[str, str]]:
        """Phrases, plain, with their objects."""
        for object, phrases in {**self.phrases, NOTHING: self.nothing}.items():
            for phrase in phrases if object == NOTHING else (object, *phrases):
                yield _plain(phrase), object

    @cached_property
    def _objects(self) -> dict[str, str]:
        """Object by plain phrase; a plural that is a phrase of its own stays what it is."""
        singular = dict(self._all())
        return {plural(phrase): object for phrase, object in singular.items()} | singular

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self._objects, key=len, reverse=True)
        either = "|".join(re.escape(phrase).replace(r"\ ", r"[\s-]+") for phrase in longest_first)
        return re.compile(rf"(?<![\w-])(?:{either})(?!\w|-\w)", re.IGNORECASE)


def plural(phrase: str) -> str:
    """The regular English plural of a phrase's last word; irregular ones stand in the table."""
    if re.search(r"[^aeiou]y$", phrase):
        return phrase[:-1] + "ies"
    if re.search(r"(?:s|x|z|ch|sh)$", phrase):
        return phrase + "es"
    return re.sub(r"man$", "men", phrase) if phrase.endswith("man") else phrase + "s"


def load_table(source: str) -> SynonymTable:
    """A table of the package, `coco` or `emoji`, or one from a file.

    A line of the file is an object: its name and its synonyms, separated by commas. Blank lines and what follows a `#`
    say nothing; the synonyms of `-` name no object.

    Raises:
        UserError: when there is no such file, it holds no object, or one twice.
    """
    if source == EMOJI:
        return SynonymTable(EMOJI, dict.fromkeys(OBJECTS, ()))
    if source == COCO:
        text = (files("crosslayer.hallucination") / "coco_synonyms.txt").read_text(encoding="utf-8")
        return read_table(text, COCO)
    path = Path(source)
    if not path.is_file():
        raise UserError(f"{source}: no such synonym table; give a file, or one of {COCO}, {EMOJI}")
    try:
        return read_table(path.read_text(encoding="utf-8"), source)
    except UnicodeDecodeError:
        raise UserError(f"{source}: is not UTF-8 text; a synonym table has a line an object: name, synonyms") from None


def read_table(text: str, name: str) -> SynonymTable:
    """The table that a text holds; see `load_table`."""
    phrases: dict[str, tuple[str, ...]] = {}
    for number, line in enumerate(text.splitlines(), 1):
        object, *synonyms = [part.strip() for part in line.partition("#")[0].split(",")]
        if not object and not any(synonyms):
            continue
        if object in phrases or not object:
            raise UserError(f"{name}:{number}: {object!r} {'stands there twice' if object else 'is no name'}; mend it")
        phrases[object] = tuple(synonym for synonym in synonyms if synonym)
    nothing = phrases.pop(NOTHING, ())
    if not phrases:
        raise UserError(f"{name}: names no object; write a line an object: name, synonyms")
    return SynonymTable(name, phrases, nothing)


def _plain(phrase: str) -> str:
    return re.sub(r"[\s-]+", " ", phrase.lower()).strip()
