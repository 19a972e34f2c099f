"""Make a bundle: `python -m export SOURCE [--runtime RUNTIME]… [--precision PRECISION] [--out FOLDER]`.

SOURCE is the folder of a training run, or a bundle whose programs are made again from its weights.
`python -m export convert` makes a bundle of a checkpoint that others published.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from export.build_native import build_native
from export.bundles import PROGRAMS, write_bundle
from export.convert import Wishes, convert, read_settings
from export.published import PUBLISHED
from export.source import read_source
from service.bundle import Manifest, Precision
from service.errors import BundleError

BUILD_NATIVE = "build-native"
CONVERT = "convert"
# Bundles of programs that are made where they are used; see `make programs`.
MADE = Path("build/programs")
MADE_FP16 = Path("build/fp16")


def main() -> None:
    """Parse the command line; export, convert, or build the native kernel."""
    arguments = sys.argv[1:]
    if arguments[:1] == [BUILD_NATIVE]:
        _build_native(arguments[1:])
    elif arguments[:1] == [CONVERT]:
        _convert(arguments[1:])
    else:
        _export(arguments)


def _export(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m export",
        description=__doc__,
        epilog=f"`python -m export {CONVERT}` converts a published checkpoint and `python -m export {BUILD_NATIVE}` "
        "builds the native kernel of clustered attention; both have their own --help.",
    )
    parser.add_argument("source", type=Path, help="folder of a training run, or a bundle")
    parser.add_argument(
        "--runtime",
        action="append",
        choices=list(PROGRAMS),
        help="what the bundle gets a program for, also several times; by default onnx alone",
    )
    parser.add_argument(
        "--precision",
        choices=get_args(Precision),
        default="fp32",
        help="of the programs; fp16, for GPUs, leaves decisions, norms and outputs in float32",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help=f"the bundle's folder; by default bundles/NAME, {MADE}/NAME where not ONNX alone is asked for, or "
        f"{MADE_FP16}/NAME with fp16",
    )
    parsed = parser.parse_args(arguments)
    runtimes = list(dict.fromkeys(parsed.runtime or ["onnx"]))
    home = Path("bundles") if runtimes == ["onnx"] else MADE
    try:
        source, model = read_source(parsed.source)
        out: Path = parsed.out or (home if parsed.precision == "fp32" else MADE_FP16) / source.name
        _tell(out, write_bundle(source, model, out, runtimes=runtimes, precision=parsed.precision))
    except (OSError, ValueError, BundleError) as error:
        sys.exit(f"{parser.prog}: {error}")


def _convert(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog=f"python -m export {CONVERT}",
        description="Make a bundle of a checkpoint that others published, with their preprocessing.",
        epilog=f"CONFIG is one of {', '.join(PUBLISHED)}, or what its publishers call it.",
    )
    parser.add_argument("config", metavar="CONFIG", help="the published configuration")
    parser.add_argument("checkpoint", type=Path, help="a safetensors file, or what torch.save wrote; never run")
    parser.add_argument("--labels", type=Path, help="file with one class name in each line; by default numbers")
    parser.add_argument("--license", help="of the checkpoint; it goes into manifest and model card")
    parser.add_argument("--key", help="where the file has its weights, such as model_ema; by default it is looked for")
    parser.add_argument(
        "--max-batch", type=int, help="pictures that may run together; more than by default pays on a GPU"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="change the preprocessing: a field of the task's spec, mean or std, such as interpolation=bilinear",
    )
    parser.add_argument("--out", type=Path, help="the bundle's folder; by default bundles/CONFIG-DATA")
    parsed = parser.parse_args(arguments)
    try:
        settings = read_settings(parsed.set)
        wishes = Wishes(
            labels=parsed.labels,
            license=parsed.license,
            key=parsed.key,
            max_batch=parsed.max_batch,
            settings=settings,
        )
        source, model, out = convert(parsed.config, parsed.checkpoint, parsed.out, wishes)
        _tell(out, write_bundle(source, model, out))
    except (OSError, ValueError) as error:
        sys.exit(f"{parser.prog}: {error}")


def _tell(out: Path, manifest: Manifest) -> None:
    parity = manifest.parity
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
