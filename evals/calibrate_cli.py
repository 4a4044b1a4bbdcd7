"""``collegium calibrate``: the number a route's policy needs, found on an outcome table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from routers.base import RouterError
from routers.cli_options import TABLE_OPTION, models_option, settings_option

if TYPE_CHECKING:
    from evals.metrics import Estimate

__all__ = ["calibrate_command"]


@click.command(
    "calibrate", short_help="Fit a policy or a cascade to a budget, a share or a coverage."
)
@click.argument(
    "kind", metavar="POLICY", type=click.Choice(["budget", "threshold", "top_p", "cascade"])
)
@click.argument("artefact", type=click.Path(path_type=Path))
@TABLE_OPTION
@click.option(
    "--split",
    default="validation",
    show_default=True,
    help="Prompts to calibrate on, best such as the router has not learnt from.",
)
@settings_option("A setting of the policy")
@models_option("Choose among")
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the policy as YAML; shown on the terminal otherwise.",
)
def calibrate_command(
    kind: str,
    artefact: Path,
    table_path: Path,
    split: str,
    settings: tuple[str, ...],
    models: list[str] | None,
    out: Path | None,
) -> None:
    """Find the number that POLICY needs with ARTEFACT's predictions; write YAML for a route.

    \b
    budget     --set max_mean_cost=0.002 [--set cost=usd|active_params_b|latency_s]
    threshold  --set weak=NAME --set strong=NAME --set strong_share=0.3
    top_p      --set coverage=0.9 [--set max_experts=3]
    cascade    --set max_mean_cost=0.002 [--set mode=cascade] [--set max_answers=3]
               [--set signal=logprob|margin|verify|judge] [--set judge=NAME]

    `cascade` writes a policy and a strategy, from a table with confidences. Before its second
    expert has outcomes, a cascade of two can be found with stand-ins: --set mode=cascade
    --set 'order=["medium", "big"]' --set 'stand_ins=["small", "medium"]' --set charge=0.05.
    """
    from evals.calibrate import calibrate
    from evals.calibrate_cascade import calibrate_cascade, make_goal
    from evals.decisions import shared_pool
    from evals.policy_files import make_policy, policy_yaml
    from routers.outcomes import OutcomeTable
    from routers.params import parse_settings
    from routers.registry import load_router

    try:
        fields = parse_settings(settings)
        goal = make_goal(fields) if kind == "cascade" else None
        policy = None if goal else make_policy({"type": kind, **fields}, name="--set")
        router = load_router(artefact)
        table = OutcomeTable.load(table_path)
        pool = shared_pool({artefact.name: router}, table, models)
        if goal is not None:
            made = calibrate_cascade(goal, router, table, split=split, candidates=pool)
            _write(made.yaml, out)
            if made.score is not None:
                click.echo(
                    f"{_measured(made.score, split, made.cost, made.cost_unit)}\n"
                    f"experts per prompt {made.answers:.2f}",
                    err=True,
                )
            return
        assert policy is not None
        found = calibrate(policy, router, table, split=split, candidates=pool)
        _write(policy_yaml(found.policy), out)
    except (RouterError, OSError) as exc:
        raise click.UsageError(str(exc)) from exc
    facts = [
        _measured(found.score, split, found.cost, found.cost_unit),
        "shares: " + json.dumps({name: round(share, 3) for name, share in found.shares.items()}),
    ]
    if found.coverage is not None:
        facts.append(
            f"experts per prompt {found.experts_asked:.2f}; best answer of them "
            f"{found.coverage:.3f}"
        )
    for fact in facts:
        click.echo(fact, err=True)


def _write(text: str, out: Path | None) -> None:
    if out:
        out.write_text(text, encoding="utf-8")
    else:
        click.echo(text, nl=False)


def _measured(score: Estimate, split: str, cost: float, unit: str) -> str:
    return (
        f"{score.n} prompts of split {split!r}: score {score.mean:.3f} "
        f"({score.low:.3f} to {score.high:.3f}), mean cost {cost:.4g} {unit}"
    )
