"""Run the command line several times in one process: ``python several_runs.py FILE``.

FILE holds a JSON list of argument lists. Prints the exit status of each run as a last line of its
own; stops where one is neither 0 nor 1.
"""

import json
import sys
from pathlib import Path

from g4seg_pl.main import main

if __name__ == "__main__":
    for words in json.loads(Path(sys.argv[1]).read_text()):
        status = main(words)
        print(f"status {status}", flush=True)
        if status not in (0, 1):
            sys.exit(status)
