"""Arrow looks at each adapter alone: one that joins or leaves changes nothing for the others."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from experts.adapter_files import LowRank, read_updates, write_updates  # noqa: E402
from experts.config import TokenRouterConfig  # noqa: E402
from experts.lora import NO_ADAPTER, AdapterSlots, AdapterUse  # noqa: E402
from experts.token_routing import ArrowGate, read_token_router  # noqa: E402
from tests.experts.latent import tiny  # noqa: E402

# By what makes the adapters: ranks differ, and the last leaves a layer alone.
RANKS = {"a": 2, "b": 3, "c": 1, "d": 2}
QUERY, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
LAYERS = {name: (QUERY, DOWN) if name != "d" else (DOWN,) for name in RANKS}


def _model():
    return tiny.language_model("llama", 300).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> dict[str, Path]:
    """Folders of the adapters."""
    home, model = tmp_path_factory.mktemp("library"), _model()
    for seed, (name, rank) in enumerate(RANKS.items()):
        drawn = torch.Generator().manual_seed(seed)
        updates = {}
        for path in LAYERS[name]:
            n_out, n_in = model.get_submodule(path).weight.shape
            updates[path] = LowRank(
                torch.randn(rank, n_in, generator=drawn), torch.randn(n_out, rank, generator=drawn)
            )
        write_updates(home / name, updates, "tiny")
    return {name: home / name for name in RANKS}


def _arrow(library, names):
    """A router built anew from a library of these adapters."""
    return read_token_router(
        TokenRouterConfig(name="arrow", method="arrow", top_k=2),
        {name: library[name] for name in names},
    )


def _gate(library, names, path) -> ArrowGate:
    updates = [read_updates(library[name]).get(path) for name in names]
    gate = _arrow(library, names).gate(path, updates)
    assert isinstance(gate, ArrowGate)
    return gate


@pytest.mark.parametrize("path", [QUERY, DOWN])
@pytest.mark.parametrize(("fewer", "more"), [("abc", "abcd"), ("acd", "abcd"), ("bd", "dab")])
def test_prototypes_of_the_others_stay_and_decide_as_those_built_anew(library, fewer, more, path):
    small, large = _gate(library, fewer, path), _gate(library, more, path)
    kept = [more.index(name) for name in fewer]
    new = [more.index(name) for name in more if name not in fewer]
    assert torch.equal(large.prototypes[kept], small.prototypes)
    # One that leaves: its row goes. One that joins: its row comes, from its own files.
    joined = torch.zeros_like(large.prototypes)
    joined[kept] = small.prototypes
    for place in new:
        joined[place] = _gate(library, more[place] + "a", path).prototypes[0]
    x = torch.randn(2, 50, joined.shape[1], generator=torch.Generator().manual_seed(9))
    grown = ArrowGate(joined, 2, 1.0)
    grown.absent = large.absent
    shrunken = ArrowGate(large.prototypes[kept], 2, 1.0)
    shrunken.absent = small.absent
    for changed, rebuilt in ((grown, large), (shrunken, small)):
        expected = rebuilt(x, x)
        # Every adapter that changes the layer is chosen somewhere.
        there = [path in LAYERS[name] for name in (more if rebuilt is large else fewer)]
        assert (expected > 0).any(dim=(0, 1)).tolist() == there
        assert torch.equal(changed(x, x), expected)


def _logits(library, hosted, routed):
    model = _model()
    folders = {name: library[name] for name in hosted}
    slots = AdapterSlots(model, folders, routers={"arrow": _arrow(library, routed)})
    uses = [AdapterUse(router="arrow"), NO_ADAPTER]
    slots.set_rows(uses)
    ids = torch.randint(3, 200, (1, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = model(input_ids=ids.expand(2, -1), use_cache=False).logits
    assert not torch.equal(found[0], found[1])
    return found


@pytest.mark.parametrize("hosted", ["abcd", "dcab"])
def test_adapters_that_are_there_but_not_routed_change_no_answer(library, hosted):
    torch.testing.assert_close(
        _logits(library, hosted, "abc"), _logits(library, "abc", "abc"), atol=1e-6, rtol=1e-5
    )
    whole = _logits(library, "abcd", "abcd")
    torch.testing.assert_close(_logits(library, hosted, "abcd"), whole, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(whole, _logits(library, "abc", "abc"), atol=1e-4)
