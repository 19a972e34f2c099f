from dataclasses import replace
from pathlib import Path

import torch

from service.bundle import Conversion
from training.handover import Start, describe_run
from training.recipe import Recipe


def test_a_run_that_starts_from_converted_weights_names_their_file(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "weights.safetensors").write_bytes(b"weights stand here")
    fields = dict.fromkeys(Conversion.model_fields, "none")
    conversion = Conversion(**fields | {"file": "official.pth", "sha256": "abc123", "command": "convert it"})
    start = Start(folder=tmp_path, name="paca-official", version="1.0.0", origin=conversion)
    device = torch.device("cpu")
    run = describe_run(replace(recipe, seed=4), {}, data=tmp_path, minutes=1.0, device=device, start=start)
    told = run["origin"]["recipe"]
    assert "Started from paca-official 1.0.0" in told
    assert "made by `convert it`: converted from official.pth (SHA-256 abc123), which others trained" in told
