"""`python -m crosslayer`."""

from crosslayer.cli import main

main()
