import json
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.bundle import MANIFEST, Manifest, open_bundle, write_manifest
from service.errors import BundleError
from tests.service.tiny_bundle import CARD, GOLDEN, NAME, PROGRAM, WEIGHTS, reseal

FILES = [PROGRAM, GOLDEN, WEIGHTS, CARD]


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def read_fields(folder: Path) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
    return fields


def test_an_untouched_bundle_opens(tiny_bundle: Path) -> None:
    bundle = open_bundle(tiny_bundle)
    assert bundle.manifest.name == NAME
    assert set(bundle.manifest.files) == set(FILES)


def test_the_checksum_of_the_manifest_stands_for_the_whole_bundle(bundle_copy: Path) -> None:
    before = open_bundle(bundle_copy).sha256
    (bundle_copy / WEIGHTS).write_bytes(b"other weights")
    reseal(bundle_copy)
    assert open_bundle(bundle_copy).sha256 != before


@pytest.mark.parametrize("name", FILES)
def test_a_changed_byte_is_refused_with_the_file_named(bundle_copy: Path, name: str) -> None:
    flip_a_byte(bundle_copy / name)
    with pytest.raises(BundleError, match=rf"{name} has sha256 .* expected"):
        open_bundle(bundle_copy)


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_a_missing_file_is_refused_with_the_file_named(bundle_copy: Path, name: str) -> None:
    (bundle_copy / name).unlink()
    with pytest.raises(BundleError, match=rf"{name} cannot be read"):
        open_bundle(bundle_copy)


@pytest.mark.parametrize("name", FILES)
def test_a_folder_in_the_place_of_a_file_is_refused(bundle_copy: Path, name: str) -> None:
    (bundle_copy / name).unlink()
    (bundle_copy / name).mkdir()
    with pytest.raises(BundleError, match=rf"{name} cannot be read"):
        open_bundle(bundle_copy)


@pytest.mark.parametrize("name", ["extra.so", ".hidden", "__pycache__/x.pyc"])
def test_an_extra_file_is_refused_with_the_file_named(bundle_copy: Path, name: str) -> None:
    path = bundle_copy / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"")
    with pytest.raises(BundleError, match=name.partition("/")[0].replace(".", r"\.")):
        open_bundle(bundle_copy)


def test_no_byte_of_the_manifest_can_be_cut_off(bundle_copy: Path) -> None:
    path = bundle_copy / MANIFEST
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(BundleError, match=MANIFEST):
        open_bundle(bundle_copy)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[]", b"null", b'{"name": '])
def test_a_manifest_that_is_none_is_refused(bundle_copy: Path, content: bytes) -> None:
    (bundle_copy / MANIFEST).write_bytes(content)
    with pytest.raises(BundleError, match=MANIFEST):
        open_bundle(bundle_copy)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("a_field_of_tomorrow", 1),
        ("format_version", 2),
        ("format_version", "1"),
        ("name", "../escape"),
        ("name", "Upper-Case"),
        ("version", "1.0"),
        ("max_batch", 0),
        ("max_body_bytes", 0),
        ("programs", {}),
        ("inputs", []),
        ("outputs", []),
        ("length_buckets", [8, 4]),
        ("length_buckets", [4, 4]),
        ("long_length", 8),
        ("programs", {"onnx": PROGRAM, "sequence_parallel": WEIGHTS}),
        ("golden", {"file": GOLDEN, "atol": 0, "rtol": 0, "max_share_off": 1.0}),
        ("golden", {"file": GOLDEN, "atol": 0, "rtol": 0, "atol_by_output": {"logits": -0.1}}),
        ("golden", {"file": GOLDEN, "atol": 0, "rtol": 0, "max_share_off": -0.1}),
        ("normalisation", {"mean": [], "std": []}),
        ("normalisation", {"mean": [0.5], "std": [0.0]}),
        ("normalisation", {"mean": [0.5, 0.5], "std": [1.0]}),
    ],
)
def test_a_field_that_does_not_fit_is_refused_with_its_name(bundle_copy: Path, field: str, value: object) -> None:
    reseal(bundle_copy, **{field: value})
    with pytest.raises(BundleError, match=rf"(?s){MANIFEST}.*{field}"):
        open_bundle(bundle_copy)


