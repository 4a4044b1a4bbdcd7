"""``collegium evaluate``: routers judged on an outcome table."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import get_args

import click

from evals.policy_files import read_policy
from orchestrator.costs import CostUnit
from orchestrator.policies import UtilityPolicy
from routers.base import Router, RouterError
from routers.cli_options import TABLE_OPTION, models_option, split_option

__all__ = ["evaluate_command"]

FILE = click.Path(dir_okay=False, path_type=Path)


@click.command("evaluate", short_help="Judge routers on an outcome table.")
@click.argument("artefacts", nargs=-1, required=True, metavar="ARTEFACT ...")
@TABLE_OPTION
@split_option("test", "Prompts to judge on")
@click.option(
    "--cost-quality",
    type=click.FloatRange(0, 1),
    help="0 takes the cheapest, 1 the best quality.  [default: the policy's own, else 1.0]",
)
@click.option(
    "--policy",
    "policy_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="YAML file with a route's 'policy', as 'collegium calibrate' writes it; quality less cost "
    "by default.",
)
@click.option(
    "--cost",
    type=click.Choice(get_args(CostUnit)),
    help="What costs are in the report, and to the policy unless --policy gives one; by default "
    "the policy's unit, else the first that is known.",
)
@models_option("Choose among")
@click.option("--json", "json_file", type=FILE, help="Write the report as JSON; - for stdout.")
@click.option("--quality", type=FILE, help="Write predictions: parquet prompt_id, model, quality.")
@click.option("--decisions", type=FILE, help="Write decisions: parquet prompt_id, model.")
@click.option("--markdown", "markdown_file", type=FILE, help="Write the report as Markdown.")
@click.option("--html", "html_file", type=FILE, help="Write the report as one HTML page.")
@click.option(
    "--card",
    type=FILE,
    help="Write the router's card as Markdown: data, with the table's README.md, method, metrics.",
)
def evaluate_command(
    artefacts: tuple[str, ...],
    table_path: Path,
    split: str,
    cost_quality: float | None,
    policy_file: Path | None,
    cost: CostUnit | None,
    models: list[str] | None,
    json_file: Path | None,
    quality: Path | None,
    decisions: Path | None,
    markdown_file: Path | None,
    html_file: Path | None,
    card: Path | None,
) -> None:
    """Judge routers on an outcome table, next to baselines and bounds.

    Decisions are made from prompts alone, frozen and hashed before a score of the split is read.
    With --quality and --decisions the table needs no outcomes.
    """
    from evals.card import as_card
    from evals.decisions import decide, shared_pool
    from evals.evaluate import judge
    from evals.html_report import as_html
    from evals.report import as_json, as_markdown, as_text, write_decisions, write_quality
    from routers.artefact import read_manifest, read_training_s
    from routers.outcomes import OutcomeTable

    if len(artefacts) > 1 and (quality or decisions or card):
        raise click.UsageError("--quality, --decisions and --card take one ARTEFACT at a time")
    try:
        table = OutcomeTable.load(table_path)
        routers = _load_all(artefacts)
        pool = shared_pool(routers, table, models)
        policy = read_policy(policy_file) if policy_file else UtilityPolicy(cost=cost)
        if policy.uncalibrated:
            raise RouterError(
                f"{policy_file}: the policy has no {policy.uncalibrated!r}; "
                "'collegium calibrate' finds it"
            )
        made = [
            replace(
                decide(
                    name,
                    router,
                    table,
                    split=split,
                    candidates=pool,
                    policy=policy,
                    cost_quality=cost_quality,
                ),
                training_s=read_training_s(path),
            )
            for path, (name, router) in zip(artefacts, routers.items(), strict=True)
        ]
        if quality:
            write_quality(made[0], quality)
        if decisions:
            write_decisions(made[0], decisions)
        for one in made:
            click.echo(f"decisions sha256  {one.sha256}  {one.name}", err=True)
        if not table.has_outcomes and (quality or decisions):
            click.echo(f"{table_path} has no outcomes.parquet: nothing to score", err=True)
            return
        evaluation = judge(made, table, split=split, cost=cost or policy.cost)
        report = json.dumps(as_json(evaluation), indent=1, ensure_ascii=False)
        if markdown_file:
            _write(markdown_file, as_markdown(evaluation))
        if html_file:
            _write(html_file, as_html(evaluation))
        if card:
            readme = table_path / "README.md"
            about = readme.read_text(encoding="utf-8") if readme.is_file() else ""
            _write(card, as_card(read_manifest(artefacts[0]), made[0], evaluation, about))
        if json_file and str(json_file) != "-":
            _write(json_file, report + "\n")
    except (RouterError, OSError) as exc:
        raise click.UsageError(str(exc)) from exc
    if json_file and str(json_file) == "-":
        click.echo(report)
        return
    click.echo(as_text(evaluation), nl=False)


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


def _load_all(artefacts: tuple[str, ...]) -> dict[str, Router]:
    """Routers by the name of their folder, with the whole path where two are called alike."""
    from routers.registry import load_router

    short = [Path(path).resolve().name for path in artefacts]
    both = zip(short, artefacts, strict=True)
    names = [name if short.count(name) == 1 else path for name, path in both]
    if len(set(names)) < len(names):
        raise RouterError(f"the artefact {names[0]} is given twice")
    return {name: load_router(path) for name, path in zip(names, artefacts, strict=True)}
