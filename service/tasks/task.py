"""The task: all that the service knows about one kind of input and its answer.

A task is pure: no I/O, no state, no program. Any number of threads may use it at once.
"""

from typing import Any, Protocol, TypeVar

from pydantic import BaseModel, Field

from service.errors import NotAcceptable
from service.sample import Arrays, Sample


class TaskResult(BaseModel):
    """What every answer says; a task's `Result` adds its own fields."""

    model: str = Field(description="Name of the model that answered.", examples=["paca-vit-micro-cifar10"])
    version: str = Field(description="Version of that model.", examples=["1.0.0"])


SpecT = TypeVar("SpecT", bound=BaseModel)
OptionsT = TypeVar("OptionsT", bound=BaseModel)
ResultT = TypeVar("ResultT", bound=TaskResult)


class Task(Protocol[SpecT, OptionsT, ResultT]):
    """Bytes → `Sample`, output arrays → `Result`.

    Attributes:
        name: what it is called, also in URLs: `image-classification`.
        media_types: what `decode` reads, in lower case and without parameters.
        Spec: what a manifest must say for this task.
        Options: what one request may ask for.
        Result: what one response contains.
        drawing: what `draw` shows, in a sentence; "" for a task that draws nothing and inherits both methods for it.
    """

    name: str
    media_types: frozenset[str]
    Spec: type[SpecT]
    Options: type[OptionsT]
    Result: type[ResultT]
    drawing: str = ""

    def check_options(self, options: OptionsT, spec: SpecT) -> None:
        """Check of the options what only the spec can tell; runs before any work on the body.

        Raises: InvalidInput.
        """

    def check_drawing(self, options: OptionsT, spec: SpecT) -> None:  # noqa: ARG002
        """Refuse to draw where these options give nothing to draw; runs after `check_options`, before any work.

        Raises: NotAcceptable.
        """
        raise _draws_nothing(self.name)

    def outputs(self, options: OptionsT, spec: SpecT) -> tuple[str, ...]:
        """Name the program's outputs that `postprocess` and `draw` need for these options."""

    def decode(self, body: bytes, media_type: str, spec: SpecT) -> Sample:
        """Turn a body into the program's inputs.

        Raises: InvalidInput, and nothing else, whatever the bytes are.
        """

    def postprocess(
        self, outputs: Arrays, sample: Sample, spec: SpecT, options: OptionsT, *, model: str, version: str
    ) -> ResultT:
        """Turn one sample's outputs into the answer.

        Args:
            outputs: those that `outputs` named, without batch dimension. If the sample was padded, so are they: where
                its own part ends follows from `sample.length`.
            sample: what `decode` returned.
            spec, options: those that `decode` and `check_options` were given.
            model, version: what the answer says about its origin.
        Raises: ModelFailed if the outputs mean nothing.
        """

    def draw(self, outputs: Arrays, sample: Sample, spec: SpecT, options: OptionsT) -> bytes:  # noqa: ARG002
        """Draw one sample's outputs as a PNG made to be looked at, in the place of `postprocess`.

        Args:
            outputs, sample, spec, options: as in `postprocess`; `check_drawing` took the options.
        Raises: ModelFailed if the outputs mean nothing.
        """
        raise _draws_nothing(self.name)


def _draws_nothing(task: str) -> NotAcceptable:
    return NotAcceptable(
        f"a picture is asked for; {task} answers with JSON only; accept application/json or leave Accept out"
    )


# A task whatever its classes are, as the registry and the endpoints hold it.
AnyTask = Task[Any, Any, Any]
