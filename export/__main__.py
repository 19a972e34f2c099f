"""Make a bundle: `python -m export SOURCE [--out bundles/NAME]`.

SOURCE is the folder of a training run, or a bundle whose programs are made again from its weights.
"""

import argparse
import json
from pathlib import Path

from export.bundles import write_classifier_bundle
from export.source import read_source


def main() -> None:
    """Parse the command line and export."""
    parser = argparse.ArgumentParser(prog="python -m export", description=__doc__)
    parser.add_argument("source", type=Path, help="folder of a training run, or a bundle")
    parser.add_argument("--out", type=Path, help="the bundle's folder; by default bundles/NAME")
    arguments = parser.parse_args()
    source, model = read_source(arguments.source)
    out: Path = arguments.out or Path("bundles") / source.name
    manifest = write_classifier_bundle(source, model, out)
    size = sum(path.stat().st_size for path in out.iterdir())
    print(json.dumps({"bundle": str(out), "bytes": size, "parity": manifest.parity.max_relative_error}, indent=2))


if __name__ == "__main__":
    main()
