"""An interrupted training, run again, goes on and ends with the bits of an uninterrupted one."""

from __future__ import annotations

import logging

import pytest
import torch

from routers import checkpoints
from routers.bert import BertRouter
from routers.testing import example_table

EPOCHS, STEPS_PER_EPOCH = 3, 8
STEPS = EPOCHS * STEPS_PER_EPOCH


class Steps:
    """Counts steps of training, and may interrupt the training in one of them."""

    def __init__(self):
        self.done, self.fail_at = 0, None
        self._clip = torch.nn.utils.clip_grad_norm_

    def __call__(self, *args):
        if self.done == self.fail_at:
            raise KeyboardInterrupt
        self.done += 1
        return self._clip(*args)


@pytest.fixture
def steps(monkeypatch):
    counted = Steps()
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", counted)
    return counted


@pytest.fixture(autouse=True)
def kept(monkeypatch, tmp_path):
    """The folder of checkpoints."""
    monkeypatch.setenv("COLLEGIUM_CACHE", str(tmp_path / "cache"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path / "cache" / "trainings"
    torch.set_num_threads(threads)


@pytest.fixture
def train(tiny_bert, tmp_path, steps):
    """Trains, and gives the artefact's files, or none if it was interrupted."""

    def run(*, fail_at=None, seed=0, **params):
        steps.done, steps.fail_at = 0, fail_at
        quick = {"epochs": EPOCHS, "learning_rate": 1e-2, "batch_size": 8, "max_tokens": 16}
        router = BertRouter(**{"model": tiny_bert, **quick, **params})
        try:
            router.fit(example_table(seed=seed)).save(tmp_path / "artefact")
        except KeyboardInterrupt:
            return None
        return {file.name: file.read_bytes() for file in (tmp_path / "artefact").iterdir()}

    return run


@pytest.mark.parametrize(
    ("target", "fail_at", "every_s", "lost"),
    [
        ("category", STEPS_PER_EPOCH, 300, 0),
        ("expert", 2 * STEPS_PER_EPOCH + 3, 300, 3),
        ("category", 5, 0, 0),
        ("expert", 11, 0, 0),
    ],
)
def test_an_interrupted_training_goes_on_and_ends_with_the_same_bytes(
    target, fail_at, every_s, lost, train, steps, kept, capsys, monkeypatch
):
    whole = train(target=target)
    assert whole is not None
    assert steps.done == STEPS
    monkeypatch.setattr(checkpoints, "EVERY_S", every_s)
    assert train(target=target, fail_at=fail_at) is None
    [file] = kept.iterdir()
    assert "going on" not in capsys.readouterr().err
    assert train(target=target) == whole
    assert steps.done == STEPS - fail_at + lost
    epoch = fail_at // STEPS_PER_EPOCH + 1
    assert f"bert: going on from epoch {epoch} of {EPOCHS} ({file})" in capsys.readouterr().err
    assert not list(kept.iterdir())


def test_interrupted_twice_is_as_good_as_once(train, steps):
    whole = train()
    assert train(fail_at=STEPS_PER_EPOCH + 1) is None
    assert train(fail_at=STEPS_PER_EPOCH + 2) is None
    assert train() == whole
    assert steps.done == STEPS - 2 * STEPS_PER_EPOCH


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 1},
        {"target": "expert"},
        {"learning_rate": 2e-2},
        {"batch_size": 9},
        {"epochs": EPOCHS + 1},
        {"layers": 1},
        {"max_tokens": 4},
        {"random_state": 1},
    ],
    ids=lambda other: next(iter(other)),
)
def test_other_data_or_parameters_start_from_zero(other, train, kept, capsys):
    assert train(fail_at=STEPS_PER_EPOCH) is None
    [first] = kept.iterdir()
    assert train(**other) is not None
    assert "going on" not in capsys.readouterr().err
    assert list(kept.iterdir()) == [first]


def test_another_base_checkpoint_starts_from_zero(tiny_bert, train, tmp_path, kept, capsys):
    from transformers import AutoModel, AutoTokenizer

    assert train(fail_at=STEPS_PER_EPOCH) is None
    changed = AutoModel.from_pretrained(tiny_bert)
    changed.embeddings.word_embeddings.weight.data[0, 0] += 1e-3
    changed.save_pretrained(tmp_path / "changed")
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(tmp_path / "changed")
    assert train(model=str(tmp_path / "changed")) is not None
    assert "going on" not in capsys.readouterr().err


def test_a_damaged_checkpoint_or_folder_only_costs_time(train, kept, caplog):
    whole = train()
    assert train(fail_at=STEPS_PER_EPOCH) is None
    [file] = kept.iterdir()
    file.write_bytes(file.read_bytes()[:-100])
    with caplog.at_level(logging.WARNING, "collegium.routers"):
        assert train() == whole
    assert f"cannot go on from {file}" in caplog.text
    kept.rmdir()
    kept.write_text("not a folder")
    with caplog.at_level(logging.WARNING, "collegium.routers"):
        assert train() == whole
    assert f"cannot keep the state of the training in {file}" in caplog.text


def test_what_a_kill_in_the_middle_of_writing_leaves_is_removed(train, kept):
    assert train(fail_at=STEPS_PER_EPOCH) is None
    [file] = kept.iterdir()
    file.with_suffix(".123.tmp").write_text("half")
    assert train() is not None
    assert not list(kept.iterdir())
