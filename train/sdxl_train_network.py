"""`accelerate launch ./train/sdxl_train_network.py`: the trainer under the path that guides give."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # Python puts this folder on the path, where files named like other packages' modules would hide those.
    here = Path(__file__).resolve().parent
    sys.path[:] = [folder for folder in sys.path if Path(folder or ".").resolve() != here]

    from lorashrink.train.command import main

    sys.exit(main(sys.argv[1:], "sdxl_train_network.py"))
