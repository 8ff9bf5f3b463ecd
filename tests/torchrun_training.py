"""Ranks of the test of faults: a training without a language model, in which one of them may be killed.

This is a server that forks a rank for whoever asks on its socket (`torchrun_rank.py`, which torchrun starts), as
importing torch takes seconds in every life. Argument: path of the socket.
"""

import json
import os
import random
import signal
import socket
import sys
import threading
import time
import traceback
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch

from crosslayer.activations.record import Activations
from crosslayer.coders.sparsity import JointTopK
from crosslayer.distributed.checkpoint import has_checkpoint
from crosslayer.distributed.group import team_of
from crosslayer.distributed.mesh import join, leave, restarts
from crosslayer.distributed.state import CHECKPOINT, ShardedState, export_shares
from crosslayer.team import LostError, Team, share
from crosslayer.training.config import TrainConfig
from crosslayer.training.fit import Training, fit
from crosslayer.training.scales import estimate_scales
from crosslayer.training.stream import Place, shuffled_batches, usable_tokens
from crosslayer.training.trainer import Trainer
from crosslayer.wiring import Wiring

STEPS, BATCH, SEED = 150, 32, 5
STRIDE, PAUSE = 8, 0.01
"""Steps in a life before one of its ranks is killed, and seconds within the step that follows; at most."""


class Chunks:
    """Random activations, of which a process has its share."""

    def __init__(self, team: Team):
        self.team = team

    def chunk(self, index: int) -> Activations:
        generator, n = torch.Generator().manual_seed(index), 320
        x = torch.randn(n, 3, 8, generator=generator)
        place = torch.arange(n)
        whole = Activations(x, x.relu() + 0.1, place < 0, place % 8, place // 8, place)
        mine = share(self.team.tokens, n)
        return whole[mine.start : mine.stop]


def main(run: Path, lives: int) -> None:
    torch.set_num_threads(1)
    mesh = join(int(os.environ["FEATURE_RANKS"]), timeout=20)
    team = team_of(mesh)
    source, states = Chunks(team), ShardedState(run, {}, mesh)
    config = TrainConfig(
        wiring=Wiring.full(3), sparsity=JointTopK(4), d_transcoder=16, tokens=STEPS * BATCH, batch_tokens=BATCH
    )
    place = Place()
    if has_checkpoint(run / CHECKPOINT):
        kept = states.load(config, torch.device("cpu"))
        place, trainer = kept.place, Trainer(config, kept.scales, team=team).restore(kept.tensors, kept.counters)
        print(f"resumed at step {trainer.step_number}", flush=True)
    else:
        trainer = Trainer(config, estimate_scales(source.chunk(0), team.tokens), team=team)
    drawn = random.Random(SEED + restarts())
    if restarts() < lives and mesh.rank == drawn.randrange(2):
        moment = trainer, trainer.step_number + drawn.randrange(STRIDE), drawn.uniform(0.0, PAUSE)
        threading.Thread(target=kill_at, args=moment, daemon=True).start()
    batches = shuffled_batches(source, BATCH, 0, place, team.tokens)
    training = Training(trainer, batches, place, run, states)
    fit(training, checkpoint_seconds=0.05)
    coder = trainer.finish(usable_tokens(source, training.place, BATCH, 100, 0, team.tokens))
    coder.save(run, partial(export_shares, mesh, coder.sharing))
    states.remove()
    leave()


def kill_at(trainer: Trainer, step: int, seconds: float) -> None:
    while trainer.step_number < step:
        time.sleep(0.0005)
    time.sleep(seconds)
    print(f"killed at step {trainer.step_number}", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def live(asker: socket.socket) -> None:
    """Be the rank that somebody asked for, and end when he does."""
    asked = json.loads(asker.recv(1 << 20))
    os.environ |= asked["environment"]
    threading.Thread(target=lambda: (asker.recv(1), os._exit(1)), daemon=True).start()
    code = 1
    try:
        main(Path(asked["arguments"][0]), int(asked["arguments"][1]))
        code = 0
    except LostError as error:
        print(f"crosslayer: {error}", flush=True)
    except BaseException:
        traceback.print_exc(file=sys.stdout)
    sys.stdout.flush()
    with suppress(BrokenPipeError):  # torchrun may have ended whoever asked
        asker.sendall(bytes([code]))
    os._exit(code)


if __name__ == "__main__":
    server = socket.socket(socket.AF_UNIX)
    server.bind(sys.argv[1])
    server.listen()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        asker, _ = server.accept()
        if os.fork() == 0:
            server.close()
            live(asker)
        asker.close()
