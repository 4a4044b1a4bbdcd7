"""``collegium library table`` and ``evaluate``: a library's adapters measured, methods compared."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import click

from experts.cli import parse_setting
from experts.library.cli import BASE, DEVICE, FOLDER, library_command, only_base, user_errors

__all__ = ["library_command"]

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@library_command.command("build", short_help="Train an adapter for each cluster of a corpus.")
@FOLDER
@click.option(
    "--data", required=True, type=_FILE, help='JSONL file of {"prompt", "answer"} objects.'
)
@click.option("--base", required=True, help="Chat model: path, hub name or package:NAME/FILE.")
@click.option(
    "--cluster", "n_clusters", required=True, type=click.IntRange(min=1), metavar="K",
    help="Number of clusters, and of adapters.",
)  # fmt: skip
@click.option("--encoder", default="minilm-l2-int8", show_default=True, help="What is clustered.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the clusters.")
@click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE",
    help="A hyper-parameter, as in 'collegium train adapter'.",
)  # fmt: skip
def build_command(
    folder: Path,
    data: Path,
    base: str,
    n_clusters: int,
    encoder: str,
    seed: int,
    settings: Sequence[str],
) -> None:
    """Cluster the prompts of a corpus and train one adapter on each cluster.

    Goes on where it was interrupted. The adapters are not tested: 'collegium library check' does.
    """
    with user_errors():
        from evals.moerging.build import build_library
        from routers.base import RouterError

        try:
            made = build_library(
                folder, data, n_clusters, {"base": base, **dict(map(parse_setting, settings))},
                encoder=encoder, seed=seed, progress=lambda line: click.echo(line, err=True),
            )  # fmt: skip
        except RouterError as error:
            raise click.UsageError(str(error)) from error
        click.echo(f"{folder}: {len(made.experts)} experts", err=True)


@library_command.command("table", short_help="Measure adapters on each other's samples.")
@FOLDER
@BASE
@click.option(
    "--general", type=_FILE,
    help='JSONL file of {"prompt", "answer"} objects that the base is for.',
)  # fmt: skip
@click.option("--limit", type=click.IntRange(min=1), help="Samples per domain.")
@click.option(
    "--base-name", default="base", show_default=True,
    help="What the base is called in the config that the table's router is for; "
    "'collegium library evaluate' knows it as base.",
)  # fmt: skip
@click.option(
    "--out", required=True, type=click.Path(file_okay=False, path_type=Path),
    help="Folder for the outcome table.",
)  # fmt: skip
@DEVICE
def table_command(
    folder: Path,
    base: str | None,
    general: Path | None,
    limit: int | None,
    base_name: str,
    out: Path,
    device: str,
) -> None:
    """Write an outcome table: how likely each adapter, and the base, find each sample's answer.

    Any router is trained on it, such as 'collegium train centroids'. Scores are geometric means of
    the probabilities of the answer's tokens.
    """
    with user_errors():
        from evals.moerging.table import library_table
        from experts.finetune_data import read_pairs
        from experts.library.examiner import Examiner
        from experts.library.manifest import Library

        library = Library(folder)
        base = only_base(library, base)
        chosen = library.adapters(base, with_samples=True)
        samples = {
            name: read_pairs(library.path(one.samples or ""))[0][:limit]
            for name, one in chosen.items()
        }
        if general is not None:
            samples["general"] = read_pairs(general)[0][:limit]
        adapters = {name: library.path(one.path) for name, one in chosen.items()}
        examiner = Examiner(base, adapters, device=device)
        made = library_table(
            examiner, [*adapters], samples, base_name=base_name,
            progress=lambda domain: click.echo(f"samples of {domain}", err=True),
        )  # fmt: skip
        made.write(out)
        click.echo(f"{out}: {len(made.prompts)} prompts, {len(made.models)} models", err=True)


@library_command.command("evaluate", short_help="Compare methods that use a library.")
@FOLDER
@BASE
@click.option(
    "--questions", "questions_file", required=True, type=_FILE,
    help='JSONL file of {"prompt", "answer", "domain"} objects; a domain that is no adapter\'s '
    "name is out of domain.",
)  # fmt: skip
@click.option(
    "--examples", "examples_file", type=_FILE,
    help="Further such objects, a few of each domain, for methods that ask for examples.",
)  # fmt: skip
@click.option(
    "--table", "table_path", type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="What 'collegium library table' wrote, for methods with a router.",
)  # fmt: skip
@click.option(
    "--gates", multiple=True, metavar="METHOD=FOLDER",
    help="What 'collegium library gates' wrote; several of one method are its seeds.",
)  # fmt: skip
@click.option(
    "--reference", "references", multiple=True, metavar="NAME=FOLDER",
    help="What to compare with: ties and dare, multitask (an adapter), multitask-moe (a mixture), "
    "upcycled (a checkpoint); several of one name are its seeds.",
)  # fmt: skip
@click.option(
    "--method", "names", multiple=True,
    help="Only this method; may be given several times.  [default: all that can be run]",
)  # fmt: skip
@click.option("--seeds", type=click.IntRange(min=1), default=3, show_default=True)
@click.option(
    "--out", required=True, type=click.Path(path_type=Path),
    help="Write OUT.md, OUT.json and OUT.svg; OUT_answers.jsonl is read and added to.",
)  # fmt: skip
@DEVICE
def evaluate_command(
    folder: Path,
    base: str | None,
    questions_file: Path,
    examples_file: Path | None,
    table_path: Path | None,
    gates: Sequence[str],
    references: Sequence[str],
    names: Sequence[str],
    seeds: int,
    out: Path,
    device: str,
) -> None:
    """Compare methods on questions in domain and out of it, beside each one's place in the survey.

    Loss is per token of the right answer; right is what greedy decoding writes exactly. What is in
    OUT_answers.jsonl of the same questions, adapters, table and folders is not measured again.
    """
    with user_errors():
        from tqdm import tqdm

        from evals.moerging.measure import Journal, measure
        from evals.moerging.methods import bases_own, methods
        from evals.moerging.report import as_json, as_markdown, picture
        from evals.moerging.setting import Question, Setting, read_questions
        from experts.library.manifest import Library
        from routers.outcomes import OutcomeTable

        library = Library(folder)
        examples: dict[str, list[Question]] = defaultdict(list)
        for question in read_questions(examples_file) if examples_file else ():
            examples[question.domain].append(question)
        setting = Setting(
            library=library,
            base=only_base(library, base),
            questions=read_questions(questions_file),
            examples=examples,
            table=OutcomeTable.load(table_path) if table_path else None,
            gates=_named(gates, "--gates"),
            references=_named(references, "--reference"),
            device=device,
        )
        # A table that does not fit shows before anything is measured.
        leaves = bases_own(setting) if setting.table is not None else None
        chosen = methods(setting, list(names) or None)
        journal = Journal(out.with_name(f"{out.name}_answers.jsonl"), setting)
        made = {method.name: journal.read(method) for method in methods(setting, None)}
        for method in chosen:
            done = {one.seed for one in made[method.name]}
            for seed in method.seeds(setting, seeds):
                if seed in done:
                    continue
                with tqdm(total=len(setting.questions), desc=f"{method.name} {seed}") as bar:
                    found = measure(setting, method, seed, on_question=bar.update)
                made[method.name].append(found)
                journal.add(method, found)
        if not made["base"]:
            raise click.UsageError("--method base: others are compared with it; measure it first")
        kept = {name: rows for name, rows in made.items() if rows}
        lines = as_json(kept, setting.questions, [*setting.adapters], leaves)
        drawn = picture(lines)
        about = (
            f"{len(setting.adapters)} adapters of `{setting.base}`, {len(setting.questions)} "
            f"questions of {len(setting.by_domain)} domains. Loss per answer token, in nats, and "
            "share of exactly right answers; 95% intervals of the bootstrap over questions, each "
            "the mean of all seeds. Each question takes one call of the model, whatever the "
            f"method; the base reads one with its answer in {made['base'][0].reading_ms:.0f} ms."
        )
        if leaves is not None:
            known = [question.domain in setting.adapters for question in setting.questions]
            left = sum(leaf for leaf, inside in zip(leaves, known, strict=True) if inside)
            about += (
                f" With exit, the router `centroids` leaves {left} of {sum(known)} questions in "
                f"domain to the base, and {sum(leaves) - left} of {len(known) - sum(known)} others."
            )
        if drawn is not None:
            about += f"\n\n![Loss in domain and out of it]({out.name}.svg)"
            out.with_suffix(".svg").write_text(drawn, encoding="utf-8")
        text = as_markdown(lines, "A library of adapters, and methods that use it", about)
        out.with_suffix(".md").write_text(text, encoding="utf-8")
        out.with_suffix(".json").write_text(json.dumps(lines, indent=1) + "\n", encoding="utf-8")
        click.echo(text, nl=False)


def _named(texts: Sequence[str], option: str) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = defaultdict(list)
    for text in texts:
        name, separator, path = text.partition("=")
        if not separator or not Path(path).is_dir():
            raise click.UsageError(
                f"{option} takes NAME=FOLDER of a folder that exists, not {text!r}"
            )
        found[name].append(Path(path))
    return dict(found)
