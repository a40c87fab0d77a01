"""`Task`: everything that depends on what kind of answer a model gives."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from ...errors import ArgumentError
from ..batches import EncodedExamples
from ..data.examples import Example
from ..metrics import Scores
from ..paired_metrics import PairedMetric

if TYPE_CHECKING:
    from ..settings import Settings


class Task(ABC):
    """One kind of answer: how to load a model for it, to encode, train, score and write it down.

    Attributes:
        name: what files call the task.
        auto_class: name of transformers' class that loads a model for this task.
        accepted_model: what such a model is, for the error about one that is not.
        peft_type: PEFT's name of the task.
        outputs: how many outputs the new head has; None if the model gets no new head.
        generates: whether `--generate` applies.
        loss_axis: the unit of the loss, for the axis of a figure.
        metric_titles: the metrics, by their names in result.json, with their titles in tables.
        headline: what the first metric, by which runs are told apart, is called in a sentence.
        paired_metrics: by which runs are compared example by example, the default first; none if
            the task keeps no answers.
    """

    name: ClassVar[str]
    auto_class: ClassVar[str]
    accepted_model: ClassVar[str] = "a model that transformers can load"
    peft_type: ClassVar[str]
    generates: ClassVar[bool] = False
    loss_axis: ClassVar[str] = "cross-entropy, nats"
    metric_titles: ClassVar[Mapping[str, str]]
    headline: ClassVar[str]
    paired_metrics: ClassVar[Mapping[str, PairedMetric]] = {}

    @classmethod
    @abstractmethod
    def found_in(cls, examples: Sequence[Example], settings: "Settings") -> "Task | None":
        """The task, if this is what the examples are for.

        Raises:
            ArgumentError: it is, but the examples cannot be used for it.
        """

    @property
    @abstractmethod
    def outputs(self) -> int | None:
        """See the attributes above."""

    def check(self, settings: "Settings") -> None:
        """Reject settings that this task does not support.

        Raises:
            ArgumentError: one of them is set.
        """
        if settings.generate and not self.generates:
            raise ArgumentError("generate", settings.generate, "0 for text with labels or answers")

    def check_config(self, config) -> None:  # noqa: B027, most tasks have nothing to check
        """Reject a model that transformers would load but that cannot do the task.

        Raises:
            ValueError: the model, of which this is the config, cannot do it.
        """

    def configure(self, config) -> None:  # noqa: B027, most tasks have nothing to write
        """Write what the outputs mean into the config of a model that was loaded for the task."""

    @abstractmethod
    def encode(self, examples: Sequence[Example], tokenizer, max_length: int) -> EncodedExamples:
        """Token ids and labels of each example; no row has more than ``max_length`` tokens.

        Raises:
            ArgumentError: the examples or the tokenizer cannot be used.
        """

    def logits(self, output) -> Tensor:
        """The model's answer in float32, from what its forward pass returned."""
        return output.logits.float()

    @abstractmethod
    def loss(
        self, logits: Tensor, labels: Tensor, reduction: str = "mean", label_smoothing: float = 0.0
    ) -> Tensor:
        """The loss of a batch; with ``reduction="none"`` that of each row, or of each token."""

    @abstractmethod
    def prediction_rows(self, losses: Tensor, logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """What a prediction keeps of a batch: one row for each of the batch's rows.

        ``losses`` are those of ``reduction="none"``. `score` and `predictions` take these rows.
        """

    @abstractmethod
    def score(self, rows: Tensor, data: EncodedExamples) -> Scores:
        """The metrics of predictions on held-out examples, the headline first."""

    def answers(self, rows: Tensor, data: EncodedExamples) -> list[list[float]]:
        """What ``paired_metrics`` need of each example, as few numbers as will do."""
        return []

    @abstractmethod
    def predictions(self, rows: Tensor, data: EncodedExamples) -> list[list[object]]:
        """The table in predictions.csv: a header, then a line for each example."""
