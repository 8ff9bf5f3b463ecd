"""The state of an unfinished training, from the one process that kept it to several, and back.

Each kind is written atomically, and of two the one after more steps counts: an end at any moment leaves the newer.
"""

import json
from datetime import timedelta
from pathlib import Path

from torch import Tensor

from crosslayer.distributed.checkpoint import Checkpointer, has_checkpoint, load, read_header, remove
from crosslayer.distributed.group import team_of
from crosslayer.distributed.mesh import Mesh, hearing
from crosslayer.distributed.state import CHECKPOINT, spread_over
from crosslayer.files import read_tensors, sync, write_tensors
from crosslayer.team import share, tell, together
from crosslayer.training.state import STATE, read_state_header


def hand_over(run: Path, mesh: Mesh | None) -> None:
    """Leave the state of a run, where there is one, in the kind that these processes keep, and in no other.

    Args:
        run: folder of the run.
        mesh: the ranks, each of which calls this; None: one process.

    Raises:
        UserError: when a state is damaged, or the file system refuses.
    """
    if mesh is None:
        _to_one(run)
    else:
        _to_many(run, mesh)


def _to_one(run: Path) -> None:
    folder = run / CHECKPOINT
    if not has_checkpoint(folder):
        return
    if _of_many_counts(run):
        saved = load(folder)
        write_tensors(run / STATE, saved.tensors, {"crosslayer": json.dumps(saved.header)})
        sync(run)
    remove(folder)


def _to_many(run: Path, mesh: Mesh) -> None:
    everyone, counts = team_of(mesh).everyone, False
    with together(everyone):
        counts = (run / STATE).is_file() and not _of_many_counts(run)
    if tell(everyone, counts)[0]:
        shares: dict[str, Tensor] = {}
        with together(everyone):
            shares = _shares(run / STATE, mesh)
        with hearing():
            keeper = Checkpointer(run / CHECKPOINT, timedelta(seconds=mesh.timeout))
            keeper.save(shares, read_state_header(run / STATE))
            keeper.close()
    with together(everyone):
        if everyone.rank == 0:
            (run / STATE).unlink(missing_ok=True)


def _of_many_counts(run: Path) -> bool:
    """Whether the checkpoint of several ranks is that of more steps."""
    many, one = run / CHECKPOINT, run / STATE
    if not (has_checkpoint(many) and one.is_file()):
        return has_checkpoint(many)
    newer, older = (header["counters"]["step_number"] for header in (read_header(many), read_state_header(one)))
    return newer > older


def _shares(file: Path, mesh: Mesh) -> dict[str, Tensor]:
    """This rank's shares of what one process kept."""
    axes, features, shares = read_state_header(file)["axes"], team_of(mesh).features, {}
    for name, tensor in read_tensors(file)[0].items():
        axis = axes.get(name)
        if axis is not None:
            held = share(features, tensor.shape[axis])
            tensor = tensor.narrow(axis, held.start, len(held))
        shares[name] = spread_over(mesh, tensor, axis)
    return shares
