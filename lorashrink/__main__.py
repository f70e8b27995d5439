"""`python -m lorashrink`, which is the command `lorashrink`."""

from lorashrink.cli import main

main()
