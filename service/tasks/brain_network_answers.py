"""What brain-network classification answers, in JSON."""

from pydantic import BaseModel, ConfigDict, Field

from service.tasks.connectome_formats import Kind
from service.tasks.embedded_picture import EmbeddedPicture
from service.tasks.task import TaskResult

RESEARCH_NOTICE = "For research use only: not a medical device, and no basis for decisions about a person's health."


class Communities(BaseModel):
    """One level of the hierarchy that the model found in this connectome."""

    level: int = Field(description="From 1, the finest.", examples=[2])
    num_communities: int = Field(
        description="How many communities the level has room for; some may be without regions.", examples=[4]
    )
    assignment: list[int] = Field(
        description="The community of each region, from 0, in the order of the manifest's `regions`. Regions that are "
        "together in a level are together in all that follow.",
        examples=[[0, 0, 3, 1]],
    )
    weights: list[list[float]] | None = Field(
        default=None,
        description="For each region the share of each community, multiplied through the levels; if `weights` was "
        "asked for. A region's shares sum to 1, or to less where the model keeps its strongest communities only.",
    )


class Quality(BaseModel):
    """What the service saw; to be looked at before the answer is believed."""

    source: Kind = Field(description="What was sent.", examples=["time_series"])
    matrix: str = Field(description="What the model was given, as its manifest says.", examples=["binary_graph"])
    num_frames: int | None = Field(default=None, description="Of a time series.", examples=[195])
    mean_absolute_correlation: float | None = Field(
        default=None, description="Over all pairs of regions; absent where a graph was sent.", examples=[0.23]
    )
    density: float | None = Field(
        default=None, description="Share of all pairs of regions that are edges, of graphs.", examples=[0.2]
    )
    weakest_edge: float | None = Field(
        default=None, description="Lowest correlation that became an edge of a graph.", examples=[0.41]
    )


class BrainNetworkClassificationResult(TaskResult):
    """The class of one connectome, and the communities that the model found in it. For research use only."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "model": "thc-aal116-abide",
                    "version": "1.0.0",
                    "label": "control",
                    "probabilities": {"control": 0.71, "autism": 0.29},
                    "communities": [
                        {"level": 1, "num_communities": 3, "assignment": [2, 2, 0, 1]},
                        {"level": 2, "num_communities": 2, "assignment": [1, 1, 0, 1]},
                    ],
                    "quality": {"source": "connectivity", "matrix": "binary_graph", "density": 0.2},
                    "notice": RESEARCH_NOTICE,
                }
            ]
        }
    )

    label: str = Field(description="The most probable class.", examples=["control"])
    probabilities: dict[str, float] = Field(
        description="Each class and its probability; together they have 1. A model's probabilities are no risks: its "
        "manifest and card say how often it is right.",
        examples=[{"control": 0.71, "autism": 0.29}],
    )
    communities: list[Communities] = Field(description="Each level, the finest first; empty if the model forms none.")
    quality: Quality = Field(description="What the service saw.")
    notice: str = Field(description="What the answer must not be used for.", examples=[RESEARCH_NOTICE])
    picture: EmbeddedPicture | None = Field(default=None, description="If `explain` is `communities`.")
