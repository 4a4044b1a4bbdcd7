"""Gates that are learnt from samples: what they are made of, kept, and refused for."""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from safetensors.torch import load_file  # noqa: E402

from experts.config import TokenRouterConfig  # noqa: E402
from experts.errors import ExpertConfigError  # noqa: E402
from experts.finetune import train  # noqa: E402
from experts.finetune_data import ChatPair  # noqa: E402
from experts.library.cli import library_command  # noqa: E402
from experts.library.examiner import Examiner  # noqa: E402
from experts.library.gates import mean_inputs, ridge_gates, trained_vectors  # noqa: E402
from experts.library.manifest import Library, LibraryExpert  # noqa: E402
from experts.lora import AdapterUse  # noqa: E402
from experts.token_routing import read_gates, read_token_router  # noqa: E402

SAMPLES = {
    "one": [("Name two colours.", "the quick brown fox"), ("hello world", "lazy dog")],
    "two": [("Count from one to four.", "one two three four"), ("one hundred", "user")],
}


@pytest.fixture(scope="module")
def library(home):
    """A library of the two adapters, with samples of both."""
    folder = home / "lib"
    library = Library.at(folder)
    for name, pairs in SAMPLES.items():
        file = home / f"{name}.jsonl"
        file.write_text("".join(json.dumps({"prompt": p, "answer": a}) + "\n" for p, a in pairs))
        library.experts[name] = LibraryExpert(
            name=name, base=str(home / "base"), path=str(home / name), samples=str(file)
        )
    library.save()
    return library


def _examiner(home, *names):
    return Examiner(str(home / "base"), {name: home / name for name in names}, dtype="float32")


def _pairs(examiner, name):
    return examiner.read([ChatPair(*pair) for pair in SAMPLES[name]])


def _heard(examiner, path, name, adapter):
    """What a layer reads of the first sample of a domain, one row per token."""
    heard = []
    layer = examiner.adapters.layers[path]
    hook = layer.register_forward_pre_hook(lambda module, inputs: heard.append(inputs[0][0]))
    list(examiner.logits(_pairs(examiner, name)[:1], adapter))
    hook.remove()
    return heard[0]


def test_mean_inputs_are_those_of_the_samples_with_their_adapter(home):
    examiner = _examiner(home, "one")
    found = mean_inputs(examiner, "one", _pairs(examiner, "one")[:1])
    assert found.keys() == examiner.adapters.layers.keys()
    path = "model.layers.3.self_attn.q_proj"
    torch.testing.assert_close(found[path], _heard(examiner, path, "one", "one").mean(0))


def test_ridge_gates_are_scikit_learns_ridge_regression(home):
    from sklearn.linear_model import Ridge

    examiner = _examiner(home, "one", "two")
    found = ridge_gates(examiner, {name: _pairs(examiner, name)[:1] for name in SAMPLES})
    path, block = "model.layers.2.self_attn.q_proj", "model.layers.2.self_attn"
    rows = [_heard(examiner, path, name, None).double().numpy() for name in SAMPLES]
    domains = [name for name, own in zip(SAMPLES, rows, strict=True) for _ in own]
    inputs = np.vstack(rows)
    # With a column of ones in place of an intercept, which is regularised as all columns are.
    inputs = np.hstack([inputs, np.ones((len(inputs), 1))])
    targets = np.array([[domain == name for name in SAMPLES] for domain in domains], float)
    solved = Ridge(alpha=1e-2, fit_intercept=False, solver="cholesky").fit(inputs, targets).coef_
    solved = solved / np.linalg.norm(solved[:, :-1], axis=1, keepdims=True)
    np.testing.assert_allclose(found[f"{block}.weight"], solved[:, :-1], atol=1e-4)
    np.testing.assert_allclose(found[f"{block}.bias"], solved[:, -1], atol=1e-4)
    # Only the first adapted layer of a block is asked; k, v and o are not adapted here.
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in found} == {"self_attn", "mlp"}


def test_trained_vectors_open_where_the_adapter_helps(home):
    """Losses on its samples fall, and the adapter and the base stay as they were."""
    examiner = _examiner(home, "one")
    pairs = _pairs(examiner, "one")
    before = examiner.losses(pairs, "one"), examiner.losses(pairs, None)
    vectors = trained_vectors(examiner, "one", pairs, steps=5)
    assert all(float(vector.abs().sum()) > 0 for vector in vectors.values())
    after = examiner.losses(pairs, "one"), examiner.losses(pairs, None)
    np.testing.assert_array_equal(before, after)


def test_trained_vectors_make_the_samples_likelier(home):
    def loss(steps: int) -> float:
        examiner = _examiner(home, "one")
        pairs = _pairs(examiner, "one")
        trained_vectors(examiner, "one", pairs, steps=steps)
        return float(examiner.losses(pairs, AdapterUse(router="one")).sum())

    assert loss(20) < loss(1) - 0.01


