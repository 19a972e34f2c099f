"""Checkpoints that others published, read without running anything that is in them.

A pickle can name any function and have it called. `torch.load(weights_only=True)` calls none but those that make
tensors and plain containers; a file that names anything else is refused as a whole.
"""

import argparse
import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from models.checkpoints_tcformer import official_state

# What torch raises for a file that is no checkpoint, is damaged or cut off; its reader indexes whatever the file says.
_DAMAGE = (OSError, RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError)
# Published files keep the settings and the best score of their training beside the weights. To make these runs nothing
# but what numpy and argparse do to make them. A scalar's maker has two names, as numpy 2 moved it.
_SCALAR: Callable[..., object] = np.float64().__reduce__()[0]  # type: ignore[assignment]
_HARMLESS: list[Callable[..., object] | tuple[Callable[..., object], str]] = [
    argparse.Namespace,
    np.dtype,
    *(type(np.dtype(number)) for number in (np.float64, np.float32, np.int64)),
    (_SCALAR, "numpy.core.multiarray.scalar"),
    (_SCALAR, "numpy._core.multiarray.scalar"),
]


def read_checkpoint(path: Path, *, key: str | None = None) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint, by their official names.

    Args:
        path: a safetensors file if it is called so, else what `torch.save` wrote.
        key: where a pickled checkpoint has its weights; None is the first of `WRAPPERS` that it has, or itself.
    Raises: ValueError if the file is neither, names what is no tensor and no plain container, or has no such key;
        FileNotFoundError.
    """
    if path.suffix == ".safetensors":
        try:
            return official_state(load_file(path))
        except SafetensorError as error:
            raise ValueError(f"{path} is no safetensors file: {error}; fetch it again") from error
    loaded = _unpickle(path)
    if not isinstance(loaded, Mapping):
        raise ValueError(f"{path} holds a {type(loaded).__name__}, expected names and tensors; save its state_dict()")
    if key is not None:
        if key not in loaded:
            raise ValueError(f"{path} has no {key}; it has {', '.join(map(str, list(loaded)[:12]))}; name one of them")
        loaded = {"state_dict": loaded[key]}
    return official_state(loaded)


def _unpickle(path: Path) -> object:
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            loaded: object = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"names {named[1]}" if named else "is no pickle of tensors"
        raise ValueError(
            f"{path} {what}; a checkpoint may hold tensors, numbers, text and plain containers of them; nothing in it "
            "was run; where you trust the file, save its state_dict() alone, best as safetensors"
        ) from error
    except _DAMAGE as error:
        raise ValueError(f"{path} is no checkpoint, or is damaged or cut off; fetch it again") from error
    return loaded
