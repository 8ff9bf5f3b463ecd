"""`python -m crosslayer`."""

from crosslayer_command import main

main()