def test_gates_are_made_kept_and_taken_for_an_expert(library, home, tmp_path):
    out = tmp_path / "gates"

    def make(method, *options):
        command = ["gates", "--library", str(library.folder), "--method", method, "--out", str(out)]
        return CliRunner().invoke(library_command, [*command, *options])

    made = make("average")
    assert made.exit_code == 0, made.output
    assert "average: one\naverage: two\n" in made.output
    first = read_gates(out)[1]
    again = make("average")
    assert "average: one" not in again.output
    assert all(torch.equal(first[name], tensor) for name, tensor in read_gates(out)[1].items())
    other = make("phatgoose")
    assert other.exit_code == 2
    assert "holds gates of the method average" in other.output
    assert "has no adapter of 'x'" in make("average", "--base", "x").output

    folders = {name: home / name for name in SAMPLES}
    router = read_token_router(TokenRouterConfig(name="r", gates=str(out)), folders)
    assert (router.method, router.adapters, router.top_k) == ("vectors", ("one", "two"), 2)
    some = TokenRouterConfig(name="r", gates=str(out), adapters=("two",), top_k=1)
    alone = read_token_router(some, folders)
    path = "model.layers.0.mlp.up_proj.vectors"
    assert torch.equal(alone.tensors[path], first[path][1:])
    with pytest.raises(ExpertConfigError, match="'two' is not in both"):
        read_token_router(TokenRouterConfig(name="r", gates=str(out)), {"one": home / "one"})
    swapped = {"one": home / "two", "two": home / "two"}
    with pytest.raises(ExpertConfigError, match="is another than the gates"):
        read_token_router(TokenRouterConfig(name="r", gates=str(out)), swapped)
    with pytest.raises(ExpertConfigError, match="holds no gates"):
        read_token_router(TokenRouterConfig(name="r", gates=str(tmp_path)), folders)


def test_a_mixture_is_trained_together_and_hosted_as_adapters_and_gates(home, tmp_path):
    from experts.finetune_config import AdapterTrainingConfig
    from experts.library.multitask import train_mixture

    data = tmp_path / "all.jsonl"
    rows = [{"prompt": p, "answer": a} for pairs in SAMPLES.values() for p, a in pairs]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = AdapterTrainingConfig(
        data=data, base=str(home / "base"), steps=30, batch_size=4, rank=2, learning_rate=3e-2,
        precision="float32", target_modules=("q_proj", "up_proj"),
    )  # fmt: skip
    train_mixture(config, 3, 2, tmp_path / "made")
    adapters = {f"mixture-{n}": tmp_path / "made" / "adapters" / f"mixture-{n}" for n in range(3)}
    router = TokenRouterConfig(name="moe", gates=str(tmp_path / "made" / "gates"))
    examiner = Examiner(str(home / "base"), adapters, dtype="float32", token_routers=[router])
    pairs = [pair for name in SAMPLES for pair in _pairs(examiner, name)]
    alone, together = (
        examiner.losses(pairs, use).sum() for use in (None, AdapterUse(router="moe"))
    )
    assert together < 0.8 * alone
    before = (tmp_path / "made" / "gates" / "gates.safetensors").stat().st_mtime_ns
    train_mixture(config, 3, 2, tmp_path / "made")
    assert (tmp_path / "made" / "gates" / "gates.safetensors").stat().st_mtime_ns == before
    with pytest.raises(ExpertConfigError, match="the result of another training"):
        train_mixture(config, 3, 1, tmp_path / "made")
    with pytest.raises(ExpertConfigError, match="cannot go through 4 of 3 experts"):
        train_mixture(config, 3, 4, tmp_path / "made")


def test_an_interrupted_mixture_goes_on_as_if_nothing_had_happened(home, tmp_path):
    from experts.finetune_config import AdapterTrainingConfig
    from experts.library.multitask import NAME, _Mixture, train_mixture

    data = tmp_path / "all.jsonl"
    rows = [{"prompt": p, "answer": a} for pairs in SAMPLES.values() for p, a in pairs]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = AdapterTrainingConfig(
        data=data, base=str(home / "base"), steps=4, batch_size=2, rank=2, precision="float32",
        target_modules=("q_proj",), checkpoint_every=1,
    )  # fmt: skip

    def stop(step: int, loss: float) -> None:
        if step == 2:
            raise KeyboardInterrupt

    def build(device):
        return _Mixture(config, 2, 1, device)

    options = {"n_experts": 2, "top_k": 1}
    train_mixture(config, 2, 1, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "parts", build, options=options, on_step=stop)
    train_mixture(config, 2, 1, tmp_path / "parts")
    for file in ("gates/gates.safetensors", f"adapters/{NAME}-1/adapter_model.safetensors"):
        one, other = (load_file(tmp_path / made / file) for made in ("whole", "parts"))
        assert all(torch.equal(one[name], other[name]) for name in one)
