"""The command before its package is there: Ctrl-C ends it in peace, and its version needs no import."""

import subprocess
import sys
from importlib.metadata import version

import pytest

BEGIN = "import signal, sys; signal.signal(signal.SIGINT, signal.{handler}); from crosslayer_command import main\n"
CTRL_C = """
class Interrupting:
    def find_spec(self, name, *_):
        if name == "torch":
            signal.raise_signal(signal.SIGINT)

sys.meta_path.insert(0, Interrupting())
"""


def run(*lines: str, handler: str = "default_int_handler") -> subprocess.CompletedProcess[str]:
    code = BEGIN.format(handler=handler) + "\n".join(lines)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_ctrl_c_while_the_package_is_imported_leaves_no_traceback():
    done = run(CTRL_C, "main()")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


@pytest.mark.parametrize("handler", ["default_int_handler", "SIG_IGN"])
def test_ctrl_c_does_afterwards_what_it_did_before(handler):
    done = run("sys.argv[1:] = ['inspect', '--help']", "try:", "    main()", "except SystemExit:", "    pass",
               f"print(signal.getsignal(signal.SIGINT) == signal.{handler})", handler=handler)  # fmt: skip
    assert done.stdout.splitlines()[-1] == "True"


def test_the_version_is_told_at_once():
    done = run("sys.argv[1:] = ['--version']", "main()", "print('torch' in sys.modules)")
    assert done.stdout == f"crosslayer {version('crosslayer')}\nFalse\n"
