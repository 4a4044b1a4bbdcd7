"""Adapters in slots: alone, mixed, fused, and more of them than there is memory for."""

from __future__ import annotations

import asyncio
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from experts import lora  # noqa: E402
from experts.adapter_files import read_updates  # noqa: E402
from experts.decoding import Prompt, Row  # noqa: E402
from experts.errors import ExpertConfigError, InvalidRequestError  # noqa: E402
from experts.lora import AHEAD, MADE, NO_ADAPTER, AdapterSlots, AdapterUse  # noqa: E402
from experts.passes import ModelPasses  # noqa: E402
from experts.sampling import Sampler, SamplingOptions  # noqa: E402
from experts.token_routing import TokenRouter  # noqa: E402
from tests.experts.latent import tiny  # noqa: E402
from tests.experts.test_decoding import Sink  # noqa: E402

NAMES = ("a", "b", "c", "d", "e")
IDS = torch.randint(3, 200, (1, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Five adapters of one model, by PEFT."""
    from peft import LoraConfig, get_peft_model

    home = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(NAMES):
        settings = LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"],
                              task_type="CAUSAL_LM", init_lora_weights=False)  # fmt: skip
        model = _model()
        # Behind the model, which has a seed of its own.
        torch.manual_seed(seed)
        get_peft_model(model, settings).save_pretrained(home / name)
    return {name: home / name for name in NAMES}


@pytest.fixture(scope="module")
def peft_model(folders) -> Any:
    """PEFT's own model with all of them."""
    from peft import PeftModel

    wrapped = PeftModel.from_pretrained(_model(), folders["a"], adapter_name="a")
    for name in NAMES[1:]:
        wrapped.load_adapter(folders[name], adapter_name=name)
    return wrapped.eval()


@pytest.fixture
def opened(folders):
    """A model and its slots."""

    def open_(**options) -> tuple[Any, AdapterSlots]:
        model = _model()
        return model, AdapterSlots(model, folders, **options)

    return open_


@pytest.fixture
def copied(folders, tmp_path) -> dict[str, Path]:
    """The same adapters in folders that a test may delete."""
    return {name: shutil.copytree(folder, tmp_path / name) for name, folder in folders.items()}


@pytest.fixture
def read(monkeypatch) -> list[weakref.ref[Any]]:
    """A matrix of each adapter that slots read or make, for as long as it is kept."""
    found: list[weakref.ref[Any]] = []

    def noting(function: Any) -> Any:
        def call(*given: Any) -> Any:
            updates = function(*given)
            found.append(weakref.ref(next(iter(updates.values())).down))
            return updates

        return call

    for name in ("read_updates", "fuse"):
        monkeypatch.setattr(lora, name, noting(getattr(lora, name)))
    return found


def _model() -> Any:
    return tiny.language_model("llama", 300).eval().requires_grad_(False)


def _logits(model: Any, slots: AdapterSlots, uses: list[AdapterUse]) -> Any:
    for use in uses:
        slots.acquire(use)
    slots.set_rows(uses)
    with torch.no_grad():
        found = model(input_ids=IDS.expand(len(uses), -1), use_cache=False).logits
    for use in uses:
        slots.release(use)
    return found


def _mixed(slots: AdapterSlots, **shares: float) -> AdapterUse:
    return AdapterUse(tuple((slots.adapter(name), share) for name, share in shares.items()))


def _combined(peft_model: Any, shares: dict[str, float], kind: str) -> Any:
    peft_model.add_weighted_adapter([*shares], [*shares.values()], "sum", combination_type=kind)
    peft_model.set_adapter("sum")
    try:
        with torch.no_grad():
            return peft_model(input_ids=IDS, use_cache=False).logits
    finally:
        peft_model.set_adapter("a")
        peft_model.delete_adapter("sum")


def test_whole_adapters_are_pefts_and_rows_do_not_touch_each_other(opened, peft_model):
    model, slots = opened()
    uses = [NO_ADAPTER, *(_mixed(slots, **{name: 1.0}) for name in NAMES)]
    together = _logits(model, slots, uses)
    with peft_model.disable_adapter(), torch.no_grad():
        torch.testing.assert_close(together[:1], peft_model(input_ids=IDS).logits)
    for row, name in enumerate(NAMES, 1):
        peft_model.set_adapter(name)
        with torch.no_grad():
            torch.testing.assert_close(together[row : row + 1], peft_model(input_ids=IDS).logits)
    with_mixtures = _logits(model, slots, [*uses, _mixed(slots, a=0.5, c=0.5)])
    assert torch.equal(with_mixtures[: len(uses)], _logits(model, slots, uses * 2)[: len(uses)])


def test_mixture_adds_up_what_each_adapter_does(opened, peft_model):
    model, slots = opened()
    shares = {"a": 0.7, "c": -0.2, "e": 0.5}
    found = _logits(model, slots, [_mixed(slots, **shares), NO_ADAPTER])[:1]
    torch.testing.assert_close(found, _combined(peft_model, shares, "cat"), atol=1e-5, rtol=1e-4)


def test_fusion_adds_up_the_matrices_of_adapters(opened, folders):
    """A and B are summed each by itself, so the update has products of different adapters."""
    model, slots = opened(n_slots=2)
    weights = {"a": 0.7, "c": -0.2}
    updates = [read_updates(folders[name]) for name in weights]
    merged = _model()
    for path in updates[0]:
        down, up = (
            sum(w * getattr(u[path], part) for u, w in zip(updates, weights.values(), strict=True))
            for part in ("down", "up")
        )
        merged.get_submodule(path).weight += up @ down
    found = _logits(model, slots, [AdapterUse(((slots.fused(weights), 1.0),))])
    torch.testing.assert_close(found, merged(input_ids=IDS).logits, atol=1e-5, rtol=1e-4)


def test_more_adapters_than_memory_has_room_for_answer_as_if_all_were_there(opened):
    model, slots = opened()
    expected = {name: _logits(model, slots, [_mixed(slots, **{name: 1.0})]) for name in NAMES}
    model, slots = opened(n_slots=2)
    for name in [*NAMES, *reversed(NAMES), "a", "c", "a", "d"]:
        assert torch.equal(_logits(model, slots, [_mixed(slots, **{name: 1.0})]), expected[name])
        assert _n_slots(slots) == 2


def _n_slots(slots: AdapterSlots) -> int:
    """Adapters that the stacks of all layers have room for."""
    (found,) = {len(stack) for one in slots.layers.values() for stack in (one.down, one.up)}
    return found - 1


def test_few_matrices_are_kept_beside_those_in_slots(opened, read):
    model, slots = opened(n_slots=2)
    names = [*NAMES, *NAMES[:2]]
    uses = [_mixed(slots, **{name: 1.0}) for name in names]
    uses += [AdapterUse(((slots.fused({"a": 0.5, "b": 0.1 * n}), 1.0),)) for n in range(1, 9)]
    assert len(read) > AHEAD
    assert sum(one() is not None for one in read) == AHEAD
    for use in reversed(uses):
        _logits(model, slots, [use])
    # All uses are still there, as rows would be that wait or are being answered.
    assert sum(one() is not None for one in read) == 0
    assert _n_slots(slots) == 2
    opened()
    assert sum(one() is not None for one in read) == 0


def test_what_was_read_ahead_is_not_read_again(opened, read):
    model, slots = opened(n_slots=2)
    uses = [_mixed(slots, **{name: 1.0}) for name in NAMES[:AHEAD]]
    for _ in range(2):
        _mixed(slots, **dict.fromkeys(NAMES[:AHEAD], 1.0))
    for use in uses:
        _logits(model, slots, [use])
    assert len(read) == AHEAD


def test_an_adapter_that_cannot_be_read_takes_no_slot_and_no_users(opened, copied):
    plain, all_slots = opened()
    expected = {n: _logits(plain, all_slots, [_mixed(all_slots, **{n: 1.0})] * 2) for n in NAMES}
    model = _model()
    slots = AdapterSlots(model, copied, n_slots=2)
    lost = _mixed(slots, a=1.0)
    for name in "abc":
        _logits(model, slots, [_mixed(slots, **{name: 1.0})])
    shutil.rmtree(copied["a"])
    for use in (lost, AdapterUse((*_mixed(slots, b=0.5).shares, *lost.shares))):
        with pytest.raises(ExpertConfigError, match="holds no adapter_config"):
            slots.acquire(use)
        assert slots.fits(_mixed(slots, d=0.5, e=0.5))
    for pair in ("ce", "bd", "ed", "cb"):
        found = _logits(model, slots, [_mixed(slots, **{name: 1.0}) for name in pair])
        for row, name in enumerate(pair):
            assert torch.equal(found[row], expected[name][row])
    with pytest.raises(ExpertConfigError):
        slots.adapter("a")


def test_memory_that_runs_out_while_an_adapter_comes_in_loses_no_slot(opened, monkeypatch):
    """Whether a layer fails to grow, or to take an adapter that others have taken."""
    model, slots = opened()
    mixed = _mixed(slots, a=0.5, b=0.5)
    expected = {n: _logits(model, slots, [_mixed(slots, **{n: 1.0})] * 2) for n in NAMES}
    mixture = _logits(model, slots, [mixed])
    *_, last = slots.layers.values()
    merged = AdapterUse(((slots.fused({"a": 0.5, "b": 0.5}), 1.0),))
    for method in ("grow", "put"):
        with monkeypatch.context() as patch:
            patch.setattr(last, method, _raise)
            with pytest.raises(MemoryError):
                slots.acquire(merged)
        assert torch.equal(_logits(model, slots, [mixed]), mixture)
    for name in NAMES:
        found = _logits(model, slots, [_mixed(slots, **{name: 1.0}), merged])
        assert torch.equal(found[0], expected[name][0])
    assert _n_slots(slots) == len(NAMES) + 1


def _raise(*given: Any) -> None:
    raise MemoryError


def test_a_row_whose_adapter_is_gone_has_no_place_and_others_keep_theirs(copied):
    model = _model()
    slots = AdapterSlots(model, copied, n_slots=2)
    passes = ModelPasses(model, slots, max_rows=2)
    rows = [
        Row(Prompt([5, 6], _mixed(slots, **{name: 1.0})), Sampler(SamplingOptions(temperature=0)),
            4, frozenset(), Sink())
        for name in "abcde"
    ]  # fmt: skip
    shutil.rmtree(copied["a"])
    assert passes.join(rows[1]) is None
    # Four more were asked for since, so its matrices were let go.
    assert isinstance(passes.join(rows[0]), ExpertConfigError)
    assert passes.join(rows[2]) is None
    for row in rows[1:3]:
        _, logits = passes.read(row, 100)
        assert logits is not None
    passes.leave(rows[1:3])
    assert slots.fits(_mixed(slots, d=0.5, e=0.5))


def test_rows_of_a_batch_change_their_adapters_from_pass_to_pass(opened):
    model, slots = opened()
    expected = {
        name: _logits(model, slots, [_mixed(slots, **{name: 1.0})] * 4)[0] for name in NAMES
    }
    model, slots = opened(n_slots=2)
    for rows in ("aabb", "abab", "ccdd", "ddd", "ccddcc", "ecec", "aaaa"):
        found = _logits(model, slots, [_mixed(slots, **{name: 1.0}) for name in rows])
        for name, logits in zip(rows, found, strict=True):
            torch.testing.assert_close(logits, expected[name], atol=1e-5, rtol=1e-4)


def test_adapters_in_use_stay_and_the_longest_unused_goes(opened):
    _, slots = opened(n_slots=2)
    a, b, c = (_mixed(slots, **{name: 1.0}) for name in "abc")
    slots.acquire(a)
    slots.acquire(b)
    assert slots.fits(a)
    assert not slots.fits(c)
    assert not slots.fits(AdapterUse((*a.shares, *c.shares)))
    slots.release(b)
    assert slots.fits(c)
    slots.acquire(c)
    slots.set_rows([a, c])
    assert not slots.fits(b)
    with pytest.raises(InvalidRequestError, match="room for 2 adapters at a time, but 3 are mixed"):
        slots.check(_mixed(slots, a=0.2, b=0.3, c=0.5))
    slots.check(AdapterUse(((slots.fused({"a": 0.2, "b": 0.3, "c": 0.5}), 1.0),)))


def test_adapters_that_do_not_fit_the_model_are_refused_when_it_opens(folders, tmp_path):
    with pytest.raises(ExpertConfigError, match=r"'a' has updates of shape .* made for another"):
        AdapterSlots(tiny.language_model("qwen2", 300), folders, n_slots=1)
    with pytest.raises(ExpertConfigError, match="holds no adapter_config"):
        AdapterSlots(_model(), {**folders, "gone": tmp_path}, n_slots=1)
    router = TokenRouter("arrow", NAMES, 2)
    with pytest.raises(ExpertConfigError, match="room for 4, others included"):
        AdapterSlots(_model(), folders, n_slots=4, routers={"arrow": router})
    with pytest.raises(ExpertConfigError, match="shares out 'x', which the model has not"):
        AdapterSlots(_model(), folders, routers={"arrow": TokenRouter("arrow", ("x",), 1)})


@pytest.mark.parametrize("top_k", [1, 3])
def test_arrow_is_pefts(folders, opened, top_k):
    from peft import ArrowConfig
    from peft.tuners.lora.arrow import ArrowLoraLinearLayer, create_arrow_model

    exact = ArrowLoraLinearLayer.top_right_singular_vec_from_BA
    monkeypatch = pytest.MonkeyPatch()
    # Fifteen steps of power iteration leave differences that have nothing to do with the method.
    monkeypatch.setattr(
        ArrowLoraLinearLayer, "top_right_singular_vec_from_BA",
        lambda self, a, b: exact(self, a, b, iters=3000),
    )  # fmt: skip
    with monkeypatch.context():
        arrow = create_arrow_model(
            _model(), [str(folder) for folder in folders.values()], ArrowConfig(top_k=top_k)
        )
        with torch.no_grad():
            expected = arrow.eval()(input_ids=IDS).logits
    monkeypatch.undo()
    model, slots = opened(routers={"arrow": TokenRouter("arrow", NAMES, top_k)})
    found = _logits(model, slots, [AdapterUse(router="arrow"), NO_ADAPTER, _mixed(slots, a=1.0)])
    torch.testing.assert_close(found[:1], expected, atol=1e-4, rtol=1e-3)
    plain, other = opened()
    assert torch.equal(found[1:], _logits(plain, other, [NO_ADAPTER, _mixed(other, a=1.0)] * 2)[:2])


def test_routers_adapters_stay_in_memory(opened):
    _, slots = opened(n_slots=3, routers={"arrow": TokenRouter("arrow", ("a", "b"), 1)})
    slots.acquire(_mixed(slots, c=1.0))
    assert not slots.fits(_mixed(slots, d=1.0))
    assert slots.fits(_mixed(slots, a=1.0))
    with pytest.raises(InvalidRequestError, match="room for 1 "):
        slots.check(_mixed(slots, d=0.5, e=0.5))
    slots.check(_mixed(slots, a=0.5, b=0.5, d=0.5))


def test_merges_have_places_beside_adapters_that_stay(opened, read):
    """Without a bound no adapter has to go for them; with one, there must be room for others."""
    model, slots = opened(routers={"arrow": TokenRouter("arrow", NAMES, 1)})
    expected = _logits(model, slots, [AdapterUse(router="arrow")])
    assert _n_slots(slots) == len(NAMES)
    merges = [{"a": 0.1 * n, "b": 0.5} for n in range(1, MADE + 5)]
    uses = [AdapterUse(((slots.fused(weights), 1.0),)) for weights in merges]
    alone = [_logits(model, slots, [use]) for use in uses]
    assert _n_slots(slots) == len(NAMES) + MADE
    read.clear()
    for use, logits in zip(uses[-MADE:], alone[-MADE:], strict=True):
        assert torch.equal(_logits(model, slots, [use]), logits)
    assert not read
    assert torch.equal(_logits(model, slots, [uses[0]]), alone[0])
    assert len(read) == 1
    assert torch.equal(_logits(model, slots, [AdapterUse(router="arrow")]), expected)
    with pytest.raises(ExpertConfigError, match="room for 2, others included"):
        opened(n_slots=2, routers={"arrow": TokenRouter("arrow", ("a", "b"), 1)})


def test_after_a_failure_no_adapter_stays_in_use(opened):
    _, slots = opened(n_slots=3, routers={"arrow": TokenRouter("arrow", ("a", "b"), 1)})
    slots.acquire(_mixed(slots, c=1.0))
    slots.release_all()
    assert slots.fits(_mixed(slots, d=1.0))
    assert not slots.fits(_mixed(slots, d=0.5, e=0.5))


@pytest.mark.slow
def test_engine_serves_more_adapters_than_it_holds_and_mixes_them(folders, tmp_path):
    from experts.config import AdapterConfig, TokenRouterConfig, TransformersExpertConfig
    from experts.transformers_engine import TransformersEngine
    from experts.types import ChatRequest, Mixture, collect

    engine = TransformersEngine(
        TransformersExpertConfig(
            name="base", engine="transformers", model=tiny.save(tmp_path / "base", "llama"),
            dtype="float32", threads=1, max_loaded_adapters=3, max_batch_size=4,
            adapters=tuple(AdapterConfig(name=n, path=str(f)) for n, f in folders.items()),
            token_routers=(TokenRouterConfig(name="arrow", method="arrow", adapters=("a", "b")),),
        )
    )  # fmt: skip

    async def ask(name: str, **fields) -> str:
        body = {"messages": [{"role": "user", "content": "Name two colours."}], "max_tokens": 8,
                "temperature": 0, **fields}  # fmt: skip
        expert = engine.experts()[name]
        found = await collect(expert.stream(ChatRequest.model_validate(body), timeout_s=60))
        return found.text

    async def drill() -> None:
        names = ["base", *NAMES, "arrow"]
        alone = {name: await ask(name) for name in names}
        together = await asyncio.gather(*(ask(name) for name in names * 20))
        assert together == [alone[name] for name in names] * 20
        assert await ask("base", adapters={"c": 1.0}) == alone["c"]
        assert await ask("base", adapters={}) == alone["base"]
        assert await ask("base", adapters={"a": 0.5, "c": 0.5}) != alone["base"]
        merged = {"adapters": {"c": 0.5, "d": 0.5}, "adapter_merging": "parameters"}
        assert await ask("base", **merged) != alone["base"]
        body = {"messages": [{"role": "user", "content": "hello"}], "n": 2, "max_tokens": 3}
        for asked, said in (
            (merged, Mixture({"c": 0.5, "d": 0.5}, "parameters")),
            ({"adapters": {"c": 2}}, Mixture({"c": 2.0}, "outputs")),
            ({}, None),
        ):
            request = ChatRequest.model_validate({**body, **asked})
            found = [one async for one in engine.experts()["base"].stream(request, timeout_s=60)]
            assert [chunk.mixture for chunk in found] == [said] + [None] * (len(found) - 1)
        for fields, message in (
            ({"adapters": {"x": 1.0}}, "adapters names 'x', but 'base' has 'a'"),
            ({"adapters": {"a": 99}}, "shares from -8 to 8"),
            ({"adapters": ["a"]}, "must map names"),
            ({"adapters": {"c": 0.5, "d": 0.5}}, "room for 1 adapters"),
            ({"adapters": {"a": 1}, "adapter_merging": "sum"}, "one of outputs, parameters"),
        ):
            with pytest.raises(InvalidRequestError, match=message):
                await ask("base", **fields)
        with pytest.raises(InvalidRequestError, match="mixed by 'base', not by 'a'"):
            await ask("a", adapters={"a": 1.0})
        await engine.aclose()

    asyncio.run(drill())
