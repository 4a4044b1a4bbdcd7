"""Merges of adapters: by hand, and that as many copies as one likes are the one."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any, cast, get_args

import pytest
from click.testing import CliRunner

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from experts.adapter_files import LowRank, read_updates, write_updates  # noqa: E402
from experts.finetune_data import TokenPair  # noqa: E402
from experts.library.cli import library_command  # noqa: E402
from experts.library.manifest import Library, LibraryExpert  # noqa: E402
from experts.library.merging import SCALES, Merging, best_scale, merge_adapters, scaled  # noqa: E402

LAYER = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def written(tmp_path):
    """Writes whole updates of a layer as adapters; gives their folders."""

    def write(*wholes: list[list[float]]):
        folders = {}
        for place, rows in enumerate(wholes):
            whole = torch.tensor(rows)
            folders[str(place)] = tmp_path / str(place)
            update = LowRank(torch.eye(whole.shape[1]), whole)
            write_updates(folders[str(place)], {LAYER: update}, "base")
        return folders

    return write


def _whole(updates) -> Any:
    return updates[LAYER].up @ updates[LAYER].down


@pytest.mark.filterwarnings("ignore:The density 1.0")
@pytest.mark.parametrize("merging", get_args(Merging))
def test_copies_merge_to_what_they_are_copies_of(written, merging):
    rows = [[1.0, -2.0], [3.0, 4.0]]
    found = _whole(merge_adapters(written(rows, rows, rows), merging, density=1.0))
    torch.testing.assert_close(found, torch.tensor(rows), atol=1e-5, rtol=1e-5)


def test_ties_trims_elects_and_averages_those_that_agree(written):
    folders = written([[4.0, -3.0], [2.0, 0.1]], [[2.0, 5.0], [-1.0, 3.0]])
    # Of four numbers two are kept: 4 and -3 of the first, 5 and 3 of the second. Signs of the sums
    # are + (4), + (-3 + 5), and + (3), so -3 goes.
    found = _whole(merge_adapters(folders, "ties", density=0.5))
    expected = torch.tensor([[4.0, 5.0], [0.0, 3.0]])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_what_dare_drops_is_drawn_and_the_rest_is_doubled(written):
    rows = [[float(n * 8 + m + 1) for m in range(8)] for n in range(8)]
    folders = written(rows, rows)
    found, again, other = (
        _whole(merge_adapters(folders, "dare_linear", density=0.5, seed=seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(found, again)
    assert not torch.allclose(found, other)
    # Means of two that are each nothing or twice the number.
    shares = (found / torch.tensor(rows)).round(decimals=3)
    assert set(shares.unique().tolist()) == {0.0, 1.0, 2.0}


def test_a_layer_that_an_adapter_leaves_alone_counts_as_zeros(written, tmp_path):
    folders = written([[4.0, 2.0]])
    other = {"model.layers.1.self_attn.q_proj": LowRank(torch.eye(2), torch.ones(1, 2))}
    write_updates(tmp_path / "other", other, "base")
    merged = merge_adapters({**folders, "other": tmp_path / "other"}, "cat")
    torch.testing.assert_close(_whole(merged), torch.tensor([[2.0, 1.0]]))


def test_a_merge_is_an_adapter_like_any_other(written, tmp_path):
    merged = merge_adapters(written([[1.0, 2.0]], [[3.0, 4.0]]), "cat")
    write_updates(tmp_path / "merged", merged, "base")
    torch.testing.assert_close(_whole(read_updates(tmp_path / "merged")), _whole(merged))


def test_a_merge_is_as_large_as_makes_texts_likeliest():
    class Examiner:
        adapters = SimpleNamespace(adapter=lambda name: ((name, 1.0),))

        def losses(self, pairs: list[TokenPair], use: Any) -> Any:
            ((adapter, share),) = use.shares
            assert adapter == (("merge", 1.0),)
            return torch.tensor([(share - 0.32) ** 2, 1.0])

    assert best_scale(cast(Any, Examiner()), "merge", [TokenPair([1], [2])] * 2) == 0.3


def test_examples_choose_how_large_a_merge_is(home, tmp_path):
    library = Library.at(tmp_path / "library")
    base = str(home / "base")
    for name in ("one", "two"):
        library.put(LibraryExpert(name=name, base=base, path=str(home / name)))
    examples = tmp_path / "examples.jsonl"
    examples.write_text(json.dumps({"prompt": "sun", "answer": "moon and stars"}) + "\n")

    def merged(*options: str) -> tuple[Any, str]:
        out = tmp_path / f"merged{len(options)}"
        command = ["merge", "--method", "cat", "--library", str(library.folder), "--out", str(out)]
        result = CliRunner().invoke(library_command, [*command, *options])
        assert result.exit_code == 0, result.output
        return read_updates(out), result.output

    plain, _ = merged()
    chosen, said = merged("--examples", str(examples))
    scale = float(said.strip().rpartition("times ")[2])
    assert scale in SCALES
    for path, update in scaled(plain, scale).items():
        torch.testing.assert_close(
            chosen[path].up @ chosen[path].down, update.up @ update.down, rtol=1e-4, atol=1e-6
        )
