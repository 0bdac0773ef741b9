"""`python -m longreach` is `longreach`."""

from longreach.cli import main

main()
