"""Bad rows of a data set: counted, listed in a file with their reason, and too many when they pass a share."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crosslayer.errors import UserError
from crosslayer.files import append_line, write_text
from crosslayer.team import Group, tell

SKIPPED = "skipped.jsonl"
"""Name of the list in a folder of results."""
BAD_SHARE = 0.05
"""Share of bad rows that is put up with."""
FEW = 100
"""Rows looked at before the share of bad ones among them says anything, unless there are no more."""


@dataclass
class Skipped:
    """The bad rows of a data set that were met so far, in memory and, once there is a place for it, in a file."""

    share: float = BAD_SHARE
    """Bad rows among those looked at that are put up with."""
    reasons: dict[str, str] = field(default_factory=dict)
    """What is wrong, by row."""
    file: Path | None = None
    """Where they are listed; set by `list_in`."""
    settled: set[str] = field(default_factory=set, init=False)
    """Rows that count no more: found by a check that has passed, or in an earlier life of this run."""
    told: set[str] = field(default_factory=set, init=False)
    """Rows that all processes of a team know of."""
    looked_at: int = field(default=0, init=False)
    """Rows, good and bad, since then."""

    def note(self, id: str, reason: str) -> None:
        """Take note of a bad row; a row that is known already changes nothing."""
        if id in self.reasons:
            return
        self.reasons[id] = reason
        if self.file is not None:
            append_line(self.file, _line(id, reason))

    def look(self, n: int, of: int, name: str) -> None:
        """Count `n` more rows as looked at, and refuse a data set in which too many are bad.

        Args:
            n: good and bad ones; those noted since the last time are among them.
            of: rows that there are.
            name: what to call the data set.

        Raises:
            UserError: when more than `share` of the rows looked at are bad; says where they are listed.
        """
        self.looked_at += n
        bad = [reason for id, reason in self.reasons.items() if id not in self.settled]
        rows = min(max(self.looked_at, FEW), of)
        if len(bad) > self.share * rows:
            listed = f"listed in {self.file}" if self.file else "a larger share would list them"
            raise UserError(
                f"{name}: {len(bad)} of {rows} rows are bad, more than --bad-share {self.share} allows; {listed}; "
                f"the first: {bad[0]}"
            )

    def spread(self, group: Group) -> None:
        """Take note of the rows that the others of a group met, too; how many are too many is for them to say."""
        if group.size == 1:
            return
        for rank, reasons in enumerate(tell(group, {id: self.reasons[id] for id in self.reasons.keys() - self.told})):
            for id, reason in reasons.items():
                self.told.add(id)
                if rank != group.rank:
                    self.settled.add(id)
                    self.note(id, reason)

    def hear(self, looks: Iterable[Sequence[Any]]) -> None:
        """Note and look as another did, who was told to take notes apart; see `Apart`.

        Raises:
            UserError: as `look` does.
        """
        for n, of, name, bad in looks:
            for id, reason in bad.items():
                self.note(id, reason)
            self.look(n, of, name)

    def settle(self) -> None:
        """Begin to count anew."""
        self.settled, self.looked_at = set(self.reasons), 0

    def list_in(self, file: Path, *, resume: bool = False) -> None:
        """List them in this file from now on; under `resume`, after those that it lists already."""
        known = _read(file) if resume else {}
        self.settled |= known.keys()
        self.reasons, self.file = known | self.reasons, file
        if self.reasons:
            write_text(file, "".join(_line(*item) + "\n" for item in self.reasons.items()))
        else:
            file.unlink(missing_ok=True)

    def __str__(self) -> str:
        rows = f"{len(self.reasons)} bad row{'s' if len(self.reasons) > 1 else ''} skipped"
        return f"{rows}, listed in {self.file}" if self.file else rows


@dataclass
class Apart(Skipped):
    """Notes of one piece of work, to be heard where the pieces come together; nothing is listed or refused here."""

    looks: list[tuple[int, int, str, dict[str, str]]] = field(default_factory=list, init=False)
    """Of each look its arguments, and the bad rows noted since the last."""

    def look(self, n: int, of: int, name: str) -> None:
        """Count rows as looked at, for later."""
        known = {id for *_, bad in self.looks for id in bad}
        self.looks.append((n, of, name, {id: why for id, why in self.reasons.items() if id not in known}))


def _line(id: str, reason: str) -> str:
    return json.dumps({"row": id, "reason": reason}, ensure_ascii=False)


def _read(file: Path) -> dict[str, str]:
    """What the file lists; a torn last line is forgotten, its row will be met again."""
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.is_file() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return {row["row"]: row["reason"] for row in rows}
