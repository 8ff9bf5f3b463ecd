"""Writing files so that a reader never sees half of one."""

import csv
import errno
import io
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from crosslayer.errors import UserError

UNFINISHED = ".part"
"""How names of files end that are being written."""
SEEN_AFTER = 90.0
"""Seconds after which a machine sees what another has written, at most."""
LEAVINGS = (f".*{UNFINISHED}", ".tmp*")
"""Patterns of what a killed writer may leave: ours, and safetensors' own."""


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`; what was written there is synced and takes `path`'s place at the end.

    After any exception `path` is as it was before.

    Raises:
        UserError: when the file system refuses, a full disk for one.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=UNFINISHED, dir=path.parent)
        os.close(handle)
    except OSError as error:
        raise UserError(f"{path}: cannot write ({error.strerror}); free some room or choose another folder") from error
    temporary = Path(name)
    try:
        yield temporary
        sync(temporary)
        temporary.chmod(0o644)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot write ({error.strerror}); free some room or choose another folder") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def append_line(path: Path, line: str) -> None:
    """Add a line to a text file; an end of the process in the middle may leave half of it.

    Raises:
        UserError: when the file system refuses, a full disk for one.
    """
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        raise UserError(f"{path}: cannot write ({error.strerror}); free some room or choose another folder") from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file atomically, from tensors on any device."""
    with atomic_path(path) as temporary:
        try:
            save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, temporary, metadata)
        except SafetensorError as error:
            raise OSError(errno.EIO, str(error)) from error


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file.

    Raises:
        UserError: when it is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: cannot be read ({error}); copy or make it again") from None


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def nulls(value: Any) -> Any:
    """JSON values with None for NaN, which JSON lacks."""
    if isinstance(value, dict):
        return {key: nulls(item) for key, item in value.items()}
    if isinstance(value, list):
        return [nulls(item) for item in value]
    return None if isinstance(value, float) and value != value else value


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a table as CSV, atomically; None is an empty cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    write_text(path, text.getvalue())


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: when it is missing or is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (ValueError, RecursionError, OSError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from None


def appeared(path: Path) -> Path:
    """A file that another machine has written, once this one sees it: a network's file system may take a minute."""
    end = time.monotonic() + SEEN_AFTER
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.1)
    return path


def check_folder(path: Path, overwrite: bool) -> None:
    """Refuse an output folder that holds something, unless under `overwrite`.

    Raises:
        UserError: when it does, or is a file.
    """
    if path.exists() and not path.is_dir():
        raise UserError(f"{path}: is a file; choose a folder for the output")
    if path.is_dir() and any(not _is_leaving(file) for file in path.iterdir()) and not overwrite:
        raise UserError(f"{path}: already exists and is not empty; choose another folder or add --overwrite")


def claim_folder(path: Path, overwrite: bool, ours: Sequence[str]) -> None:
    """Make an output folder, once `check_folder` allows it, without what an earlier run left there.

    Args:
        path: the folder.
        overwrite: whether it may hold something.
        ours: patterns of the file names that may be removed; anything else stays.

    Raises:
        UserError: when the file system refuses, too.
    """
    check_folder(path, overwrite)
    try:
        path.mkdir(parents=True, exist_ok=True)
        for file in [file for pattern in ours for file in path.glob(pattern)]:
            file.unlink()
        sweep(path)
    except OSError as error:
        raise UserError(f"{path}: cannot use this folder ({error.strerror}); choose another") from None


@contextmanager
def vacated(path: Path) -> Iterator[None]:
    """After an exception, remove those folders on the way to `path` that were made inside and hold nothing finished."""
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        yield
    except BaseException:
        with suppress(OSError):  # of a folder that was never made, or holds something
            sweep(path)
            for folder in made:
                folder.rmdir()
        raise


def sweep(folder: Path) -> None:
    """Remove what writers that were killed have left unfinished."""
    for file in folder.iterdir():
        if _is_leaving(file):
            file.unlink(missing_ok=True)


def disk_room(path: Path) -> int:
    """Bytes free on the file system that `path` lies, or will lie, on."""
    folder = path.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def size_text(n_bytes: int) -> str:
    """Bytes, for people to read."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = next((i for i in range(len(units)) if n_bytes < 1000 * 1024**i), len(units) - 1)
    return f"{n_bytes / 1024**power:.3g} {units[power]}"


def sync(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk and not in a cache only."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _is_leaving(file: Path) -> bool:
    return any(file.match(pattern) for pattern in LEAVINGS)
