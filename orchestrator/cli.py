"""The ``collegium`` command: a table of names, each imported when it is used.

Each package owns its commands, so ``collegium --help`` stays fast and no layer reaches upwards.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

import click

from orchestrator.config import ConfigError
from orchestrator.version import version

__all__ = ["main"]

# Command to ("module:attribute", what --help says of it).
COMMANDS: dict[str, tuple[str, str]] = {
    "serve": ("deployments.cli:serve_command", "Run the service; embedded experts by default."),
    "ask": ("orchestrator.ask_cli:ask_command", "Ask a running service one question."),
    "route": ("orchestrator.ask_cli:route_command", "Show who would answer, and why."),
    "train": ("routers.cli:train_command", "Fit a router, or fine-tune an adapter."),
    "update": ("routers.update_cli:update_command", "Add models or rows to a trained router."),
    "release": ("routers.release_cli:release_command", "Swap a running service's router, or back."),
    "evaluate": ("evals.evaluate_cli:evaluate_command", "Judge routers on an outcome table."),
    "calibrate": ("evals.calibrate_cli:calibrate_command", "Fit a policy to a budget or a share."),
    "collect": ("evals.cli:collect_command", "Run experts on tasks: an outcome table."),
    "collect-embedders": (
        "evals.retrieval_cli:collect_embedders_command",
        "Score embedders on questions: an outcome table.",
    ),
    "import": ("evals.import_cli:import_command", "Make an outcome table from other files."),
    "tasks": ("evals.cli:tasks_command", "List and export evaluation tasks."),
    "library": ("evals.moerging.cli:library_command", "Keep adapters, tested before they join."),
    "index": ("orchestrator.index_cli:index_command", "Make an index of documents to look up."),
    "config": ("orchestrator.config_cli:config_command", "Check and show configs."),
    "doctor": ("deployments.cli:doctor_command", "Say what is wrong with this machine's setup."),
}


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ConfigError as error:
            # A user's mistake: a line per problem, no traceback, the exit code of wrong usage.
            click.echo(f"Error: {error}", err=True)
            ctx.exit(2)


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(version(), prog_name="collegium")
def main() -> None:
    """Many expert LLMs behind one OpenAI-compatible endpoint.

    \b
    Start the service:   collegium serve
    Ask a question:      collegium ask "What is 17 + 25?"
    """


if __name__ == "__main__":
    sys.exit(main())
