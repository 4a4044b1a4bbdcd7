"""The experts of a latent collaboration, as configs name them."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["MemberConfig"]


class MemberConfig(BaseModel):
    """One expert that writes and is listened to."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:-]{0,127}$")
    """What users put in ``model``."""
    model: str = Field(min_length=1)
    """A path, a Hugging Face name, or ``package:NAME/FILE``."""
    adapter: str | None = None
    """A LoRA adapter to merge into its weights: a folder in PEFT format, or
    ``package:NAME/FOLDER``."""
    description: str = ""
    """What it is good at, in a sentence."""
