"""``collegium calibrate``: the number a route's policy needs, found on an outcome table."""

from __future__ import annotations

import json
from pathlib import Path

import click

from routers.base import RouterError
from routers.cli_options import TABLE_OPTION, models_option, settings_option

__all__ = ["calibrate_command"]


@click.command("calibrate", short_help="Fit a policy to a budget, a share or a coverage.")
@click.argument("kind", metavar="POLICY", type=click.Choice(["budget", "threshold", "top_p"]))
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
    """
    from evals.calibrate import calibrate
    from evals.decisions import shared_pool
    from evals.policy_files import make_policy, policy_yaml
    from routers.outcomes import OutcomeTable
    from routers.params import parse_settings
    from routers.registry import load_router

    try:
        policy = make_policy({"type": kind, **parse_settings(settings)}, name="--set")
        router = load_router(artefact)
        table = OutcomeTable.load(table_path)
        pool = shared_pool({artefact.name: router}, table, models)
        found = calibrate(policy, router, table, split=split, candidates=pool)
        text = policy_yaml(found.policy)
        if out:
            out.write_text(text, encoding="utf-8")
        else:
            click.echo(text, nl=False)
    except (RouterError, OSError) as exc:
        raise click.UsageError(str(exc)) from exc
    score = found.score
    facts = [
        f"{score.n} prompts of split {split!r}: score {score.mean:.3f} "
        f"({score.low:.3f} to {score.high:.3f}), mean cost {found.cost:.4g} {found.cost_unit}",
        "shares: " + json.dumps({name: round(share, 3) for name, share in found.shares.items()}),
    ]
    if found.coverage is not None:
        facts.append(
            f"experts per prompt {found.experts_asked:.2f}; best answer of them "
            f"{found.coverage:.3f}"
        )
    for fact in facts:
        click.echo(fact, err=True)
