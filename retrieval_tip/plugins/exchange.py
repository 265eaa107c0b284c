"""Write answers for programs that read COCO's format, for FiftyOne and for Label Studio."""

from __future__ import annotations

from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import ClassVar
from urllib.parse import quote

from retrieval_tip.data import remote
from retrieval_tip.writers import Answered, Outcome, Wants, write_json

_answer = itemgetter("input", "label", "probability")


@dataclass(frozen=True)
class _PhotoList:
    """A JSON file about whole photos."""

    wants: ClassVar[Wants] = Wants(whole_photos=True)

    def check(self, out: Path | None) -> None:
        """Accept any file."""

    def write(self, answers: Answered, out: Path | None) -> Outcome:
        """Write the document."""
        write_json(lambda: self.document(answers), out)
        return Outcome()

    def document(self, answers: Answered) -> object:
        """Return the value to write as JSON."""
        raise NotImplementedError


class Coco(_PhotoList):
    """A COCO data set for classification."""

    def document(self, answers: Answered) -> dict[str, object]:
        """Return a data set in which each annotation has a ``category_id`` and a ``score``, but no box.

        The categories are the classes of the index, in order, from 1. A photo without a label has no annotation.
        """
        numbers = {name: number for number, name in enumerate(answers.labels, 1)}
        images: list[object] = []
        annotations: list[object] = []
        for number, (path, label, probability) in enumerate(map(_answer, answers.rows), 1):
            images.append({"id": number, "file_name": remote.absolute(path)})
            if label is not None:
                annotation = {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": numbers[label],
                    "score": probability,
                }
                annotations.append(annotation)
        categories = [{"id": number, "name": name} for name, number in numbers.items()]
        return {"images": images, "annotations": annotations, "categories": categories}


class FiftyOne(_PhotoList):
    """The ``labels.json`` of a ``FiftyOneImageClassificationDataset``."""

    def document(self, answers: Answered) -> dict[str, object]:
        """Return the labels, whose keys are absolute paths."""
        labels: dict[str, object] = {}
        for path, label, probability in map(_answer, answers.rows):
            given = None if label is None else {"label": label, "confidence": probability}
            labels[remote.absolute(path)] = given
        return {"classes": list(answers.labels), "labels": labels}


class LabelStudio(_PhotoList):
    """Label Studio tasks with predictions, as its JSON import expects them."""

    def document(self, answers: Answered) -> list[object]:
        """Return the tasks. Files are addressed below the document root ``/``.

        The labelling interface needs ``<Image name="image" value="$image"/>`` and ``<Choices name="label"
        toName="image">``.
        """
        from retrieval_tip.data.exchange import LOCAL

        tasks: list[object] = []
        for path, label, probability in map(_answer, answers.rows):
            choice = {
                "from_name": "label",
                "to_name": "image",
                "type": "choices",
                "value": {"choices": [label]},
            }
            prediction = {
                "model_version": "retrieval-tip",
                "score": probability,
                "result": [choice],
            }
            image = path
            if not remote.is_address(path):
                image = LOCAL + quote(remote.absolute(path).lstrip("/"))
            made = [] if label is None else [prediction]
            tasks.append({"data": {"image": image}, "predictions": made})
        return tasks
