"""Compile the native kernel of clustered attention: C++ in `native/` → a library that ONNX Runtime loads.

The kernel is optional: without it a program runs the body that it holds for the operator. It runs on CPUs only, and is
compiled on the machine that uses it, as a bundle holds no native code; the service is told where it lies.

`python -m export.build_native [--out FOLDER] [--sanitize]` compiles and prints the path. It needs no package.
"""

import argparse
import hashlib
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCES = Path(__file__).parent / "native"
LIBRARY = "libclustered_attention.so"
# Under a name that the service does not look for: a process that loads it without libasan ends at once.
SANITIZED_LIBRARY = "libclustered_attention_sanitized.so"
# Tiers for newer processors are chosen when the library is loaded, hence no -march. -ffast-math would break infinities,
# NaN and the order of sums.
FLAGS = (
    *("-std=c++17", "-shared", "-fPIC", "-fvisibility=hidden", "-pthread"),
    *("-fno-math-errno", "-ffp-contract=fast", "-Wall", "-Wextra", "-Wno-psabi"),
)
OPTIMISED = ("-O3",)
SANITIZED = ("-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")


def build_native(out: Path = Path("build/native"), *, sanitize: bool = False) -> Path:
    """Compile the library unless that was done before.

    Args:
        out: folder for a folder named after the sources, the flags and the compiler, which holds the library.
        sanitize: stop at the first use of memory that is not there, or of undefined behaviour. Loading such a library
            into Python needs `LD_PRELOAD` of libasan.
    Returns: path of the library.
    Raises: RuntimeError if there is no compiler, or it fails.
    """
    compiler = shutil.which("g++")
    if compiler is None:
        raise RuntimeError(
            "found no g++ to compile the native kernel with; install it (Debian, Ubuntu: apt-get install g++) or go "
            "without: programs then run their portable body"
        )
    flags = [*FLAGS, *(SANITIZED if sanitize else OPTIMISED)]
    name = SANITIZED_LIBRARY if sanitize else LIBRARY
    library = out / _name_build(compiler, flags) / name
    if library.exists():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    sources = [str(path) for path in sorted(SOURCES.glob("*.cpp"))]
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        made = Path(scratch) / name
        command = [compiler, *flags, *sources, "-o", str(made)]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} failed; GCC 9 or later is needed:\n{run.stderr}")
        made.replace(library)  # whole or not there, also for someone who builds at the same time
    return library


def _name_build(compiler: str, flags: list[str]) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    digest = hashlib.sha256(b"\0".join([version, *(flag.encode() for flag in flags)]))
    for path in sorted(SOURCES.iterdir()):
        digest.update(b"\0".join([b"", path.name.encode(), path.read_bytes()]))
    return digest.hexdigest()[:16]


def main() -> None:
    """Parse the command line and compile."""
    parser = argparse.ArgumentParser(prog="python -m export.build_native", description="Compile the native kernel.")
    parser.add_argument("--out", type=Path, default=Path("build/native"), help="folder of all builds")
    parser.add_argument("--sanitize", action="store_true", help="with checks of memory, for tests")
    arguments = parser.parse_args()
    print(build_native(arguments.out, sanitize=arguments.sanitize))


if __name__ == "__main__":
    main()
