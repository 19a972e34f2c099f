from pathlib import Path

import pytest

from service.errors import SettingError, Unauthorized
from service.keys import SHORTEST_KEY, ApiKeys

ALICE, BOB = "alice-0123456789abcdef0123", "b0b.~+/=0123456789abcdef0123"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text(f"# who may\n\n  {ALICE}  \n{BOB}\n")
    return path


@pytest.mark.parametrize("header", [f"Bearer {ALICE}", f"bearer {BOB}", f"BEARER  {ALICE} "])
def test_every_key_of_the_file_is_let_in(path: Path, header: str) -> None:
    ApiKeys(path).check(header)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("", "no key came"),
        (ALICE, "no key came"),
        ("Bearer", "no key came"),
        (f"Basic {ALICE}", "no key came"),
        (f"Bearer {ALICE[:-1]}", "unknown"),
        (f"Bearer {ALICE}x", "unknown"),
        (f"Bearer {ALICE.upper()}", "unknown"),
        ("Bearer # who may", "unknown"),
        ("Bearer é", "unknown"),
    ],
)
def test_everybody_else_is_kept_out(path: Path, header: str, message: str) -> None:
    with pytest.raises(Unauthorized, match=message) as caught:
        ApiKeys(path).check(header)
    assert ALICE not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no key"),
        ("# nothing\n\n", "holds no key"),
        (f"{ALICE}\n{'x' * (SHORTEST_KEY - 1)}\n", "line 2 of .* is no key; 24 or more"),
        (f"{ALICE} # hers\n", "line 1 of .* is no key"),
        (f"{ALICE}é\n", "line 1 of .* is no key"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_without_telling_keys(path: Path, text: str, message: str) -> None:
    path.write_text(text)
    with pytest.raises(SettingError, match=f"SERVICE_API_KEYS_FILE: .*{message}") as caught:
        ApiKeys(path)
    assert ALICE not in str(caught.value)


@pytest.mark.parametrize("name", ["absent", "."])
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(SettingError, match="cannot be read"):
        ApiKeys(tmp_path / name)


def test_keys_change_when_the_file_is_read_again(path: Path) -> None:
    keys = ApiKeys(path)
    path.write_text(BOB)
    keys.check(f"Bearer {ALICE}")
    keys.reread()
    keys.check(f"Bearer {BOB}")
    with pytest.raises(Unauthorized):
        keys.check(f"Bearer {ALICE}")


def test_a_file_that_became_unusable_changes_nothing(path: Path) -> None:
    keys = ApiKeys(path)
    path.write_text("")
    with pytest.raises(SettingError):
        keys.reread()
    keys.check(f"Bearer {ALICE}")


def test_no_key_is_kept_as_text(path: Path) -> None:
    assert ALICE not in repr(vars(ApiKeys(path)))
