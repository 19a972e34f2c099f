"""Whether the clusters that explain an answer are those that carry it, and what explaining costs.

For each picture, the region of a stage's heaviest cluster is blanked with the mean colour, and so are random regions
of as many cells of the same grid. If the explanation tells the truth, the first lowers the answer's score more.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, stdev

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from export.pictures import PHOTOS, SAMPLES
from service.bundle import Manifest, open_bundle
from service.runtimes.onnx import open_onnx
from service.runtimes.runtime import Runtime
from service.sample import Arrays, Sample
from service.tasks.explanations import ClusteredStage, ExplanationSpec, Numbers, PatchClusters, find_clusters
from service.tasks.image_classification import (
    IMAGE_CLASSIFICATION,
    ImageClassificationOptions,
    ImageClassificationSpec,
)
from service.tasks.pictures import decode_picture

TEST_FILE = Path("../shared/data/image_classification/cifar10_test_dev.parquet")
SEED = 0
REGION_SHARE = 0.5  # of a heat map is in the region: the fewest cells that hold it
BATCH = 64
WAYS = ("predictions only", "explained, JSON", "explained, picture")

Mask = npt.NDArray[np.bool_]
Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class Drops:
    """How far the score of the predicted class falls in one stage.

    Attributes:
        stage: its number.
        cells: share of the picture that a region covers, of each picture.
        top: fall after blanking the heaviest cluster's region, of each picture.
        random: the same after blanking random cells, as many; mean over the draws.
    """

    stage: int
    cells: tuple[float, ...]
    top: tuple[float, ...]
    random: tuple[float, ...]

    @property
    def standard_error(self) -> float:
        """Of the mean difference between both falls, over the pictures."""
        differences = [top - random for top, random in zip(self.top, self.random, strict=True)]
        return stdev(differences) / math.sqrt(len(differences))

    @property
    def share_won(self) -> float:
        """Share of the pictures where the heaviest cluster's region matters more than random ones do."""
        return mean(1.0 if top > random else 0.0 for top, random in zip(self.top, self.random, strict=True))


@dataclass(frozen=True, kw_only=True)
class ExplanationFinding:
    """What was measured.

    Attributes:
        num_draws: random regions for each picture and stage.
        drops: of each stage.
        cpu_seconds: way of answering → of one answer, over photos and rounds.
    """

    num_draws: int
    drops: list[Drops]
    cpu_seconds: dict[str, list[float]]


def measure_explanations(folder: Path, *, num_pictures: int, num_draws: int, rounds: int) -> ExplanationFinding:
    """Blank regions of pictures of test_dev, chosen by a fixed seed, and time answers to the sample photos.

    Args:
        folder: bundle of a classifier with patch clusters.
        num_pictures: at most as many as test_dev has.
        num_draws: random regions for each picture and stage.
        rounds: of the timing.
    Raises: ValueError if the bundle tells no patch clusters; FileNotFoundError if the data set is not there.
    """
    manifest = open_bundle(folder).manifest
    spec = ImageClassificationSpec.model_validate(manifest.spec)
    explanation = spec.explanation
    if explanation is None or explanation.kind != "patch_clusters":
        raise ValueError(f"{folder} tells no patch clusters; export it again, or name a bundle of PaCa-ViT")
    table = pq.read_table(TEST_FILE, columns=["image"])
    rng = np.random.default_rng(SEED)
    rows = rng.choice(len(table), num_pictures, replace=False)
    pictures = np.stack([decode_picture(table["image"][int(row)].as_py(), spec) for row in rows])
    colour = np.round(255 * np.array(manifest.normalisation.mean))
    runtime = open_onnx(folder / manifest.programs["onnx"], device="cpu")
    drops = [
        measure_drops(runtime, pictures, explanation, stage, colour.astype(np.uint8), num_draws=num_draws, rng=rng)
        for stage in explanation.stages
    ]
    cpu_seconds = _time_answers(runtime, spec, manifest, rounds)
    runtime.close()
    return ExplanationFinding(num_draws=num_draws, drops=drops, cpu_seconds=cpu_seconds)


def measure_drops(
    runtime: Runtime,
    pictures: Pixels,
    explanation: ExplanationSpec,
    stage: ClusteredStage,
    colour: Pixels,
    *,
    num_draws: int,
    rng: np.random.Generator,
) -> Drops:
    """Blank the heaviest cluster's region of each picture, and random ones.

    Args:
        runtime: runs the classifier.
        pictures: (B, Y, X, 3).
        explanation: of the classifier.
        stage: one of it.
        colour: (3,), what is put into a region.
        num_draws: random regions for each picture.
        rng: draws them.
    """
    cells, top, random = [], [], []
    for picture in pictures:
        outputs = {
            name: rows[0]
            for name, rows in runtime.run({"image": picture[np.newaxis]}, ["logits", *explanation.outputs]).items()
        }
        target = int(outputs["logits"].argmax())
        region = find_region(_heaviest(outputs, explanation, stage, target))
        masks = [region, *(draw_cells(region, rng) for _ in range(num_draws))]
        blanked = [picture, *(blank(picture, mask, colour) for mask in masks)]
        scores = _score(runtime, np.stack(blanked), target)
        cells.append(float(region.mean()))
        top.append(float(scores[0] - scores[1]))
        random.append(float(scores[0] - scores[2:].mean()))
    return Drops(stage=stage.stage, cells=tuple(cells), top=tuple(top), random=tuple(random))


