"""What `python experiments/evaluate.py` finds in the place of the package: it says what to do."""

import sys
from pathlib import Path

name = Path(sys.argv[0]).stem
print(f"error: run this as python -m experiments.{name} from the project's folder", file=sys.stderr)
sys.exit(2)
