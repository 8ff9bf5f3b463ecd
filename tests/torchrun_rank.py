"""What torchrun starts in the test of faults: asks for a rank, and ends as that does. Argument: the server's socket."""

import json
import os
import signal
import socket
import sys

rank = socket.socket(socket.AF_UNIX)
rank.connect(sys.argv[1])
rank.sendall(json.dumps({"environment": dict(os.environ), "arguments": sys.argv[2:]}).encode())
code = rank.recv(1)
if not code:
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(code[0])
