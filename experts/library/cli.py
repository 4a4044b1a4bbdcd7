"""``collegium library``: what lies in a library, and what may come into it."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click
from pydantic import ValidationError

from experts.adapter_files import weights_hash
from experts.cli import parse_setting
from experts.errors import ExpertConfigError
from experts.library.admission import FORGIVABLE, Candidate, Finding, examine, examine_files
from experts.library.manifest import Library, LibraryExpert, Provenance

if TYPE_CHECKING:
    from experts.library.merging import Merging

__all__ = ["BASE", "DEVICE", "FOLDER", "library_command", "only_base", "user_errors"]

FOLDER = click.option(
    "--library", "folder", required=True, type=click.Path(file_okay=False, path_type=Path),
    help="The library's folder.",
)  # fmt: skip
BASE = click.option("--base", help="Whose experts; by default the library's only base model.")
DEVICE = click.option(
    "--device", default="cpu", help="Where adapters are tried out, such as cuda:0."
)
_TOKENS = click.option(
    "--trigger-tokens", type=click.IntRange(min=0), metavar="N",
    help="Tokens that are tried as a hidden trigger, drawn at random; 0 skips it.  [default: all]",
)  # fmt: skip
# Extras that bring a package, where it is not the one that brings torch.
_EXTRAS = {"nevergrad": "eval"}
_FILES = ("adapter_config.json", "adapter_model.safetensors", "training.json")


@click.group("library", short_help="Keep adapters that others made, and test them first.")
def library_command() -> None:
    """A library lists adapters per base model, with samples of their domains and their source."""


@library_command.command("add", short_help="Test an adapter and take it in.")
@click.argument("adapter", type=click.Path(exists=True, file_okay=False, path_type=Path))
@FOLDER
@click.option("--name", help="What users put in 'model'; by default the folder's name.")
@click.option("--base", help="Its base model; by default that of the library's first expert.")
@click.option(
    "--samples", type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help='JSONL file of {"prompt", "answer"} objects of its domain.',
)  # fmt: skip
@click.option("--description", default="", help="What it is good at, in a sentence.")
@click.option("--source", default="", help="Who made it.")
@click.option("--licence", default="", help="Under which terms it may be used.")
@click.option("--trained-on", default="", help="What it was trained on.")
@click.option(
    "--accept", multiple=True, type=click.Choice(FORGIVABLE),
    help="Take it in although this test fails, which is noted; may be given several times.",
)  # fmt: skip
@_TOKENS
@DEVICE
def add_command(
    adapter: Path,
    folder: Path,
    name: str | None,
    base: str | None,
    samples: Path | None,
    description: str,
    source: str,
    licence: str,
    trained_on: str,
    accept: Sequence[str],
    trigger_tokens: int | None,
    device: str,
) -> None:
    """Test ADAPTER, a folder in PEFT's format, and copy it into a library.

    \b
    files    safetensors alone, finite numbers, plain LoRA
    base     made for this base model, in all its shapes
    weights  no copy of an adapter that is there
    harm     the base can still answer questions of no domain
    trigger  no words are found that make it answer unrelated questions alike
    gain     its samples are likelier with it than without
    answers  no adapter that is there answers its samples as it does
    """
    with user_errors():
        name = name or adapter.resolve().name
        library = Library.at(folder)
        known = library.bases()
        if base is None and not known:
            raise click.UsageError("--base: name the model that the first adapter was made for")
        origin = Provenance(
            source=source, licence=licence, trained_on=trained_on,
            added=datetime.now(UTC).date(), sha256=weights_hash(adapter),
        )  # fmt: skip
        expert = LibraryExpert.model_validate(
            {"name": name, "base": base or known[0], "path": "-", "description": description,
             "provenance": origin}
        )  # fmt: skip
        library.check_free(name)
        candidate = Candidate(name, adapter, expert.base, samples)
        others = {
            other.name: library.path(other.path)
            for other in library.of(expert.base)
            if other.kind == "adapter"
        }
        numbers: dict[str, Any] = {}
        refused = []
        for found in examine(
            candidate, others, device=device, n_tokens=trigger_tokens, accept=accept
        ):
            taken = found.passed or found.test in accept
            click.echo(f"{_word(found.passed, taken)} {found.test:8} {found.message}", err=True)
            numbers |= found.numbers
            if not taken:
                refused.append(found.test)
            if not found.passed and taken:
                numbers.setdefault("accepted", []).append(found.test)
        if refused:
            tests = " and ".join(refused)
            raise click.ClickException(f"{name} stays out of {folder}: refused by {tests}")
        admitted = expert.model_copy(update={"admission": numbers})
        library.take_in(admitted, lambda target: _copy(adapter, target), samples)
        click.echo(f"{folder}: {name} is in, with {len(library.experts) - 1} others", err=True)


def _word(passed: bool, taken: bool) -> str:
    if passed:
        return "passed  "
    return "accepted" if taken else "refused "


def _copy(adapter: Path, target: Path) -> None:
    for name in _FILES:
        if (adapter / name).is_file():
            shutil.copyfile(adapter / name, target / name)


@library_command.command("remove", short_help="Take an expert out.")
@click.argument("name")
@FOLDER
def remove_command(name: str, folder: Path) -> None:
    """Take the expert NAME off the list, and its files out of the library's folder."""
    with user_errors():
        Library(folder).remove(name)
        click.echo(f"{folder}: {name} is out", err=True)


