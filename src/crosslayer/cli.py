"""The command line: one subcommand per verb, and what happens when one fails."""

import os
import sys
import traceback
from contextlib import ExitStack
from importlib.metadata import version

import huggingface_hub
import torch
import transformers
import tyro
from torch.distributed import DistError

from crosslayer.distributed.crew import Crew
from crosslayer.distributed.joining import crew, joined, quiet
from crosslayer.distributed.mesh import hearing
from crosslayer.eleuther_options import translate
from crosslayer.errors import UserError
from crosslayer.team import LostError
from crosslayer.verbs.aggregating import aggregate
from crosslayer.verbs.exchange import export, import_
from crosslayer.verbs.gathering import capture, respond, store
from crosslayer.verbs.hallucination import hallucination
from crosslayer.verbs.looking import evaluate, generate, inspect
from crosslayer.verbs.tracing import graph
from crosslayer.verbs.training import demo, train

VERBS = {
    "demo": demo,
    "inspect": inspect,
    "capture": capture,
    "store": store,
    "train": train,
    "evaluate": evaluate,
    "generate": generate,
    "graph": graph,
    "aggregate": aggregate,
    "hallucination": hallucination,
    "respond": respond,
    "import": import_,
    "export": export,
}
SHARED = ("aggregate", "capture", "evaluate", "respond")
SHARED += ("hallucination score", "hallucination contrast", "hallucination circuits")
"""Verbs that torchrun's processes share."""
AGGREGATE = "--aggregate"
"""Makes `graph` the verb `aggregate`: the same for a data set, with options of its own."""


def main() -> None:
    """Entry point: exit code 0, 2 for bad input with one line on standard error, 130 after Ctrl-C."""
    args = sys.argv[1:]
    debug = "--debug" in args
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    huggingface_hub.logging.set_verbosity_error()
    args = [a for a in args if a != "--debug"]
    if args[:1] == ["graph"] and AGGREGATE in args:
        args = ["aggregate", *(a for a in args[1:] if a != AGGREGATE)]
    with ExitStack() as together:
        try:
            if args[:1] == ["train"]:
                _call(["train", *translate(args[1:])])
            else:
                _share(args, together.enter_context(joined()))
        except UserError as error:
            _stop(error, debug, 2, crew().stop(str(error)))
        except LostError as error:
            if debug:
                traceback.print_exc()
            print(f"crosslayer: {error}", file=sys.stderr, flush=True)
            os._exit(1)  # an orderly end would wait for the lost one
        except KeyboardInterrupt as stop:
            _stop(stop, debug, 130, crew().leads)
        except BrokenPipeError:  # the reader of our output, `head` for one, has had enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _call(args: list[str]) -> None:
    tyro.extras.subcommand_cli_from_dict(VERBS, prog="crosslayer", description=_DESCRIPTION, args=args)


def _share(args: list[str], crew: Crew) -> None:
    """Call a verb on all processes that torchrun started."""
    with hearing((DistError,)):  # of the store, which rank 0 keeps where torchrun does not
        crew.agree(lambda: {"command": args, "versions": [version("crosslayer"), torch.__version__]})
        if not crew.alone and not " ".join(args[:2]).startswith((*SHARED, "-h", "--help")):
            raise UserError(f"{' '.join(args[:2])}: is work for one process; start it without torchrun")
        with quiet(crew):
            _call(args)


_DESCRIPTION = (
    "Cross-layer transcoders for language and vision-language models: train them, put them in place of the MLPs, "
    "measure, and trace what led to a word. `crosslayer VERB --help` explains every option; add --debug for the "
    "traceback of an error."
)


def _stop(error: BaseException, debug: bool, code: int, said_here: bool) -> None:
    if debug:
        raise error
    if said_here:
        print(f"crosslayer: {str(error) or 'interrupted'}", file=sys.stderr, flush=True)
    sys.exit(code)
