"""Where a method of model MoErging stands: the axes of the survey (arXiv:2408.07057), as data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

__all__ = ["AXES", "Taxonomy"]


@dataclass(frozen=True, slots=True)
class Taxonomy:
    """A method's place.

    Attributes:
        training: Whether experts are trained as anybody would, or for the method.
        data: Whether experts' training data stay private, or whoever trains the router needs them.
        routing_data: What the router learns from: samples of the experts' domains, of the target
            task, others, or nothing.
        granularity: What is routed: a whole task, an example, or each step of the model.
        depth: Whether one decision holds for the whole model, or each module has its own.
        selection: Whether few experts are used, or all.
        aggregation: What of several experts is put together: outputs, parameters, or nothing.
        generalisation: Whether the method is made for tasks that have an expert (``in``), for
            others (``out``), or for both.
        user_data: Whether whoever asks has to bring examples.
    """

    training: Literal["standard", "custom"] = "standard"
    data: Literal["private", "shared"] = "private"
    routing_data: Literal["expert", "target", "general", "none"] = "none"
    granularity: Literal["task", "example", "step"] = "example"
    depth: Literal["model", "module"] = "model"
    selection: Literal["sparse", "dense"] = "sparse"
    aggregation: Literal["outputs", "parameters", "none"] = "none"
    generalisation: Literal["in", "out", "both"] = "both"
    user_data: Literal["zero-shot", "few-shot"] = "zero-shot"


AXES = tuple(asdict(Taxonomy()))
"""Names of the axes, in the survey's order."""