@library_command.command("list", short_help="Show what is in a library.")
@FOLDER
@click.option("--json", "as_json", is_flag=True, help="Everything that is known, as JSON.")
def list_command(folder: Path, as_json: bool) -> None:
    """Show a library's experts, by base model."""
    with user_errors():
        library = Library(folder)
        if as_json:
            listed = [expert.model_dump(mode="json") for expert in library.experts.values()]
            click.echo(json.dumps(listed, indent=1, ensure_ascii=False))
            return
        for base in library.bases():
            click.echo(base)
            for expert in library.of(base):
                gain = expert.admission.get("gain_nats")
                figure = "" if gain is None else f"{gain:+.2f} nats"
                click.echo(f"  {expert.name:20} {figure:>11}  {expert.description}".rstrip())


@library_command.command("check", short_help="Test what is in a library again.")
@FOLDER
@_TOKENS
@DEVICE
@click.option("--files", "files_only", is_flag=True, help="Look at files alone, and run no model.")
def check_command(folder: Path, trigger_tokens: int | None, device: str, files_only: bool) -> None:
    """Test all adapters of a library again, and whether they are still those that came in.

    Each is compared with those that stand before it. Exits with 1 if one fails a test that was not
    accepted when it came.
    """
    with user_errors():
        library = Library(folder)
        earlier: dict[str, dict[str, Path]] = {}
        failed = 0
        for expert in library.experts.values():
            if expert.kind == "model":
                continue
            accepted = expert.admission.get("accepted", [])
            others = earlier.setdefault(expert.base, {})
            try:
                path = library.path(expert.path)
                samples = None if expert.samples is None else library.path(expert.samples)
            except ExpertConfigError as error:
                findings = [Finding("files", False, str(error))]
            else:
                candidate = Candidate(expert.name, path, expert.base, samples)
                findings = list(
                    examine_files(candidate, others)
                    if files_only
                    else examine(
                        candidate, others, device=device, n_tokens=trigger_tokens, accept=accepted
                    )
                )
                if expert.provenance.sha256 not in ("", weights_hash(path)):
                    why = "its weights or settings are not those that came in; remove and add it"
                    findings.append(Finding("sha256", False, why))
                if findings[0].passed:
                    others[expert.name] = path
            bad = [found for found in findings if not found.passed and found.test not in accepted]
            for found in bad:
                click.echo(f"{expert.name}: {found.test}: {found.message}")
            failed += bool(bad)
        total = len(library.experts)
        click.echo(f"{folder}: {total} experts, {failed} with a failed test", err=True)
        if failed:
            raise click.exceptions.Exit(1)


