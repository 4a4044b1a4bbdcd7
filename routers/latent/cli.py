"""``collegium train latent``."""

from __future__ import annotations

from pathlib import Path

import click

from routers.cli_options import settings_option

__all__ = ["train_latent_command"]


@click.command("latent", short_help="Train experts to read each other's hidden states.")
@click.option(
    "--config",
    "config_path",
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="YAML file: members, data, and any other key below.",
)
@click.option(
    "--out",
    required=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for what is learnt; a training interrupted there goes on.",
)
@settings_option("A key that goes before the file's")
def train_latent_command(config_path: Path, out: Path, settings: tuple[str, ...]) -> None:
    """Train what frozen experts say to each other while one writes, and the router that leads them.

    Keys of the file, and for --set, as in --set max_steps=300 --set writer=general: members, data,
    validation, test, table, writer, active, n_stacks, width, n_heads, encoder, gates, peers,
    entropy, balance, correctness, learning_rate, gain_learning_rate, router_learning_rate,
    weight_decay, max_grad_norm, schedule, warmup, batch_size, accumulation, max_steps,
    evaluate_every, patience, max_tokens, precision, cache, seed, checkpoint_every, device.

    The folder gets latent.json and interactions.safetensors, held_out.jsonl with the loss of every
    held-out prompt before and after, test.jsonl with that of test prompts,
    and the router as an artefact in router/ if there is one.
    """
    from experts.errors import ExpertConfigError
    from routers.base import RouterError

    try:
        from routers.latent.config import read_config
        from routers.latent.training import train_latent

        manifest = train_latent(read_config(config_path, settings), out)
    except (RouterError, ExpertConfigError) as error:
        raise click.UsageError(str(error)) from error
    except ModuleNotFoundError as error:
        raise click.UsageError(
            f"training needs {error.name}: pip install 'collegium[torch]'"
        ) from error
    click.echo(
        f"{out}: {manifest.pairs} pairs, held-out loss {manifest.loss_before:.4f} before and "
        f"{manifest.loss:.4f} after step {manifest.best_step}, {manifest.seconds:.0f} s",
        err=True,
    )
