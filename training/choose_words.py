"""Choose how much the word model weighs: `python -m training.choose_words NAME FOLDER`.

Tries a grid of weights and bonuses on the validation split with the weights in FOLDER, a finished run or a bundle, and
prints the best; they go into the recipe. The test split is not read.
"""

import argparse
import itertools
import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file

from models import BUILDERS
from models.checkpoints import HASH_PLANES, SAME_NAMES, load_official
from training.error_rate import ErrorCount, count_errors
from training.handover import read_start
from training.recipes import RECIPES
from training.speech_recognition import SpeechRecognition, WordModel

WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)
BONUSES = (0.0, 1.0, 2.0, 3.0)
BEAM_WIDTHS = (8,)
NUM_SHOWN = 12


def main() -> None:
    """Parse the command line, try, print."""
    parser = argparse.ArgumentParser(prog="python -m training.choose_words", description=__doc__)
    speech = [name for name, recipe in RECIPES.items() if isinstance(recipe.problem, SpeechRecognition)]
    parser.add_argument("name", choices=sorted(speech))
    parser.add_argument("folder", type=Path, help="finished run or bundle with the weights")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the data sets")
    arguments = parser.parse_args()
    recipe = RECIPES[arguments.name]
    problem = recipe.problem
    assert isinstance(problem, SpeechRecognition)
    model = BUILDERS[recipe.model](num_classes=len(problem.labels)).eval()
    load_official(model, load_file(read_start(arguments.folder).weights), SAME_NAMES, kept=HASH_PLANES)
    found = try_words(problem, model, arguments.data)
    for rate, words in found[:NUM_SHOWN]:
        print(json.dumps({"word_error_rate": round(rate, 4), **vars(words)}))


def try_words(problem: SpeechRecognition, model: torch.nn.Module, data: Path) -> list[tuple[float, WordModel]]:
    """Measure the validation split with every setting of the grid.

    Returns: word error rate and setting, the best first; of equal rates the earlier in the grid.
    """
    examples = problem.read(data, "valid")
    log_probs = problem.recognise(model, examples)
    results = []
    for width, is_closed, weight, bonus in itertools.product(BEAM_WIDTHS, (True, False), WEIGHTS, BONUSES):
        words = WordModel(weight=weight, word_bonus=bonus, is_closed=is_closed, beam_width=width)
        spec = replace(problem, word_model=words).make_spec(data)
        count = ErrorCount()
        for row, text in enumerate(examples.texts):
            found = problem.find_text(log_probs[row], examples, row, spec, beam_width=None)
            count += count_errors(text.split(), found.split())
        results.append((count.rate, words))
    return sorted(results, key=lambda result: result[0])


if __name__ == "__main__":
    main()