@library_command.command("gates", short_help="Learn which tokens each adapter is for.")
@FOLDER
@BASE
@click.option(
    "--method", required=True, type=click.Choice(["phatgoose", "average", "ridge"]),
    help="What is learnt; see below.",
)  # fmt: skip
@click.option(
    "--out", required=True, type=click.Path(file_okay=False, path_type=Path),
    help="Folder for the gates; vectors that it holds already are kept.",
)  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True, help="Of phatgoose's training.")
@DEVICE
def gates_command(
    folder: Path, base: str | None, method: str, out: Path, seed: int, device: str
) -> None:
    """Learn gates for token routers from the samples of a library's adapters.

    \b
    phatgoose  a vector per adapter and layer, trained to let the adapter in where that helps
    average    the mean of what each layer reads in each adapter's samples
    ridge      a ridge regression of the domain per block of layers
    """
    with user_errors():
        from experts.library.gates import make_gates

        library = Library(folder)
        make_gates(
            library, only_base(library, base), method, out, seed=seed, device=device,
            progress=lambda line: click.echo(line, err=True),
        )  # fmt: skip
        click.echo(f"{out}: gates of {method}; name the folder under 'token_routers'", err=True)


@library_command.command("merge", short_help="Make one adapter of several.")
@click.argument("names", nargs=-1, metavar="[NAME ...]")
@FOLDER
@BASE
@click.option(
    "--method", required=True,
    type=click.Choice(["cat", "linear", "ties", "dare_linear", "dare_ties", "lorahub"]),
    help="How they are merged; see below.",
)  # fmt: skip
@click.option(
    "--examples", type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help='JSONL file of a few {"prompt", "answer"} objects that the merge is to make likely: '
    "lorahub chooses weights by them, others the size of the whole.",
)  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True, help="Of what is drawn or tried.")
@click.option(
    "--out", required=True, type=click.Path(file_okay=False, path_type=Path),
    help="Folder for the adapter, in PEFT's format.",
)  # fmt: skip
@DEVICE
def merge_command(
    names: Sequence[str],
    folder: Path,
    base: str | None,
    method: str,
    examples: Path | None,
    seed: int,
    out: Path,
    device: str,
) -> None:
    """Merge the adapters NAME, or all, with equal weights, or weights found by examples.

    \b
    cat          averages their updates
    linear       averages their matrices; the rank is that of the largest
    ties         averages, of the largest fifth of the updates' numbers, those that agree in sign
    dare_linear  drops half of the updates' numbers at random and averages the others, doubled
    dare_ties    drops half at random, then averages those that agree in sign
    lorahub      searches weights of matrices that make the examples likely

    But for linear and lorahub, the rank is that of all together. Of many adapters ties and
    dare_ties make updates nearly as large as their sum, which is too much where domains have little
    in common: give examples of all of them.
    """
    with user_errors():
        from experts.adapter_files import fuse, write_updates
        from experts.finetune_data import read_pairs
        from experts.library.examiner import Examiner
        from experts.library.merging import best_scale, lorahub_weights, merge_adapters, scaled

        library = Library(folder)
        base = only_base(library, base)
        known = library.adapters(base)
        for name in names:
            if name not in known:
                listed = ", ".join(map(repr, known))
                raise click.UsageError(f"{folder} has no adapter {name!r}; it has {listed}")
        folders = {name: library.path(known[name].path) for name in names or known}
        if method == "lorahub" and examples is None:
            raise click.UsageError("lorahub needs --examples: it searches weights for them")
        if method != "lorahub":
            updates = merge_adapters(folders, cast("Merging", method), seed=seed)
            times = ""
            if examples is not None:
                with tempfile.TemporaryDirectory() as whole:
                    write_updates(Path(whole), updates, base)
                    examiner = Examiner(base, {"merge": Path(whole)}, device=device)
                scale = best_scale(examiner, "merge", examiner.read(read_pairs(examples)[0]))
                updates, times = scaled(updates, scale), f", times {scale:g}"
            write_updates(out, updates, base)
            click.echo(f"{out}: {method} of {', '.join(folders)}{times}", err=True)
            return
        assert examples is not None
        examiner = Examiner(base, folders, device=device)
        pairs = examiner.read(read_pairs(examples)[0])
        weights = lorahub_weights(
            examiner, [*folders], pairs, seed=seed,
            on_step=lambda step, loss: click.echo(f"{step}: {loss:.3f}", err=True),
        )  # fmt: skip
        write_updates(out, fuse(folders, weights), base)
        listed = ", ".join(f"{name} {weight:.3f}" for name, weight in weights.items())
        click.echo(f"{out}: {listed}", err=True)


