"""The rules by which tokens choose adapters, against examples worked by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from experts.adapter_files import LowRank, write_updates  # noqa: E402
from experts.config import TokenRouterConfig  # noqa: E402
from experts.library.gates import solve_ridge  # noqa: E402
from experts.lora import AdapterSlots, AdapterUse  # noqa: E402
from experts.token_routing import (  # noqa: E402
    AffineGate,
    NormalisedGate,
    TokenRouter,
    read_token_router,
)
from tests.experts.latent import tiny  # noqa: E402

X = torch.tensor([[[3.0, 0.0, 0.0, 4.0]]])
# Two updates of rank 1: the first answers to the first input, the second to the last.
UPDATES = [
    LowRank(torch.tensor([[2.0, 0.0, 0.0, 0.0]]), torch.tensor([[1.0], [0.0]])),
    LowRank(torch.tensor([[0.0, 0.0, 0.0, -1.0]]), torch.tensor([[0.0], [3.0]])),
]


def _shares(gate) -> list[float]:
    hidden = torch.stack([X @ update.down.T for update in UPDATES], dim=2)
    shares: list[float] = gate(X, hidden)[0, 0].tolist()
    return shares


def _softmax(*scores: float) -> list[float]:
    total = sum(map(math.exp, scores))
    return [math.exp(score) / total for score in scores]


def test_arrow_takes_the_length_along_each_direction_whatever_its_sign_and_size():
    gate = TokenRouter("arrow", ("one", "two"), 2, temperature=2.0).gate("q", UPDATES)
    assert _shares(gate) == pytest.approx(_softmax(3 / 2, 4 / 2))


def test_spectr_takes_the_length_of_what_each_adapter_would_add():
    gate = TokenRouter("spectr", ("one", "two"), 2).gate("q", UPDATES)
    # |(6, 0)| and |(0, -12)|
    assert _shares(gate) == pytest.approx(_softmax(6, 12))


def test_vectors_and_inputs_are_normalised():
    vectors = torch.tensor([[1.0, -1.0, 1.0, -1.0], [1.0, 0.0, 0.0, 1.0]])
    # Less its mean, 1.75, over its spread, 1.7854: (.7001, -.9802, -.9802, 1.2602); vectors are
    # (1, -1, 1, -1) and (1, -1, -1, 1) then, and scores are divided by the root of 4.
    scores = [(0.7001 + 0.9802 - 0.9802 - 1.2602) / 2, (0.7001 + 0.9802 + 0.9802 + 1.2602) / 2]
    assert _shares(NormalisedGate(vectors, 2, 1.0)) == pytest.approx(_softmax(*scores), abs=1e-3)


def test_only_the_best_are_kept():
    weight, bias = torch.eye(4)[:2], torch.tensor([0.0, 1.0])
    assert _shares(AffineGate(weight, bias, 1, 0.1)) == [1, 0]
    assert _shares(AffineGate(weight, bias, 2, 1.0)) == pytest.approx(_softmax(3, 1))


def test_an_adapter_that_leaves_a_layer_alone_has_no_share_there():
    router = TokenRouter("arrow", ("one", "none", "two"), 3)
    gate = router.gate("q", [UPDATES[0], None, UPDATES[1]])
    one, two = _softmax(3, 4)
    assert _shares(gate) == pytest.approx([one, 0, two])
    assert router.gate("q", [None, None, None]) is None


def test_a_config_names_a_method_or_gates():
    arrow = read_token_router(
        TokenRouterConfig(name="r", method="arrow"), {"a": Path(), "b": Path()}
    )
    assert (arrow.adapters, arrow.top_k, arrow.temperature) == (("a", "b"), 4, 1.0)
    with pytest.raises(ValueError, match="give either a method"):
        TokenRouterConfig(name="r")
    with pytest.raises(ValueError, match="give either a method"):
        TokenRouterConfig(name="r", method="arrow", gates="x")


# Of each block the layer that runs first, and one that reads something else.
ADAPTED = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
PATHS = [f"model.layers.{number}.{layer}" for number in range(6) for layer in ADAPTED]
FIRSTS = PATHS[::2]


def _model() -> Any:
    return tiny.language_model("llama", 300).eval().requires_grad_(False)


def _block(path: str) -> str:
    return path.rpartition(".")[0]


def _ridge(domains: list[Any]) -> dict[str, Any]:
    """For each block, what predicts the domain from what its first layer reads in the base."""
    model = _model()
    read: dict[str, list[Any]] = {path: [] for path in FIRSTS}
    for path in FIRSTS:
        hear = read[path].append
        model.get_submodule(path).register_forward_pre_hook(lambda _, x, hear=hear: hear(x[0][0]))
    for ids in domains:
        model(input_ids=ids, use_cache=False)
    targets = torch.block_diag(*(torch.ones(ids.shape[1], 1) for ids in domains)).double()
    tensors = {}
    for path, inputs in read.items():
        x = torch.nn.functional.pad(torch.cat(inputs), (0, 1), value=1.0).double()
        solved = solve_ridge(x.T @ x, x.T @ targets).float()
        tensors[f"{_block(path)}.weight"] = solved[:-1].T.contiguous()
        tensors[f"{_block(path)}.bias"] = solved[-1]
    return tensors


@pytest.mark.parametrize("top_k", [1, 2])
def test_all_layers_of_a_block_share_out_adapters_as_its_ridge_solution_says(tmp_path, top_k):
    random = torch.Generator().manual_seed(0)
    plain = _model()

    def update(path: str) -> LowRank:
        outputs, inputs = plain.get_submodule(path).weight.shape
        down, up = (torch.randn(shape, generator=random) for shape in ((2, inputs), (outputs, 2)))
        return LowRank(down, 0.3 * up)

    adapters = {name: {path: update(path) for path in PATHS} for name in ("low", "high")}
    for name, updates in adapters.items():
        write_updates(tmp_path / name, updates, "base")
    low, high = (
        torch.randint(*words, (1, 60), generator=random) for words in ((3, 15), (200, 212))
    )
    tensors = _ridge([low, high])
    ids = torch.cat([low[:, ::5], high[:, ::5]], dim=1)

    router = TokenRouter("affine", tuple(adapters), top_k, tensors=tensors)
    folders = {name: tmp_path / name for name in adapters}
    model = _model()
    slots = AdapterSlots(model, folders, routers={"ridge": router})
    slots.set_rows([AdapterUse(router="ridge")])
    found = model(input_ids=ids, use_cache=False).logits

    shares: dict[str, Any] = {}

    def adapted(path: str) -> Any:
        def add(_: Any, inputs: Any, output: Any) -> Any:
            (x,), block = inputs, _block(path)
            if path in FIRSTS:
                scores = x @ tensors[f"{block}.weight"].T + tensors[f"{block}.bias"]
                best = torch.nn.functional.one_hot(scores.argmax(-1), 2).float()
                shares[block] = best if top_k == 1 else scores.softmax(-1)
            for number, updates in enumerate(adapters.values()):
                added = x @ updates[path].down.T @ updates[path].up.T
                output = output + shares[block][..., number, None] * added
            return output

        return add

    for path in PATHS:
        plain.get_submodule(path).register_forward_hook(adapted(path))
    expected = plain(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    # What the first block reads tells the domains apart, so that both adapters are chosen.
    assert shares[_block(PATHS[0])][0].argmax(-1).tolist() == [0] * 12 + [1] * 12
