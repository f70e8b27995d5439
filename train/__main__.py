"""`python -m lorashrink.train` and `accelerate launch -m lorashrink.train`."""

import sys

from lorashrink.train.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], "python -m lorashrink.train"))