@pytest.mark.parametrize("field", [name for name, field in Manifest.model_fields.items() if field.is_required()])
def test_a_field_that_is_missing_is_refused_with_its_name(bundle_copy: Path, field: str) -> None:
    fields = read_fields(bundle_copy)
    del fields[field]
    (bundle_copy / MANIFEST).write_text(json.dumps(fields))
    with pytest.raises(BundleError, match=rf"(?s){MANIFEST}.*{field}"):
        open_bundle(bundle_copy)


def test_an_unknown_field_deep_inside_is_refused(bundle_copy: Path) -> None:
    golden = read_fields(bundle_copy)["golden"]
    reseal(bundle_copy, golden=golden | {"trust_me": True})
    with pytest.raises(BundleError, match="trust_me"):
        open_bundle(bundle_copy)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "sub/file", "..", ".", "", "a\0b", MANIFEST])
def test_a_file_outside_the_folder_is_refused(bundle_copy: Path, name: str) -> None:
    (bundle_copy.parent / "outside").write_bytes(b"")
    reseal(bundle_copy, files=read_fields(bundle_copy)["files"] | {name: "0" * 64})
    with pytest.raises(BundleError, match=MANIFEST if name not in {"..", ".", "", "a\0b"} else str(bundle_copy)):
        open_bundle(bundle_copy)


@pytest.mark.parametrize(
    "facts", [{"programs": {"onnx": "other.onnx"}}, {"golden": {"file": "../golden.npz", "atol": 0, "rtol": 0}}]
)
def test_a_file_that_is_used_must_have_a_checksum(bundle_copy: Path, facts: dict[str, Any]) -> None:
    reseal(bundle_copy, **facts)
    with pytest.raises(BundleError, match="files has no checksum of"):
        open_bundle(bundle_copy)


# Golden arrays


def test_golden_arrays_carry_the_program_s_names(tiny_bundle: Path) -> None:
    inputs, outputs = open_bundle(tiny_bundle).read_golden()
    assert (list(inputs), list(outputs)) == (["image"], ["logits", "clusters"])
    assert inputs["image"].dtype == np.uint8


@pytest.mark.parametrize("name", ["input.image", "output.logits", "output.clusters"])
def test_a_golden_array_that_is_missing_is_refused_with_its_name(bundle_copy: Path, name: str) -> None:
    with np.load(bundle_copy / GOLDEN) as file:
        arrays = dict(file)
    del arrays[name]
    np.savez(bundle_copy / GOLDEN, **arrays)
    reseal(bundle_copy)
    with pytest.raises(BundleError, match=rf"{GOLDEN}.*{name}"):
        open_bundle(bundle_copy).read_golden()


class Bomb:
    """Ends the tests if it is ever unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('a pickle was loaded')",))


def write_objects(path: Path) -> None:
    objects = np.array([Bomb(), None], dtype=object)
    np.savez(path, **{"input.image": objects, "output.logits": objects, "output.clusters": objects})


def write_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps({"input.image": Bomb()}))


def write_single_array(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.zeros(3))


def write_cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def write_damaged(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:200] + b"\xff" * 100 + content[300:])


def write_text_member(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        for name in ("input.image", "output.logits", "output.clusters"):
            file.writestr(name, "not an array")


def write_nothing(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize(
    "write",
    [write_objects, write_pickle, write_single_array, write_cut_off, write_damaged, write_text_member, write_nothing],
)
def test_a_golden_file_that_is_no_plain_npz_is_refused_with_its_name(bundle_copy: Path, write: Any) -> None:
    write(bundle_copy / GOLDEN)
    reseal(bundle_copy)
    bundle = open_bundle(bundle_copy)
    with pytest.raises(BundleError, match=GOLDEN):
        bundle.read_golden()


def test_a_manifest_reads_back_as_it_was_written(tiny_bundle: Path, tmp_path: Path) -> None:
    manifest = open_bundle(tiny_bundle).manifest
    folder = shutil.copytree(tiny_bundle, tmp_path / NAME)
    write_manifest(folder, manifest)
    assert open_bundle(folder).manifest == manifest


def test_a_copy_elsewhere_is_the_same_bundle(tiny_bundle: Path, tmp_path: Path) -> None:
    assert open_bundle(shutil.copytree(tiny_bundle, tmp_path / "b")).sha256 == open_bundle(tiny_bundle).sha256
