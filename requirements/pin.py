"""Pins the development set, which holds the serving set, and prints it as a constraints file.

pip only resolves here and installs nothing; run it as `make constraints`.
"""

import json
import subprocess
import sys

RESOLVE = ("install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-", "-r", "requirements/dev.txt")

# Comes with torch's CUDA build only, which states the exact versions itself.
UNPINNED_PREFIXES = ("nvidia-", "cuda-", "triton")
PINNED = ("nvidia-ml-py",)  # no part of it

HEADER = """\
# Every package of the development set at the version that was tested: Python {python}, Linux x86-64.
# Made by `make constraints`; do not edit. Lines for packages that are not asked for have no effect.
# torch carries no local version, so that the same pin brings the CUDA build where the package index offers it;
# the NVIDIA libraries stay unpinned, as torch and onnxruntime-gpu state which of them they accept.
"""


def resolve() -> dict[str, str]:
    """Ask pip which version of each package it would install."""
    report = subprocess.run([sys.executable, "-m", "pip", *RESOLVE], check=True, stdout=subprocess.PIPE).stdout
    packages = [item["metadata"] for item in json.loads(report)["install"]]
    return {package["name"].lower().replace("_", "-"): package["version"] for package in packages}


def main() -> None:
    """Print the constraints file."""
    versions = {name: version.split("+")[0] for name, version in resolve().items()}
    if "onnxruntime-gpu" not in versions:
        raise SystemExit("onnxruntime-gpu did not come; pins are made on Linux x86-64")
    if "onnxruntime" in versions:
        raise SystemExit("onnxruntime came beside onnxruntime-gpu; find the package that asks for it")
    # Other platforms install the CPU build; both are released together.
    versions["onnxruntime"] = versions["onnxruntime-gpu"]
    print(HEADER.format(python=f"{sys.version_info.major}.{sys.version_info.minor}"), end="")
    for name in sorted(versions):
        if name in PINNED or not name.startswith(UNPINNED_PREFIXES):
            print(f"{name}=={versions[name]}")


if __name__ == "__main__":
    main()
