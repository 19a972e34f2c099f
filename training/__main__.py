"""Train a shipped model: `python -m training NAME`.

Leaves averaged weights, rounded to half precision, and `run.json`, with the quality measured with them, in the work
folder, from where `python -m export` makes a bundle. A run that was interrupted goes on when the command is repeated.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from models import BUILDERS
from training.handover import RUN, WEIGHTS, describe_run, read_start
from training.loop import CHECKPOINT, log, train
from training.recipe import Recipe
from training.recipes import RECIPES


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    parser.add_argument("name", choices=sorted(RECIPES))
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the data sets")
    parser.add_argument("--work", type=Path, default=Path("build/training"), help="folder for checkpoints and logs")
    parser.add_argument(
        "--from", dest="start", type=Path, help="bundle or finished run whose weights the run starts from"
    )
    parser.add_argument(
        "--device",
        type=torch.device,
        default=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        help="where to train; a GPU if there is one",
    )
    parser.add_argument(
        "--measure",
        action="store_true",
        help="train nothing: measure the finished run again, and hand it over as the recipe is now",
    )
    arguments = parser.parse_args()
    recipe = RECIPES[arguments.name]
    work: Path = arguments.work / recipe.name
    if arguments.measure:
        measure_again(recipe, data=arguments.data, work=work, device=arguments.device)
        return
    start = read_start(arguments.start) if arguments.start else None
    model, seconds = train(
        recipe,
        data=arguments.data,
        work=work,
        device=arguments.device,
        start_weights=start.weights if start else None,
    )
    round_to_half(model.cpu())  # on a GPU, convolutions would round further, to TF32
    quality = measure(recipe, model, data=arguments.data)
    save_half(model, work / WEIGHTS)
    minutes = seconds / 60
    run = describe_run(recipe, quality, data=arguments.data, minutes=minutes, device=arguments.device, start=start)
    hand_over(run, work)
    (work / CHECKPOINT).unlink()  # the run is over; the same command makes a new one


def measure(recipe: Recipe, model: nn.Module, *, data: Path) -> dict[str, dict[str, float]]:
    """Measure finished weights: split → metric → value."""
    return {split: recipe.problem.evaluate(model, data, split) for split in ("valid", "test_dev")}


def measure_again(recipe: Recipe, *, data: Path, work: Path, device: torch.device) -> None:
    """Measure the weights of a finished run, and describe them by the recipe as it is now.

    How they were made stays as it was told then.

    Raises: FileNotFoundError if there is no finished run.
    """
    origin = json.loads((work / RUN).read_text())["origin"]
    model = BUILDERS[recipe.model](num_classes=len(recipe.problem.labels))
    model.load_state_dict({name: weight.float() for name, weight in load_file(work / WEIGHTS).items()})
    quality = measure(recipe, model.eval(), data=data)
    hand_over(describe_run(recipe, quality, data=data, minutes=0.0, device=device) | {"origin": origin}, work)


def hand_over(run: dict[str, Any], work: Path) -> None:
    """Write and print what `python -m export` reads."""
    (work / RUN).write_text(json.dumps(run, indent=2) + "\n")
    log(work, {"quality": run["quality"]})
    print(json.dumps(run["quality"], indent=2))


def round_to_half(model: nn.Module) -> None:
    """Round all weights to what float16 can hold: files are half as large and exact, and quality is measured after.

    Raises: ValueError naming a weight that is beyond the range of float16.
    """
    for name, weight in model.state_dict().items():
        if weight.is_floating_point():
            weight.copy_(weight.half())
            if not weight.isfinite().all():
                raise ValueError(f"{name} has values beyond 65504, the largest of float16; it cannot be shipped so")


def save_half(model: nn.Module, path: Path) -> None:
    """Write the weights of a model that was rounded, floating-point ones as float16."""
    state = {
        name: (weight.half() if weight.is_floating_point() else weight).contiguous().cpu()
        for name, weight in model.state_dict().items()
    }
    save_file(state, path)


if __name__ == "__main__":
    main()
