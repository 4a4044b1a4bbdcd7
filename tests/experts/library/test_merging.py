"""Merges of adapters: by hand, and that as many copies as one likes are the one."""

from __future__ import annotations

from typing import Any, get_args

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from experts.adapter_files import LowRank, read_updates, write_updates  # noqa: E402
from experts.library.merging import Merging, merge_adapters  # noqa: E402

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
