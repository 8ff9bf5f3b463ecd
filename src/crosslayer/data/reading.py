"""How a data set is read: the settings that every verb with DATA takes."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from crosslayer.data.skipped import BAD_SHARE
from crosslayer.data.splits import SPLITS
from crosslayer.errors import UserError

DATA_KINDS = (
    "Text file (an example a line), JSON lines, LLaVA or COCO JSON, parquet or CSV, folder of images or texts, "
    "`datasets` folder or id (id:configuration), YAML mixture, emoji-scenes, or model-samples; see docs/data.md."
)
"""What DATA can be, for the help of every verb that takes it."""
COLUMNS = ("prompt", "response", "image")
"""What a column can be named for."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How a data set is read."""

    images: Path | None = None
    """Folder that image paths in DATA are relative to; DATA's own by default."""
    prompt: str | None = None
    """What to ask about each image, where DATA has images without prompts."""
    columns: tuple[str, ...] = ()
    """Columns of DATA under other names, as in: prompt=question response=answer image=picture."""
    plain: bool = False
    """Take prompts as they are, without the model's chat template."""
    context: int | None = None
    """Pack text into pieces of so many tokens: documents (lines, rows, or files of a folder) joined with the end
    token."""
    split: str | None = None
    """train (80 %), validation or test (10 % each) of DATA, by a hash of each image (or text), so that none is in two;
    a data set's own split where it has one. All by default; of the bundled scenes, train to train, test to evaluate."""
    split_seed: int = 0
    """Another number, other splits."""
    stream: int | None = None
    """Read only the first N rows of a `datasets` table, as they come, without downloading the rest."""
    bad_share: float = BAD_SHARE
    """Share of bad rows (no image, damaged, too long) that are skipped and listed; with more, stop."""

    def __post_init__(self):
        if self.split is not None and self.split not in SPLITS:
            raise UserError(f"split is {self.split!r}; choose one of {', '.join(SPLITS)}")
        for name, number in (("context", self.context), ("stream", self.stream)):
            if number is not None and number < 1:
                raise UserError(f"--{name} is {number}; choose at least 1")
        if not 0 <= self.bad_share <= 1:
            raise UserError(f"--bad-share is {self.bad_share}; choose between 0 and 1")
        for column in self.columns:
            if column.partition("=")[0] not in COLUMNS or not column.partition("=")[2]:
                raise UserError(f"--columns has {column!r}; write NAME=COLUMN with NAME one of {', '.join(COLUMNS)}")

    def column_names(self) -> Mapping[str, str]:
        """The columns that are named otherwise."""
        return dict(column.split("=", 1) for column in self.columns)
