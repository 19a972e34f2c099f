"""Finds golden vectors: outputs of official code that ours is compared with.

The root is `$GOLDEN_ROOT`, else `../shared/golden` where that exists, else `tests/golden`, which holds the smaller
files.
"""

import os
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
SUFFIXES = {".npz", ".safetensors"}


def golden_root() -> Path:
    """The folder with one folder of golden files per system.

    Raises: FileNotFoundError if GOLDEN_ROOT names no folder; a run asked for other files must not pass on ours.
    """
    named = os.environ.get("GOLDEN_ROOT")
    if named:
        root = Path(named)
        if not root.is_dir():
            raise FileNotFoundError(f"GOLDEN_ROOT={named} is no folder; name one that holds <system>/*.npz")
        return root
    shared = REPOSITORY.parent / "shared" / "golden"
    return shared if shared.is_dir() else REPOSITORY / "tests" / "golden"


def golden_files(system: str, *prefixes: str) -> list[Path]:
    """The golden files of a system, in order of name, for one test case each.

    Use: `@pytest.mark.parametrize("path", golden_files("tcformer_and_paca_vit", "paca_"), ids=lambda path: path.stem)`.

    Args:
        system: folder below the root.
        prefixes: of the file names; none means every file.
    """
    files = sorted(path for path in (golden_root() / system).glob("*") if path.suffix in SUFFIXES)
    return [path for path in files if path.name.startswith(prefixes or "")]
