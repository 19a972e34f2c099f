"""Make a bundle: `python -m export SOURCE [--out bundles/NAME]`.

SOURCE is the folder of a training run, or a bundle whose programs are made again from its weights.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from export.build_native import build_native
from export.bundles import write_bundle
from export.source import read_source

BUILD_NATIVE = "build-native"


def main() -> None:
    """Parse the command line; export, or build the native kernel."""
    arguments = sys.argv[1:]
    if arguments[:1] == [BUILD_NATIVE]:
        _build_native(arguments[1:])
    else:
        _export(arguments)


def _export(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m export",
        description=__doc__,
        epilog=f"`python -m export {BUILD_NATIVE}` builds the native kernel of clustered attention instead.",
    )
    parser.add_argument("source", type=Path, help="folder of a training run, or a bundle")
    parser.add_argument("--out", type=Path, help="the bundle's folder; by default bundles/NAME")
    parsed = parser.parse_args(arguments)
    source, model = read_source(parsed.source)
    out: Path = parsed.out or Path("bundles") / source.name
    parity = write_bundle(source, model, out).parity
    size = sum(path.stat().st_size for path in out.iterdir())
    told = {"bundle": str(out), "bytes": size, "parity": parity.max_relative_error}
    print(json.dumps(told | ({"rows_off": parity.share_of_rows_off} if parity.share_of_rows_off else {}), indent=2))


def _build_native(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog=f"python -m export {BUILD_NATIVE}", description="Build the native kernel of clustered attention."
    )
    parser.add_argument("--out", type=Path, default=Path("build/native"), help="folder of the builds")
    parser.add_argument("--sanitize", action="store_true", help="with checks of memory and undefined behaviour; slow")
    parsed = parser.parse_args(arguments)
    print(build_native(parsed.out, sanitize=parsed.sanitize))


if __name__ == "__main__":
    main()
