from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from models import BUILDERS
from training.image_classification import ImageClassification
from training.recipes import RECIPES


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_listed_under_its_name_and_trains_a_model_that_exists(name: str) -> None:
    assert RECIPES[name].name == name
    assert RECIPES[name].model in BUILDERS


@pytest.mark.parametrize(
    "name", [name for name, recipe in RECIPES.items() if isinstance(recipe.problem, ImageClassification)]
)
def test_labels_are_the_names_that_the_data_set_gives_them(name: str, shared_file: Callable[[str], Path]) -> None:
    recipe = RECIPES[name]
    for file in (recipe.problem.train_file, recipe.problem.test_file):
        table = pq.read_table(shared_file(f"data/{file}"), columns=["label", "label_name"])
        pairs = set(zip(table["label"].to_pylist(), table["label_name"].to_pylist(), strict=True))
        assert sorted(pairs) == list(enumerate(recipe.problem.labels))
