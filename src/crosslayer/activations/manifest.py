"""What a store on disk says of itself: `manifest.json`, replaced atomically after every shard."""

from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from crosslayer.activations.encoding import Encoding, encoding
from crosslayer.activations.rows import ORIGIN
from crosslayer.errors import UserError
from crosslayer.files import read_json, write_json

MANIFEST = "manifest.json"
SCHEMA_VERSION = 1
GROWING = ("shards", "next_chunk", "next_batch", "finished", "source")
"""What a growing store changes, and the source, whose settings stand for it."""


@dataclass(frozen=True)
class Shard:
    """One file of a store."""

    file: str
    rows: int
    chunk: int
    """The chunk of the stream that its rows are of."""
    sha256: str
    """Of the whole file."""
    x_error: list[float] = field(default_factory=list)
    """By layer, the share of x's sum of squares that int8 is off by; empty for the exact forms."""
    y_error: list[float] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a store holds. Every value is JSON."""

    model: str
    """Hub id, path or bundled name of the language model; empty where it is not known."""
    revision: str = ""
    read: str = "resid"
    n_layers: int
    """Of the model, L."""
    d_model: int
    x_layers: list[int]
    """Layers whose reads are there, consecutive."""
    y_layers: list[int]
    """Layers whose writes are there, consecutive."""
    dtype: str
    """fp32, bf16 or int8."""
    source: dict[str, Any]
    """Where the rows come from: the data, their order and amount."""
    shards: list[Shard] = field(default_factory=list)
    next_chunk: int = 0
    """Where in the stream the row after the last shard's lies: its chunk ..."""
    next_batch: int = 0
    """... and its batch there."""
    finished: bool = False

    @property
    def rows(self) -> int:
        """Tokens in all shards."""
        return sum(shard.rows for shard in self.shards)

    @property
    def encoding(self) -> Encoding:
        """The form of x and y."""
        return encoding(self.dtype)

    @property
    def row_bytes(self) -> int:
        """Room that a token takes."""
        vectors = len(self.x_layers) + len(self.y_layers)
        return vectors * self.encoding.bytes_a_vector(self.d_model) + sum(dtype.itemsize for dtype in ORIGIN.values())

    @property
    def working_bytes(self) -> int:
        """Room that a token's x and y take in memory."""
        numbers = (len(self.x_layers) + len(self.y_layers)) * self.d_model
        return numbers * self.encoding.working_dtype.itemsize

    def settings(self) -> dict[str, Any]:
        """What stays as it is while the store grows, by name, those of the source among them."""
        own = {name: value for name, value in asdict(self).items() if name not in GROWING}
        return own | self.source


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Replace a store's manifest, atomically."""
    write_json(folder / MANIFEST, {"schema_version": SCHEMA_VERSION, **asdict(manifest)})


def read_manifest(folder: Path) -> Manifest:
    """A store's manifest.

    Raises:
        UserError: when there is none, it is damaged, or of another schema version.
    """
    path = folder / MANIFEST
    if not path.is_file():
        found = f"holds no {MANIFEST}, so it is no store" if folder.is_dir() else "no such store"
        raise UserError(f"{folder}: {found}; make one with `crosslayer capture`")
    record = read_json(path)
    found = record.pop("schema_version", None) if isinstance(record, dict) else None
    if found != SCHEMA_VERSION:
        raise UserError(f"{path}: schema version {found}, this crosslayer reads {SCHEMA_VERSION}; capture it again")
    manifest = _built(Manifest, record, path)
    encoding(manifest.dtype)
    return manifest


def check_same(folder: Path, kept: Manifest, asked: Manifest) -> None:
    """Refuse to add to a store what does not belong into it.

    Raises:
        UserError: naming the setting and both values.
    """
    ours, theirs = kept.settings(), asked.settings()
    for name in ours | theirs:
        if ours.get(name) != theirs.get(name):
            raise UserError(
                f"{folder}: holds {name} {ours.get(name)}, {theirs.get(name)} is asked for; "
                "capture with the store's own settings or into another folder"
            )


def _built(kind: Any, record: Any, path: Path) -> Any:
    if not isinstance(record, dict):
        raise UserError(f"{path}: is damaged at {str(record)[:20]!r}; capture the store again")
    known = {f.name for f in fields(kind)}
    needed = {f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING}
    wrong = sorted((needed - record.keys()) | (record.keys() - known))
    if wrong:
        raise UserError(f"{path}: is damaged at {wrong[0]!r}; capture the store again")
    if kind is Manifest:
        record = {**record, "shards": [_built(Shard, shard, path) for shard in record.get("shards", [])]}
    return kind(**record)
