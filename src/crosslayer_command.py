"""The command `crosslayer`, outside of its package: importing that takes seconds, in which Ctrl-C ends it in peace."""

import os
import signal
import sys
from importlib.metadata import version


def main() -> None:
    """Entry point; what it runs is `crosslayer.cli.main`."""
    if sys.argv[1:] == ["--version"]:
        print(f"crosslayer {version('crosslayer')}")
        return
    usual = signal.getsignal(signal.SIGINT)
    if usual is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    from crosslayer.cli import main

    signal.signal(signal.SIGINT, usual)
    main()
