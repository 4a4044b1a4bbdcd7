"""Training on tiny experts: what is learnt, that it resumes and repeats, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

torch = pytest.importorskip("torch")

from experts.errors import ExpertConfigError  # noqa: E402
from experts.finetune_data import ChatPair, read_pairs  # noqa: E402
from experts.latent.artefact import load_latent, read_latent  # noqa: E402
from experts.latent.members import load_members  # noqa: E402
from experts.latent.model import LatentModel, LatentText  # noqa: E402
from routers.base import Query, RouterError  # noqa: E402
from routers.cli import train_command  # noqa: E402
from routers.latent import states as states_module  # noqa: E402
from routers.latent.config import LatentTrainingConfig, read_config  # noqa: E402
from routers.latent.sizes import interaction_parameters  # noqa: E402
from routers.latent.states import StateStore  # noqa: E402
from routers.latent.texts import TextReader, hold_out, prompt_hash  # noqa: E402
from routers.latent.training import _Training, train_latent, without_peers  # noqa: E402
from routers.outcomes import OutcomeTable, Prompts  # noqa: E402
from routers.registry import load_router  # noqa: E402
from tests.routers.latent.conftest import KNOWN  # noqa: E402

NAMES = ("writer", "sage", "fool")
QUIET = {"entropy": 0.0, "balance": 0.0, "correctness": 0.0}


@pytest.fixture
def make(folders, pairs):
    """A configuration of a quick training, with changes."""

    def config(names=NAMES, **changes: Any) -> LatentTrainingConfig:
        members = [{"name": name, "model": str(folders / name)} for name in names]
        found = {
            "members": members, "data": pairs, "validation": 0.25, "writer": "writer",
            "active": 2, "n_stacks": 3, "width": 16, "n_heads": 2, "encoder": "hashing",
            "learning_rate": 1e-2, "warmup": 2, "batch_size": 4, "max_steps": 6,
            "evaluate_every": 2, "checkpoint_every": 2, "precision": "float32", "device": "cpu",
            **changes,
        }  # fmt: skip
        return LatentTrainingConfig.model_validate(found)

    return config


@pytest.fixture
def table(tmp_path):
    """A table in which the sage is right and the others are not."""
    prompts = Prompts([f"p{n}" for n in range(len(KNOWN))], list(KNOWN))
    scores = np.tile([0.0, 1.0, 0.0], (len(KNOWN), 1))
    scores[::5, 2] = np.nan
    OutcomeTable(prompts, models=NAMES, numbers={"score": scores}).write(tmp_path / "table")
    return tmp_path / "table"


def _weights(folder: Path) -> bytes:
    return (folder / "interactions.safetensors").read_bytes()


def _held_out(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "held_out.jsonl").read_text().splitlines()]


# --- what is learnt


def test_peers_who_know_what_the_writer_does_not_help(make, members, tmp_path):
    changes = {
        "width": 80, "n_heads": 4, "gates": "uniform", "batch_size": 12, "max_steps": 100,
        "evaluate_every": 20, "warmup": 5, "patience": 2,
    }  # fmt: skip
    config = make(("writer", "sage"), **changes)
    together = train_latent(config, tmp_path / "together", members=members)
    alone = train_latent(without_peers(config, members), tmp_path / "alone", members=members)
    assert abs(alone.parameters / together.parameters - 1) <= 0.01
    assert alone.loss_before == pytest.approx(together.loss_before, abs=1e-5)
    assert together.loss < 0.6 < 0.95 < alone.loss < alone.loss_before
    rows = list(zip(_held_out(tmp_path / "together"), _held_out(tmp_path / "alone"), strict=True))
    assert all(one["prompt"] == other["prompt"] for one, other in rows)
    better = [one["after"]["loss"] < other["after"]["loss"] for one, other in rows]
    assert sum(better) > 0.7 * len(better)


def test_the_loss_of_the_answer_alone_teaches_the_router(make, members):
    config = make(active=2, **QUIET)
    training = _training(config, members)
    rows = training.plan[0]
    scores = training._scores(rows)
    chosen = training._choose(scores, scores)
    # The last layer of an untrained interaction is zero, and what it gets with it.
    with torch.no_grad():
        for name, tensor in training.model.named_parameters():
            if ".out." in name:
                tensor.normal_(std=0.1)
    torch.stack(training._losses(rows, chosen, training._gates(scores, chosen))).sum().backward()
    assert training.network is not None
    for parameter in training.network.parameters():
        assert parameter.grad is not None
        assert float(parameter.grad.abs().max()) > 0


def test_a_step_passes_the_answers_gradient_on_to_the_router(make, members):
    def moved(n_steps, **changes):
        # Weight decay would move it, too.
        config = make(weight_decay=0.0, warmup=0, **{**QUIET, **changes})
        training = _training(config, members)
        assert training.network is not None
        before = [p.detach().clone() for p in training.network.parameters()]
        optimizer = training._optimizer()
        for _ in range(n_steps):
            training._train_step(optimizer)
            training.step += 1
        after = training.network.parameters()
        return any(not torch.equal(one, two) for one, two in zip(before, after, strict=True))

    assert not moved(1)  # nothing is said yet, so it is all the same who is listened to
    assert moved(2)
    assert moved(1, entropy=0.1)
    assert moved(1, balance=0.1)


def test_batches_of_a_step_add_up(make, members):
    """Whatever the batches: each answer token of a step has the same weight."""
    found = []
    for size, accumulation in ((8, 1), (4, 2), (3, 3)):
        config = make(batch_size=size, accumulation=accumulation, max_grad_norm=1e9, **QUIET)
        training = _training(config, members)
        rows = list(range(8, 16))
        training.plan = [rows[start : start + size] for start in range(0, 8, size)]
        with torch.no_grad():
            for name, tensor in training.model.named_parameters():
                if ".out." in name:
                    tensor.fill_(0.01)
        assert training.network is not None
        for layer in training.network:
            if isinstance(layer, torch.nn.Dropout):
                layer.p = 0.0
        loss = training._train_step(torch.optim.SGD(training.learnt.parameters(), lr=1.0))
        found.append((loss, training.learnt.state_dict()))
    (first, one), *others = found
    for second, two in others:
        assert first == pytest.approx(second, rel=1e-5)
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-6)


def test_the_table_teaches_the_router_who_is_right(make, members, table, tmp_path):
    config = make(
        writer=None, active=1, table=table, max_steps=60, evaluate_every=60, entropy=0.0,
        balance=0.0, batch_size=2,
    )  # fmt: skip
    manifest = train_latent(config, tmp_path / "out", members=members)
    router = load_router(tmp_path / "out" / "router")
    assert router.models == list(NAMES)
    quality = router.predict([Query(key) for key in KNOWN], NAMES).quality
    assert (quality.argmax(axis=1) == 1).mean() > 0.9
    # Who is right writes, and needs nobody: the table is learnt from before anything else.
    assert manifest.loss_before < 0.1
    writers = [next(iter(row["after"]["gates"])) for row in _held_out(tmp_path / "out")]
    assert writers.count("sage") > 0.9 * len(writers)


# --- what is measured


def test_untrained_the_writer_is_alone(make, members, tmp_path):
    manifest = train_latent(make(max_steps=1), tmp_path / "out", members=members)
    member = members["writer"]
    tokenizer, model = member.tokenizer.tokenizer, member.stacked.model
    _, held_out = hold_out([ChatPair(*item) for item in KNOWN.items()], 0.25)
    assert manifest.held_out == len(held_out)
    total, tokens = 0.0, 0
    for key, value in held_out:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": key}], add_generation_prompt=True, return_dict=False
        )
        answer = [*tokenizer(f" {value}")["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*prompt, *answer[:-1]]])).logits[0]
        targets = torch.tensor(answer)
        found = torch.nn.functional.cross_entropy(logits[-len(answer) :], targets, reduction="sum")
        total, tokens = total + float(found), tokens + len(answer)
    assert manifest.loss_before == pytest.approx(total / tokens, abs=1e-5)
    rows = _held_out(tmp_path / "out")
    assert sum(row["before"]["tokens"] for row in rows) == tokens
    assert sum(row["before"]["loss"] for row in rows) / tokens == pytest.approx(
        manifest.loss_before
    )


def test_held_out_prompts_are_the_same_in_every_order():
    pairs = [ChatPair(str(number), "x") for number in range(400)]
    learnt, held_out = hold_out(pairs, 0.25)
    assert len(held_out) == pytest.approx(100, abs=30)
    assert not set(learnt) & set(held_out)
    assert set(hold_out(pairs[::-1], 0.25)[1]) == set(held_out)
    assert set(held_out) <= set(hold_out(pairs, 0.5)[1])


def test_a_file_of_held_out_pairs_is_not_learnt_from(make, members, tmp_path):
    lines = [json.dumps({"prompt": k, "answer": v}) for k, v in list(KNOWN.items())[:10]]
    (tmp_path / "held.jsonl").write_text("\n".join(lines))
    config = make(validation=tmp_path / "held.jsonl", max_steps=1)
    manifest = train_latent(config, tmp_path / "out", members=members)
    assert (manifest.pairs, manifest.held_out) == (len(KNOWN) - 10, 10)
    assert manifest.repeated_prompts == 10


def test_test_pairs_are_measured_and_decide_nothing(make, members, tmp_path):
    pairs = [{"prompt": k, "answer": v} for k, v in KNOWN.items()]
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, pairs[:5])))
    (tmp_path / "rest.jsonl").write_text("\n".join(map(json.dumps, pairs[5:])))
    rest = make(data=tmp_path / "rest.jsonl", max_steps=4)
    plain = train_latent(rest, tmp_path / "plain", members=members)
    tested = train_latent(
        make(test=tmp_path / "test.jsonl", max_steps=4), tmp_path / "tested", members=members
    )
    assert tested.history == plain.history
    assert tested.pairs == plain.pairs
    lines = [json.loads(line) for line in (tmp_path / "tested/test.jsonl").read_text().splitlines()]
    assert {line["prompt"] for line in lines} == {prompt_hash(p["prompt"]) for p in pairs[:5]}
    for when, loss in (("before", tested.test_loss_before), ("after", tested.test_loss)):
        sums = [sum(line[when][key] for line in lines) for key in ("loss", "tokens")]
        assert sums[0] / sums[1] == pytest.approx(loss)
    assert tested.test_loss != tested.test_loss_before
    assert plain.test_loss is None


# --- files, resuming, repeating


def test_the_folder_holds_what_serving_needs(make, folders, members, tmp_path):
    out = tmp_path / "out"
    manifest = train_latent(make(), out, members=members)
    assert sorted(file.name for file in out.iterdir()) == [
        "held_out.jsonl", "interactions.safetensors", "latent.json", "router",
    ]  # fmt: skip
    assert read_latent(out).training == manifest.model_dump(mode="json")
    model = load_latent(out, members)
    learnt = dict(model.named_parameters())
    width = members["writer"].stacked.width
    assert manifest.parameters == interaction_parameters(
        dict.fromkeys(NAMES, width), ["writer"], width=16, n_heads=2, n_stacks=3
    )
    untouched = [name for name in learnt if ".out." in name and not learnt[name].any()]
    assert len(untouched) == 2 * 2  # of two peers, at two boundaries
    router = load_router(out / "router")
    assert router.models == list(NAMES)
    assert router.predict([Query("bab")], NAMES).quality.shape == (1, 3)


def test_without_a_choice_there_is_no_router(make, members, tmp_path):
    config = make(active=3, gates="uniform")
    manifest = train_latent(config, tmp_path / "out", members=members)
    assert manifest.router_parameters == 0
    assert not (tmp_path / "out" / "router").exists()


def test_same_seed_same_bits(make, members, tmp_path):
    for name, seed in (("one", 0), ("two", 0), ("other", 1)):
        train_latent(make(seed=seed), tmp_path / name, members=members)
    one, two, other = (_weights(tmp_path / name) for name in ("one", "two", "other"))
    assert one == two != other
    first, second = (tmp_path / name / "router" / "arrays.safetensors" for name in ("one", "two"))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("changes", [{}, {"writer": None, "peers": "random"}])
def test_an_interrupted_training_comes_to_the_same(make, members, table, tmp_path, changes):
    config = make(table=table, **changes)
    whole = train_latent(config, tmp_path / "whole", members=members)

    def interrupt(step, loss):
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_latent(config, tmp_path / "resumed", members=members, on_step=interrupt)
    assert not (tmp_path / "resumed").exists()
    steps: list[int] = []
    resumed = train_latent(
        config, tmp_path / "resumed", members=members, on_step=lambda step, _: steps.append(step)
    )
    assert steps == [5, 6]
    assert _weights(tmp_path / "resumed") == _weights(tmp_path / "whole")
    assert _held_out(tmp_path / "resumed") == _held_out(tmp_path / "whole")
    assert resumed.history == whole.history
    assert resumed.tokens == whole.tokens
    assert not list((tmp_path / "cache" / "trainings").iterdir())


def test_a_finished_training_is_not_done_again(make, members, tmp_path):
    first = train_latent(make(), tmp_path / "out", members=members)

    def never(step, loss):
        raise AssertionError

    assert train_latent(make(), tmp_path / "out", members=members, on_step=never) == first
    with pytest.raises(RouterError, match="another training's"):
        train_latent(make(width=8), tmp_path / "out", members=members)


def test_it_stops_early_and_keeps_the_best(make, members, tmp_path):
    config = make(
        learning_rate=5.0, max_steps=40, patience=2, evaluate_every=1, schedule="constant"
    )
    manifest = train_latent(config, tmp_path / "out", members=members)
    assert manifest.steps < 40
    assert manifest.steps == manifest.best_step + 2
    assert manifest.loss == min(loss for _, loss in manifest.history)
    assert manifest.loss == dict(manifest.history)[manifest.best_step]


@pytest.mark.parametrize("writer", ["writer", None])
def test_training_that_diverges_says_so(make, members, tmp_path, writer):
    config = make(learning_rate=1e30, warmup=0, schedule="constant", writer=writer)
    with pytest.raises(RouterError, match="lower learning_rate"):
        train_latent(config, tmp_path / "out", members=members)
    assert not (tmp_path / "out").exists()


# --- hidden states


@pytest.mark.parametrize("changes", [{}, {"writer": None}, {"peers": "same"}])
def test_where_states_are_kept_changes_no_result(make, members, tmp_path, changes):
    losses = [
        train_latent(make(cache=cache, **changes), tmp_path / cache, members=members).history
        for cache in ("memory", "disk", "none")
    ]
    for history in losses[1:]:
        assert [loss for _, loss in history] == pytest.approx(
            [loss for _, loss in losses[0]], abs=1e-4
        )


def test_states_on_disk_are_read_by_other_trainings(make, members, tmp_path, monkeypatch):
    train_latent(make(cache="disk"), tmp_path / "one", members=members)
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*.safetensors")}
    assert files

    def never(*_):
        raise AssertionError

    monkeypatch.setattr(LatentModel, "read", never)
    train_latent(make(cache="disk", width=8, n_heads=4), tmp_path / "two", members=members)
    assert all(file.stat().st_mtime_ns == when for file, when in files.items())


def test_states_of_weights_without_a_name_are_not_kept_on_disk(members):
    from dataclasses import replace

    stacked = {"writer": members["writer"].stacked}
    nameless = {"writer": replace(members["writer"], revision="")}
    with pytest.raises(RouterError, match="set cache to memory"):
        StateStore(LatentModel(stacked, 8, 2), nameless, "disk")


def test_states_that_do_not_fit_into_memory_are_refused_before_they_are_computed(
    make, members, monkeypatch
):
    monkeypatch.setattr(states_module, "available_bytes", lambda: 1000)
    monkeypatch.setattr(LatentModel, "read", None)
    with pytest.raises(RouterError, match=r"hidden states take 0\.00 GiB.*set cache to disk"):
        _training(make(), members)


def test_kept_states_are_those_of_a_pass(make, members):
    training = _training(make(), members)
    assert training.store is not None
    number = training.checked[0]
    written = training.reader.written(number, "writer")
    half = torch.tensor(0.5)
    tokens = {name: written.tokens[name] for name in ("writer", "sage")}
    gates = dict.fromkeys(tokens, half)
    states = {name: training.store.get(name, tokens[name].ids) for name in tokens}
    assert len(states["sage"]) == 2
    with torch.no_grad():
        for parameter in training.model.parameters():
            parameter.normal_(std=0.2)
        kept, passed = (
            training.model([LatentText("writer", tokens, gates, known)])[0]
            for known in (states, None)
        )
    torch.testing.assert_close(kept, passed, rtol=1e-4, atol=1e-4)


# --- texts


def test_answers_end_with_the_token_that_ends_a_turn(members):
    tokenizers = {name: member.tokenizer for name, member in members.items()}
    reader = TextReader(tokenizers, [ChatPair("bab", "amber dune")])
    for writer in NAMES:
        written = reader.written(0, writer)
        tokenizer = tokenizers[writer].tokenizer
        assert tokenizer.decode(written.targets) == " amber dune<eos>"
        own = written.tokens[writer].ids
        assert own[-len(written.targets) + 1 :] == written.targets[:-1]
        for name in NAMES:
            text = tokenizers[name].decode(written.tokens[name].ids)
            assert text.endswith("amber dune")


def test_a_model_without_a_template_ends_its_answer_too(folders):
    from transformers import AutoTokenizer

    from experts.latent.alignment import MemberTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folders / "writer")
    tokenizer.chat_template = None
    reader = TextReader({"plain": MemberTokenizer("plain", tokenizer)}, [ChatPair("bab", "amber")])
    written = reader.written(0, "plain")
    assert tokenizer.decode(written.targets) == " amber<eos>"
    assert tokenizer.decode(written.tokens["plain"].ids).endswith("Assistant: amber")


# --- ablations


@pytest.mark.parametrize(
    "changes",
    [
        {"gates": "uniform", "active": 3},
        {"peers": "random"},
        {"peers": "random", "gates": "uniform"},
        {"peers": "same", "gates": "uniform", "active": 3},
        {"writer": None, "seed": 1},  # with 0 the sage writes all from the start
        {"n_stacks": 2, "active": 3},
    ],
)
def test_every_ablation_trains(make, members, tmp_path, changes):
    manifest = train_latent(make(**changes), tmp_path / "out", members=members)
    assert manifest.loss < manifest.loss_before
    rows = _held_out(tmp_path / "out")
    for row in rows:
        assert sum(row["after"]["gates"].values()) == pytest.approx(1, abs=1e-5)
        assert len(row["after"]["gates"]) == changes.get("active", 2)
    if changes.get("peers") == "random":
        assert len({tuple(row["after"]["gates"]) for row in rows}) > 1
    if changes.get("peers") == "same":
        assert list(rows[0]["after"]["gates"]) == ["writer", "writer.copy1", "writer.copy2"]


# --- mistakes and the command


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"writer": "nobody"}, "'nobody' is none of the members"),
        ({"active": 4}, "there are 3 members"),
        ({"width": 15}, "15 cannot be divided into 2 heads"),
        ({"writer": None, "active": 1}, "nothing would teach the router"),
        ({"gates": "uniform"}, "nothing would teach the router"),
        ({"active": 1, "n_stacks": 1}, "nothing would be learnt"),
        ({"peers": "same", "writer": None}, "copies of the writer need"),
        ({"validation": 1.5}, "validation"),
        ({"colour": "red"}, "Extra inputs"),
    ],
)
def test_impossible_configurations_are_refused(make, changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_what_does_not_fit_is_refused(make, members, table, tmp_path):
    with pytest.raises(RouterError, match="have at most max_tokens=2"):
        train_latent(make(max_tokens=2), tmp_path / "out", members=members)
    two = {name: members[name] for name in ("writer", "sage")}
    with pytest.raises(RouterError, match="lack 'fool'"):
        train_latent(make(), tmp_path / "out", members=two)
    OutcomeTable.load(table).restricted_to(["sage"]).write(tmp_path / "one")
    with pytest.raises(RouterError, match="has no model 'writer', 'fool'"):
        train_latent(make(table=tmp_path / "one"), tmp_path / "out", members=members)
    with pytest.raises(ExpertConfigError, match="cannot read"):
        train_latent(make(data=Path("nowhere.jsonl")), tmp_path / "out", members=members)
    assert not (tmp_path / "out").exists()


def test_the_command_trains_and_what_it_wrote_loads(make, tmp_path):
    import yaml

    config = make().model_dump(mode="json", exclude={"max_steps"})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    out = tmp_path / "out"
    arguments = ["latent", "--config", str(tmp_path / "config.yaml"), "--out", str(out)]
    result = CliRunner().invoke(train_command, [*arguments, "--set", "max_steps=2"])
    assert result.exit_code == 0, result.output
    assert "held-out loss" in result.stderr
    loaded = load_members(make().members, n_stacks=3, dtype="float32", device="cpu")
    assert load_latent(out, loaded).width == 16


def test_mistakes_on_the_command_line_are_one_line(tmp_path, make):
    import yaml

    file = tmp_path / "config.yaml"
    arguments = ["latent", "--config", str(file), "--out", str(tmp_path / "out")]
    file.write_text(yaml.safe_dump(make().model_dump(mode="json")))
    for setting, message in (
        ("active=9", "there are 3 members"),
        ("learning_rate=fast", "learning_rate: Input should be a valid number"),
        ("active", "must be KEY=VALUE"),
    ):
        result = CliRunner().invoke(train_command, [*arguments, "--set", setting])
        assert result.exit_code == 2
        assert message in result.stderr
    file.write_text("[1, 2")
    result = CliRunner().invoke(train_command, arguments)
    assert result.exit_code == 2
    assert "cannot read" in result.stderr
    file.write_text("just text")
    with pytest.raises(RouterError, match="must hold keys"):
        read_config(file)


def test_help_names_every_key():
    output = CliRunner().invoke(train_command, ["latent", "--help"]).output
    missing = [name for name in LatentTrainingConfig.model_fields if name not in output]
    assert not missing


def _training(config, members):
    pairs = read_pairs(config.data)[0]
    chosen = {member.name: members[member.name] for member in config.members}
    tokenizers = {name: member.tokenizer for name, member in chosen.items()}
    reader = TextReader(tokenizers, pairs)
    numbers = list(range(len(pairs)))
    return _Training(config, chosen, reader, numbers[8:], numbers[:8], [], None)