def find_region(heat: Numbers) -> Mask:
    """The fewest cells that hold `REGION_SHARE` of the heat, of its shape; of equally hot ones the first."""
    order = np.argsort(-heat, axis=None, kind="stable")
    held = np.cumsum(heat.ravel()[order])
    num_cells = int(np.searchsorted(held, REGION_SHARE * held[-1])) + 1
    region = np.zeros(heat.size, np.bool_)
    region[order[:num_cells]] = True
    return region.reshape(heat.shape)


def draw_cells(region: Mask, rng: np.random.Generator) -> Mask:
    """As many cells of the same grid, drawn without replacement."""
    return rng.permutation(region.ravel()).reshape(region.shape)


def blank(picture: Pixels, region: Mask, colour: Pixels) -> Pixels:
    """Put a colour into the pixels (Y, X, 3) of a region's cells."""
    rows, columns = (
        np.arange(pixels) * cells // pixels for pixels, cells in zip(picture.shape[:2], region.shape, strict=True)
    )
    blanked = picture.copy()
    blanked[region[rows[:, None], columns]] = colour
    return blanked


def _heaviest(outputs: Arrays, explanation: ExplanationSpec, stage: ClusteredStage, target: int) -> Numbers:
    findings = find_clusters(outputs, explanation, target=target)
    found = next(one for one in findings if one.stage == stage.stage)
    assert isinstance(found, PatchClusters)
    return found.clusters[0].heat


def _score(runtime: Runtime, pictures: Pixels, target: int) -> Numbers:
    """Probability of a class in each picture."""
    parts = [
        runtime.run({"image": pictures[start : start + BATCH]}, ["logits"])["logits"]
        for start in range(0, len(pictures), BATCH)
    ]
    logits = np.concatenate(parts).astype(np.float64)
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    scores: Numbers = (weights / weights.sum(axis=1, keepdims=True))[:, target]
    return scores


def _time_answers(
    runtime: Runtime, spec: ImageClassificationSpec, manifest: Manifest, rounds: int
) -> dict[str, list[float]]:
    """Decode, run and answer in this process, the ways in turns."""
    bodies = [(SAMPLES / photo).read_bytes() for photo in PHOTOS]
    plain, explained = ImageClassificationOptions(), ImageClassificationOptions(explain="clusters")

    def prepare(body: bytes, options: ImageClassificationOptions) -> tuple[Arrays, Sample]:
        sample = IMAGE_CLASSIFICATION.decode(body, "", spec)
        inputs = {name: array[np.newaxis] for name, array in sample.inputs.items()}
        found = runtime.run(inputs, IMAGE_CLASSIFICATION.outputs(options, spec))
        return {name: rows[0] for name, rows in found.items()}, sample

    def answer(body: bytes, options: ImageClassificationOptions) -> None:
        outputs, sample = prepare(body, options)
        result = IMAGE_CLASSIFICATION.postprocess(
            outputs, sample, spec, options, model=manifest.name, version=manifest.version
        )
        result.model_dump_json(exclude_none=True)

    def draw(body: bytes) -> None:
        IMAGE_CLASSIFICATION.draw(*prepare(body, explained), spec, explained)

    ways: tuple[Callable[[bytes], None], ...] = (
        lambda body: answer(body, plain),
        lambda body: answer(body, explained),
        draw,
    )
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    for turn in range(rounds + 1):
        for body in bodies:
            for name, way in zip(WAYS, ways, strict=True):
                start = time.process_time()
                way(body)
                if turn:  # the first is not counted
                    seconds[name].append(time.process_time() - start)
    return seconds


def render_explanations(found: ExplanationFinding) -> str:
    """Render as Markdown."""
    lines = [
        f"{len(found.drops[0].top)} pictures of test_dev, {found.num_draws} random regions each.",
        "Fall of the predicted class's score, mean over the pictures; it wins where its fall is the larger one:",
        "",
        "| stage | picture blanked | heaviest cluster | random cells | ratio | difference | standard error | wins |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in found.drops:
        top, random = mean(one.top), mean(one.random)
        lines.append(
            f"| {one.stage} | {mean(one.cells):.1%} | {top:.4f} | {random:.4f} | {top / random:.2f} | "
            f"{top - random:.4f} | {one.standard_error:.4f} | {one.share_won:.1%} |"
        )
    base = median(found.cpu_seconds[WAYS[0]])
    lines += [
        "",
        f"Answers to the sample photos ({', '.join(PHOTOS)}), decoding included:",
        "",
        "| answer | CPU-ms, median | more than without |",
        "|---|---|---|",
    ]
    for name in WAYS:
        cost = median(found.cpu_seconds[name])
        lines.append(f"| {name} | {cost * 1e3:.1f} | {(cost - base) * 1e3:.1f} |")
    return "\n".join(lines)
