"""Train a segmentation network on refined masks: fit, validate, test, predict, show."""

import sys

from g4seg_pl.segmentation.cli import main

if __name__ == "__main__":
    sys.exit(main())
