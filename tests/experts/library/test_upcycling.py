"""Dense fine-tunes as one mixture of experts that transformers loads."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from experts.errors import ExpertConfigError  # noqa: E402
from experts.finetune_data import ChatPair  # noqa: E402
from experts.library.upcycling import dense, upcycle  # noqa: E402
from tests.experts.latent import tiny  # noqa: E402

SAMPLES = {
    "one": [ChatPair("Name two colours.", "the quick brown fox"), ChatPair("hello", "lazy dog")],
    "two": [ChatPair("Count from one to four.", "one two three four"), ChatPair("hundred", "user")],
}
IDS = torch.randint(3, 200, (1, 12), generator=torch.Generator().manual_seed(0))


def _upcycled(home, out, load, **options):
    upcycle(load, AutoTokenizer.from_pretrained(home / "base"), SAMPLES, out, **options)
    return AutoModelForCausalLM.from_pretrained(out, dtype="float32").eval()


def test_experts_that_are_alike_are_the_dense_model(home, tmp_path):
    """Whatever the routers say: shares sum to one."""
    base = str(home / "base")
    load = {name: lambda: dense(base, home / "one") for name in SAMPLES}
    for top_k in (1, 2):
        mixture = _upcycled(home, tmp_path / str(top_k), load, top_k=top_k)
        assert mixture.config.model_type == "mixtral"
        with torch.no_grad():
            expected = dense(base, home / "one")(input_ids=IDS).logits
            torch.testing.assert_close(
                mixture(input_ids=IDS).logits, expected, atol=1e-4, rtol=1e-3
            )


def test_layers_are_means_mlps_are_each_ones_own_and_routers_know_their_domain(home, tmp_path):
    base = str(home / "base")
    load = {name: (lambda name=name: dense(base, home / name)) for name in SAMPLES}
    mixture = _upcycled(home, tmp_path, load)
    one, two = load["one"](), load["two"]()
    layer = mixture.model.layers[2]
    query = (
        one.model.layers[2].self_attn.q_proj.weight + two.model.layers[2].self_attn.q_proj.weight
    ) / 2
    torch.testing.assert_close(layer.self_attn.q_proj.weight, query)
    for place, model in enumerate((one, two)):
        mlp = model.model.layers[2].mlp
        torch.testing.assert_close(layer.mlp.experts.down_proj[place], mlp.down_proj.weight)
        gate, up = layer.mlp.experts.gate_up_proj[place].chunk(2)
        torch.testing.assert_close(gate, mlp.gate_proj.weight)
        torch.testing.assert_close(up, mlp.up_proj.weight)
    torch.testing.assert_close(layer.mlp.gate.weight.norm(dim=1), torch.ones(2))
    heard = []
    layer.mlp.gate.register_forward_hook(lambda module, inputs, output: heard.append(output[0]))
    tokenizer = AutoTokenizer.from_pretrained(home / "base")
    for pairs in SAMPLES.values():
        ids = tokenizer.apply_chat_template([{"role": "user", "content": pairs[0].prompt}],
                                            return_tensors="pt", return_dict=True)  # fmt: skip
        with torch.no_grad():
            mixture(**ids)
    first, second = (logits.softmax(-1).mean(0) for logits in heard)
    assert first[0] > second[0]


def test_other_architectures_are_refused(home, tmp_path):
    load = {"one": lambda: tiny.language_model("qwen2", 300), "two": lambda: None}
    with pytest.raises(ExpertConfigError, match="'one' is a qwen2"):
        _upcycled(home, tmp_path, load)
