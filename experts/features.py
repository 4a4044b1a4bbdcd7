"""What a request needs an expert to be able to do. Knows cards and requests only."""

from __future__ import annotations

from experts.base import AnyRequest
from experts.errors import UnsupportedFeatureError
from experts.types import Capability, ChatRequest, ExpertCard

__all__ = ["check_features", "has_images", "required_features"]

_IMAGE_PARTS = frozenset({"image", "image_url", "input_image"})


def required_features(request: AnyRequest) -> dict[Capability, str]:
    """Capabilities the request needs, each with the field that asks for it."""
    needed: dict[Capability, str] = {}
    extra = request.model_extra or {}
    shape = extra.get("structured_outputs")
    if "guided_choice" in extra:
        needed["choice"] = "guided_choice"
    elif isinstance(shape, dict) and "choice" in shape:
        needed["choice"] = "structured_outputs"
    if not isinstance(request, ChatRequest):
        needed["completion"] = "prompt"
        if request.logprobs is not None:
            needed["logprobs"] = "logprobs"
        return needed
    needed["chat"] = "messages"
    if request.tools and request.tool_choice != "none":
        needed["tools"] = "tools"
    if request.logprobs:
        needed["logprobs"] = "logprobs"
    if request.response_format is not None and request.response_format.type != "text":
        needed["json_schema"] = "response_format"
    if has_images(request):
        needed["images"] = "messages"
    return needed


def has_images(request: ChatRequest) -> bool:
    """Whether any message carries an image."""
    return any(
        part.type in _IMAGE_PARTS
        for message in request.messages
        if isinstance(message.content, list)
        for part in message.content
    )


def check_features(card: ExpertCard, request: AnyRequest) -> None:
    """Return if the card has all capabilities the request needs.

    Raises:
        UnsupportedFeatureError: It lacks one; ``param`` names the field.
    """
    for capability, param in required_features(request).items():
        if capability not in card.capabilities:
            raise UnsupportedFeatureError(card.name, capability, param)
