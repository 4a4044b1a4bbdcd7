"""Commands that concern experts: fine-tuning an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click
import yaml
from pydantic import ValidationError

__all__ = ["parse_setting", "train_adapter_command"]


@click.command("adapter", short_help="Fine-tune a LoRA adapter on pairs of prompt and answer.")
@click.option(
    "--data",
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help='JSONL file of {"prompt", "answer"} objects.',
)
@click.option("--base", required=True, help="Chat model: path, hub name or package:NAME/FILE.")
@click.option(
    "--out",
    required=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for the adapter; a training interrupted there goes on.",
)
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="A hyper-parameter.")
def train_adapter_command(data: Path, base: str, out: Path, settings: Sequence[str]) -> None:
    """Fine-tune a LoRA adapter of a chat model and write it in PEFT's format.

    Keys for --set, as in --set steps=300 --set learning_rate=5e-4: steps, batch_size,
    learning_rate, schedule, warmup_steps, weight_decay, max_grad_norm, rank, alpha, dropout,
    target_modules, max_tokens, precision, seed, checkpoint_every, device.
    """
    from experts.errors import ExpertConfigError

    try:
        from experts.finetune import AdapterTrainingConfig, train_adapter

        config = AdapterTrainingConfig.model_validate(
            {"data": data, "base": base, **dict(map(parse_setting, settings))}
        )
        manifest = train_adapter(config, out)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise click.UsageError(f"--set {name}: {first['msg']}") from error
    except ExpertConfigError as error:
        raise click.UsageError(str(error)) from error
    except ModuleNotFoundError as error:
        raise click.UsageError(
            f"training needs {error.name}: pip install 'collegium[torch]'"
        ) from error
    click.echo(
        f"{out}: {manifest.pairs} pairs, loss {manifest.final_loss:.3f}, {manifest.seconds:.0f} s",
        err=True,
    )


def parse_setting(setting: str) -> tuple[str, object]:
    """Key and value of ``KEY=VALUE``.

    Raises:
        UsageError: It is no such, or the value is not YAML.
    """
    key, separator, value = setting.partition("=")
    if not separator or not key:
        raise click.UsageError(f"--set takes KEY=VALUE, not {setting!r}")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise click.UsageError(f"--set {key}: {value!r} is not a YAML value") from error
    # YAML 1.1 reads 5e-4 as text; pydantic turns that into a number where one is wanted.
    return key, parsed
