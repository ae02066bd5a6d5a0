"""``python tools/demo_model --out FOLDER`` makes the demonstration model from nothing."""

import sys
from pathlib import Path

if not __package__:  # run as a folder, which puts the folder itself on the path
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from demo_model.train import main

main()