@library_command.command("upcycle", short_help="Make one mixture of experts of fine-tunes.")
@FOLDER
@BASE
@click.option(
    "--top-k", type=click.IntRange(min=1), default=1, show_default=True,
    help="Experts that a token goes through in a layer.",
)  # fmt: skip
@click.option(
    "--out", required=True, type=click.Path(file_okay=False, path_type=Path),
    help="Folder for the checkpoint.",
)  # fmt: skip
def upcycle_command(folder: Path, base: str | None, top_k: int, out: Path) -> None:
    """Write a Mixtral checkpoint whose experts are the MLPs of a library's fine-tunes.

    Takes the whole models of the library that have samples; if it has none, its adapters, each
    merged into the base. Routers are solved from the samples, without training.
    """
    with user_errors():
        from functools import partial

        from transformers import AutoTokenizer

        from experts.finetune_data import read_pairs
        from experts.library.upcycling import dense, upcycle
        from experts.weights import resolve_model

        library = Library(folder)
        base = only_base(library, base)
        known = [one for one in library.of(base) if one.samples is not None]
        chosen = [one for one in known if one.kind == "model"] or known
        if len(chosen) < 2:
            raise click.UsageError(
                f"{folder} has {len(chosen)} fine-tunes of {base} with samples; a mixture takes two"
            )
        load = {
            one.name: partial(dense, str(library.path(one.path)), None)
            if one.kind == "model"
            else partial(dense, base, library.path(one.path))
            for one in chosen
        }
        samples = {one.name: read_pairs(library.path(one.samples or ""))[0] for one in chosen}
        tokenizer = AutoTokenizer.from_pretrained(str(resolve_model(base)))
        upcycle(load, tokenizer, samples, out, top_k=top_k)
        click.echo(f"{out}: {len(chosen)} experts, {top_k} per token", err=True)


@library_command.command("mixture", short_help="Train a mixture of experts on shared data.")
@click.option(
    "--data", required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help='JSONL file of {"prompt", "answer"} objects of all domains.',
)  # fmt: skip
@click.option("--base", required=True, help="Chat model: path, hub name or package:NAME/FILE.")
@click.option("--experts", "n_experts", required=True, type=click.IntRange(min=2), metavar="N")
@click.option(
    "--top-k", type=click.IntRange(min=2), default=2, show_default=True,
    help="Experts that a token goes through in a block of layers. With one, gates learn nothing.",
)  # fmt: skip
@click.option(
    "--out", required=True, type=click.Path(file_okay=False, path_type=Path),
    help="Folder for adapters and gates; a training interrupted there goes on.",
)  # fmt: skip
@click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE",
    help="A hyper-parameter, as in 'collegium train adapter'.",
)  # fmt: skip
def mixture_command(
    data: Path, base: str, n_experts: int, top_k: int, out: Path, settings: Sequence[str]
) -> None:
    """Train low-rank experts and their gates together, where all data may be seen in one place.

    What recycling adapters has to be compared with: 'collegium library evaluate --reference
    multitask-moe=FOLDER'.
    """
    with user_errors():
        from experts.finetune_config import AdapterTrainingConfig
        from experts.library.multitask import train_mixture

        config = AdapterTrainingConfig.model_validate(
            {"data": data, "base": base, **dict(map(parse_setting, settings))}
        )
        made = train_mixture(config, n_experts, top_k, out)
        click.echo(
            f"{out}: {n_experts} experts, {made.pairs} pairs, loss {made.final_loss:.3f}, "
            f"{made.seconds:.0f} s",
            err=True,
        )


def only_base(library: Library, base: str | None) -> str:
    """The base model that was named, or the library's only one.

    Raises:
        UsageError: It has several, or another.
    """
    known = library.bases()
    if base is None and len(known) != 1:
        listed = ", ".join(known) or "none"
        raise click.UsageError(f"--base: choose one of {library.folder}'s base models: {listed}")
    if base is not None and base not in known:
        raise click.UsageError(f"--base: {library.folder} has no adapter of {base!r}")
    return base or known[0]


@contextmanager
def user_errors() -> Iterator[None]:
    """Show what a user can mend as one line."""
    try:
        yield
    except ValidationError as error:
        first = error.errors()[0]
        raise click.UsageError(f"--{first['loc'][0]}: {first['msg']}") from error
    except ExpertConfigError as error:
        raise click.UsageError(str(error)) from error
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get(str(error.name), "torch")
        raise click.UsageError(
            f"this needs {error.name}: pip install 'collegium[{extra}]'"
        ) from error
