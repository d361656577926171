"""Evaluate KV-cache compression: `python evaluate.py --config configs/eval.yaml`.

`python evaluate.py ask VIDEO "question"` asks about one clip, `python evaluate.py merge FOLDER FOLDER --output FOLDER`
joins the shards of an evaluation.
"""

import sys

from lightning_modules.cli.evaluate import run

if __name__ == "__main__":
    sys.exit(run())
