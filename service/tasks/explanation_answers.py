"""What an answer says about the clusters that explain it, in JSON, with pictures in it."""

from collections.abc import Sequence

from pydantic import BaseModel, Field

from service.tasks.embedded_picture import EmbeddedPicture, embed
from service.tasks.explanation_pictures import Canvas, draw_heat, draw_regions
from service.tasks.explanations import NUM_SHOWN, Finding, TokenRegions

_WEIGHT_DECIMALS = 6


class ExplainedCluster(BaseModel):
    """A cluster that mattered for the answer."""

    index: int = Field(description="Of the cluster among those of its stage.", examples=[17])
    label: str | None = Field(
        default=None, description="Of a mask, the class that the cluster mattered for.", examples=["road"]
    )
    weight: float = Field(
        description="Share of the stage's evidence for the class that this cluster gathers; all clusters together "
        "have 1.",
        examples=[0.062],
    )
    heat_map: EmbeddedPicture = Field(description="Where that evidence lies, drawn over the picture as sent.")


class ExplainedStage(BaseModel):
    """One stage of the model: `clusters` of a model that gathers patches, or `tokens` of one that merges them."""

    stage: int = Field(description="Number of the stage, from 1.", examples=[1])
    grid: tuple[int, int] = Field(description="Rows and columns of the patches, or of the cells of tokens.")
    clusters: list[ExplainedCluster] | None = Field(
        default=None,
        description=f"At most {NUM_SHOWN} clusters, those with the most weight, the heaviest first; of a mask the "
        "heaviest one for each of its largest classes.",
    )
    tokens: list[float] | None = Field(
        default=None,
        description="Of each token its weight: the share that it covers of the cells that show the picture.",
        examples=[[0.25]],
    )
    regions: EmbeddedPicture | None = Field(
        default=None, description="The tokens' regions drawn over the picture as sent, with `tokens`."
    )


class Explanation(BaseModel):
    """Which clusters mattered for an answer."""

    label: str = Field(description="The class that is explained, the most probable one.", examples=["cat"])
    stages: list[ExplainedStage] = Field(description="The stages with clusters, finest first.")


class MaskExplanation(BaseModel):
    """Which clusters mattered for a mask."""

    stages: list[ExplainedStage] = Field(description="The stages with clusters, finest first.")


def describe_clusters(canvas: Canvas, findings: Sequence[Finding]) -> list[ExplainedStage]:
    """Put into an answer what was found, drawn over the picture."""
    return [_describe(canvas, found) for found in findings]


def _describe(canvas: Canvas, found: Finding) -> ExplainedStage:
    if isinstance(found, TokenRegions):
        return ExplainedStage(
            stage=found.stage,
            grid=found.grid,
            tokens=found.weights.round(_WEIGHT_DECIMALS).tolist(),
            regions=embed(draw_regions(canvas, found)),
        )
    clusters = [
        ExplainedCluster(
            index=one.number,
            label=one.label,
            weight=round(one.weight, _WEIGHT_DECIMALS),
            heat_map=embed(draw_heat(canvas, one.heat)),
        )
        for one in found.clusters
    ]
    return ExplainedStage(stage=found.stage, grid=found.grid, clusters=clusters)
