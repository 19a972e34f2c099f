import argparse
import collections
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from export.checkpoint_file import read_checkpoint

STATE = {"head.weight": torch.arange(6.0).reshape(2, 3), "head.bias": torch.tensor([1.0, -2.0])}


class Payload:
    """Makes a file when it is unpickled, if whoever reads it allows that."""

    def __init__(self, mark: Path, call: Any = os.system) -> None:
        self.mark, self.call = mark, call

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        code = f"open({str(self.mark)!r}, 'w').close()"
        return self.call, (f"touch {self.mark}" if self.call is os.system else code,)


def assert_state(found: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(STATE)
    for name, tensor in STATE.items():
        torch.testing.assert_close(found[name], tensor, atol=0, rtol=0)


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "state_dict_ema", "model_ema"])
@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "before torch 1.6"])
def test_weights_are_read_from_what_torch_saved(tmp_path: Path, wrapper: str | None, is_zip: bool) -> None:
    path = tmp_path / "official.pth"
    torch.save({wrapper: STATE, "epoch": 3} if wrapper else STATE, path, _use_new_zipfile_serialization=is_zip)
    assert_state(read_checkpoint(path))


def test_what_publishers_keep_beside_the_weights_does_no_harm(tmp_path: Path) -> None:
    settings = argparse.Namespace(lr=1e-3, output_dir="work", nested={"opt": "adamw"})
    beside = {"args": settings, "best_score": np.float64(48.3), "meta": collections.OrderedDict(CLASSES=("a", "b"))}
    path = tmp_path / "official.pth"
    torch.save({"model": STATE, **beside}, path)
    assert_state(read_checkpoint(path))


def test_a_score_that_numpy_1_wrote_does_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "official.pth"
    torch.save({"model": STATE, "best_score": np.float64(48.3)}, path, _use_new_zipfile_serialization=False)
    old, new = b"cnumpy.core.multiarray\nscalar\n", b"cnumpy._core.multiarray\nscalar\n"
    assert new in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(new, old))
    assert_state(read_checkpoint(path))


def test_weights_and_their_averages_can_be_chosen_between(tmp_path: Path) -> None:
    path = tmp_path / "official.pth"
    averages = {name: tensor + 1 for name, tensor in STATE.items()}
    torch.save({"state_dict_ema": averages, "state_dict": STATE}, path)
    assert_state(read_checkpoint(path))
    torch.testing.assert_close(
        read_checkpoint(path, key="state_dict_ema")["head.bias"], torch.tensor([2.0, -1.0]), atol=0, rtol=0
    )
    with pytest.raises(ValueError, match="has no model_ema; it has state_dict_ema, state_dict; name one"):
        read_checkpoint(path, key="model_ema")


def test_safetensors_are_read(tmp_path: Path) -> None:
    path = tmp_path / "official.safetensors"
    save_file({f"module.{name}": tensor for name, tensor in STATE.items()}, path)
    found = read_checkpoint(path)
    assert found.keys() == STATE.keys()
    torch.testing.assert_close(found["head.weight"], STATE["head.weight"], atol=0, rtol=0)


@pytest.mark.parametrize("call", [os.system, eval, exec], ids=["system", "eval", "exec"])
@pytest.mark.parametrize("place", ["beside the weights", "as the weights", "as the file", "before torch 1.6"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_that_would_run_code_is_refused_and_runs_nothing(tmp_path: Path, call: Any, place: str) -> None:
    path, mark = tmp_path / "official.pth", tmp_path / "mark"
    payload = Payload(mark, call)
    if place == "as the file":
        path.write_bytes(pickle.dumps(payload))
    else:
        held = {"model": payload} if place == "as the weights" else {"model": STATE, "optimizer": payload}
        torch.save(held, path, _use_new_zipfile_serialization=place != "before torch 1.6")
    with pytest.raises(ValueError, match=r"official\.pth (names [\w.]*(system|eval|exec)|is no).*") as caught:
        read_checkpoint(path)
    assert not mark.exists()
    assert "weights_only" not in str(caught.value), "no advice to read it in another way"
    pickle.loads(pickle.dumps(payload))
    assert mark.exists(), "elsewhere it would have run, so that this test would see it"


@pytest.mark.parametrize(
    "content",
    [b"", b"hello", b"PK\x03\x04 cut off", b"\x80\x02}q\x00.", b"\x80\x02]q\x00a."],
    ids=["empty", "text", "cut off", "another pickle", "nonsense"],
)
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "official.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"official\.pth is no"):
        read_checkpoint(path)


def test_a_checkpoint_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "official.pth"
    torch.save(STATE, path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match="damaged or cut off; fetch it again"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("held", "message"),
    [
        (torch.ones(2), "holds a Tensor, expected names and tensors"),
        ({"model": 3}, "holds a int as its weights"),
        ({"epoch": 3}, "holds a int under epoch"),
    ],
)
def test_a_file_without_named_tensors_is_refused(tmp_path: Path, held: object, message: str) -> None:
    path = tmp_path / "official.pth"
    torch.save(held, path)
    with pytest.raises(ValueError, match=message):
        read_checkpoint(path)


def test_what_is_called_safetensors_must_be_one(tmp_path: Path) -> None:
    path = tmp_path / "official.safetensors"
    torch.save(STATE, path)
    with pytest.raises(ValueError, match="is no safetensors file"):
        read_checkpoint(path)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.pth"):
        read_checkpoint(tmp_path / "absent.pth")
