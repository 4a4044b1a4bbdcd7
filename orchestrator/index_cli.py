"""``collegium index``: a folder of documents as an index that retrievers search."""

from __future__ import annotations

from pathlib import Path

import click

__all__ = ["index_command"]


@click.command("index", short_help="Make an index of documents to look up.")
@click.argument("documents", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--out",
    required=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for the index; one already there is replaced, unchanged passages kept.",
)
@click.option(
    "--encoder",
    "names",
    multiple=True,
    default=["minilm-int8"],
    show_default=True,
    help="Whose vectors; may be repeated: each passage is found by the encoder that knows it best.",
)
@click.option(
    "--characters",
    type=click.IntRange(min=100),
    default=800,
    show_default=True,
    help="Longest passage. Encoders read 256 tokens, about a thousand characters of English.",
)
def index_command(documents: Path, out: Path, names: tuple[str, ...], characters: int) -> None:
    """Index the .md, .markdown and .txt files below DOCUMENTS, for experts of engine retriever.

    Run it again when documents have changed: only new passages are encoded.
    """
    from experts.errors import ExpertConfigError
    from experts.retrieval.index import build_index, check_target
    from experts.retrieval.passages import read_documents
    from routers.base import RouterError
    from routers.encoders import get_encoder

    try:
        check_target(out)
        encoders = [get_encoder(name) for name in dict.fromkeys(names)]
        manifest, encoded = build_index(
            read_documents(documents), encoders, out, characters=characters
        )
    except (ExpertConfigError, RouterError) as error:
        raise click.UsageError(str(error)) from error
    passages = sum(document.passages for document in manifest.documents)
    click.echo(f"wrote     {out}")
    click.echo(f"documents {len(manifest.documents)}")
    click.echo(f"passages  {passages}, {encoded} of them encoded anew")
    for encoder in manifest.encoders:
        click.echo(f"encoder   {encoder.name} {encoder.revision}")
