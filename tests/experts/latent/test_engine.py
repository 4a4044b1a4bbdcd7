from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from experts import errors
from experts.config import LatentExpertConfig
from experts.latent.artefact import load_latent, read_latent, save_latent
from experts.latent.config import MemberConfig
from experts.latent.members import load_members
from experts.registry import open_experts
from experts.testing import expert_checks
from experts.types import ChatRequest, CompletionRequest, collect
from tests.experts.latent import tiny

# By name: architecture and size of the vocabulary.
MEMBERS = {"general": ("llama", 420), "maths": ("llama", 420), "other": ("gemma3", 300)}
CHECKS = [pytest.param(check, id=name) for name, check in expert_checks()]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Three experts and an artefact, on disk."""
    folder = tmp_path_factory.mktemp("latent")
    for seed, (name, (architecture, size)) in enumerate(MEMBERS.items()):
        tiny.save(folder / name, architecture, size, seed)
    torch.set_num_threads(1)
    members = load_members(_members(folder), n_stacks=3, dtype="float32", device="cpu")
    save_latent(folder / "artefact", tiny.latent_model(members), members, {})
    return folder


def _members(folder: Path) -> list[MemberConfig]:
    return [MemberConfig(name=name, model=str(folder / name)) for name in MEMBERS]


def _config(folder: Path, **fields: Any) -> LatentExpertConfig:
    defaults: dict[str, Any] = {
        "name": "thoughts",
        "engine": "latent",
        "artefact": str(folder / "artefact"),
        "members": _members(folder),
        "dtype": "float32",
        "max_batch_size": 8,
        "default_max_tokens": 32,
        "threads": 1,
    }
    return LatentExpertConfig.model_validate({**defaults, **fields})


@pytest.fixture
async def engine(home):
    """An engine of its own, since experts may be taken out."""
    from experts.latent.engine import LatentEngine

    opened = LatentEngine(_config(home))
    yield opened
    await opened.aclose()


@pytest.fixture(scope="module")
def shared(home):
    from experts.latent.engine import LatentEngine

    opened = LatentEngine(_config(home))
    yield opened
    asyncio.run(opened.aclose())


class Listening:
    """An expert that is asked with peers where a request names none."""

    def __init__(self, expert: Any, **peers: float) -> None:
        self._expert = expert
        self._peers = peers
        self.card = expert.card

    def stream(self, request: Any, *, timeout_s: float) -> Any:
        fields = {"peers": self._peers, **(request.model_extra or {})}
        return self._expert.stream(request.model_copy(update=fields), timeout_s=timeout_s)

    async def check_health(self) -> None:
        await self._expert.check_health()

    async def aclose(self) -> None:
        await self._expert.aclose()


@pytest.mark.parametrize("check", CHECKS)
async def test_expert_with_peers(check, shared):
    await check(Listening(shared.experts()["general"], maths=0.3, other=0.3))


def _chat(text: str = "hello world", **fields: Any) -> ChatRequest:
    defaults = {"max_tokens": 6, "temperature": 0, "ignore_eos": True}
    messages = [{"role": "user", "content": text}]
    return ChatRequest.model_validate({"messages": messages, **defaults, **fields})


async def _ask(expert, text="hello world", **fields):
    return await collect(expert.stream(_chat(text, **fields), timeout_s=60))


async def test_answer_with_peers_is_another_than_alone_and_says_so(shared):
    expert = shared.experts()["general"]
    alone = await _ask(expert, max_tokens=12)
    peers = {"maths": 0.4, "other": 0.4}
    together = await _ask(expert, max_tokens=12, peers=peers)
    assert alone.choices[0].peers is None
    assert together.choices[0].peers == peers
    assert together.text != alone.text


async def test_stream_says_on_its_first_chunk_whom_it_listens_to(shared):
    """Also for each of several answers, which share what was read of the prompt."""
    expert = shared.experts()["general"]
    request = _chat(peers={"other": 0.5}, n=3, temperature=1.0, seed=1)
    chunks = [chunk async for chunk in expert.stream(request, timeout_s=60)]
    for index in range(3):
        own = [chunk.peers for chunk in chunks if chunk.index == index and not chunk.usage]
        assert own[0] == {"other": 0.5}
        assert set(map(str, own[1:])) <= {"None"}


async def test_seeds_constraints_and_logprobs_work_with_peers(shared):
    expert, peers = shared.experts()["general"], {"maths": 0.3, "other": 0.3}
    options = {"temperature": 1.0, "seed": 3, "logprobs": True, "peers": peers}
    alone = await _ask(expert, **options)
    others = [_ask(expert, f"one {n}", peers={"other": 0.2}) for n in range(3)]
    batched, *_ = await asyncio.gather(_ask(expert, **options), *others, _ask(expert, "word " * 30))
    assert batched.text == alone.text
    values = [
        [entry["logprob"] for entry in answer.choices[0].logprobs["content"]]
        for answer in (alone, batched)
    ]
    assert values[1] == pytest.approx(values[0], abs=1e-3)
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    shape = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    answer = await _ask(expert, response_format=shape, peers=peers, max_tokens=40, ignore_eos=False)
    assert isinstance(json.loads(answer.text)["a"], bool)
    request = CompletionRequest.model_validate(
        {"prompt": ["one 🎉", "two"], "max_tokens": 4, "temperature": 0, "peers": peers}
    )
    completion = await collect(expert.stream(request, timeout_s=60))
    assert [choice.peers for choice in completion.choices] == [peers, peers]


@pytest.mark.parametrize(
    ("peers", "reason"),
    [
        ({"nobody": 0.5}, "can listen to 'maths', 'other'"),
        ({"general": 0.5}, "can listen to"),
        ({"maths": 0.0}, "gates above 0"),
        ({"maths": 1.5}, "gates above 0"),
        ({"maths": float("nan")}, "gates above 0"),
        ({"maths": True}, "gates above 0"),
        ({"maths": "0.5"}, "gates above 0"),
        (["maths"], "must map names"),
        ({"maths": 0.6, "other": 0.5}, "sum to 1.1"),
    ],
)
async def test_malformed_peers_are_refused(shared, peers, reason):
    with pytest.raises(errors.InvalidRequestError, match=reason) as caught:
        await _ask(shared.experts()["general"], peers=peers)
    assert caught.value.param == "peers"


async def test_peers_may_take_all_the_weight(shared):
    peers = {"maths": 0.7, "other": 0.3}
    assert (await _ask(shared.experts()["general"], peers=peers)).choices[0].peers == peers


async def test_expert_without_peers_does_no_others_work(shared, monkeypatch):
    """It costs what the model costs: no hook listens, no peer reads, nothing is remembered."""
    from experts.latent.interaction import Interaction
    from experts.latent.stacks import StackedModel

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("nobody asked for peers")

    for cls, name in ((Interaction, "note"), (StackedModel, "read"), (StackedModel, "listening")):
        monkeypatch.setattr(cls, name, fail)
    nobody: list[dict[str, float] | None] = [None, {}]
    for peers in nobody:
        answer = await _ask(shared.experts()["general"], peers=peers)
        assert answer.usage.completion_tokens == 6
        # Whoever asked for peers is told that there are none.
        assert answer.choices[0].peers == peers


async def test_peer_whose_context_is_too_short_is_left_out(home):
    from experts.latent.engine import LatentEngine

    engine = LatentEngine(_config(home, context_length=120))
    expert = engine.experts()["general"]
    assert expert.card.context_length == 120
    # The peer's tokenizer knows fewer words.
    long = "the quick brown fox jumps over the lazy dog" * 5
    writer, other = (engine._tokenizers[name].piece(long) for name in ("general", "other"))
    assert len(writer) < 90
    assert len(other) > 120
    answer = await _ask(expert, long, peers={"maths": 0.3, "other": 0.3})
    assert answer.choices[0].peers == {"maths": 0.3}
    assert (await _ask(expert, long, peers={"other": 0.3})).choices[0].peers == {}
    with pytest.raises(errors.ContextLengthError):
        await _ask(expert, long * 5, peers={"maths": 0.3})
    await engine.aclose()


async def test_dropped_expert_is_missed_by_nobody(engine):
    """Answers go on without it, those it writes fail, and no later one waits for it."""
    experts = engine.experts()
    peers = {"maths": 0.3, "other": 0.3}
    began = asyncio.Event()

    async def watch(expert: Any, **fields: Any) -> Any:
        async def seen() -> Any:
            async for chunk in expert.stream(_chat(max_tokens=60, **fields), timeout_s=60):
                began.set()
                yield chunk

        return await collect(seen())

    listening = [asyncio.create_task(watch(experts["general"], peers=peers)) for _ in range(4)]
    writing = asyncio.create_task(watch(experts["maths"], peers={"general": 0.5}))
    # One more than there are places: it has not begun when its writer goes.
    waiting = [asyncio.create_task(_ask(experts["maths"], max_tokens=60)) for _ in range(5)]
    await began.wait()
    await asyncio.to_thread(engine.drop, "maths")
    for answer in await asyncio.gather(*listening):
        assert answer.usage.completion_tokens == 60
        assert answer.choices[0].peers == {"other": 0.3}
    for failed in await asyncio.gather(writing, *waiting, return_exceptions=True):
        assert isinstance(failed, errors.ExpertUnavailableError)
    with pytest.raises(errors.ExpertUnavailableError):
        await _ask(experts["maths"])
    with pytest.raises(errors.ExpertUnavailableError):
        await experts["maths"].check_health()
    with pytest.raises(errors.ExpertUnavailableError):
        engine.drop("maths")
    await experts["general"].check_health()
    assert (await _ask(experts["general"], peers=peers)).choices[0].peers == {"other": 0.3}
    assert (await _ask(experts["other"])).choices[0].peers is None
    async with asyncio.timeout(20):
        while engine.load:
            await asyncio.sleep(0.01)


async def test_dropped_expert_is_freed(engine):
    import weakref

    model = weakref.ref(engine._passes._model.members["maths"].model)
    assert model() is not None
    await asyncio.to_thread(engine.drop, "maths")
    assert model() is None


async def test_replica_is_replaced_only_when_none_of_its_experts_can_answer(home):
    from deployments.engine_server import EngineServer

    class Server(EngineServer):
        # Ray awaits that of the base; Python would not.
        def __del__(self) -> None:  # type: ignore[override]
            pass

    server = Server(_config(home).model_dump(mode="json"))
    engine = server._experts["general"].engine  # type: ignore[attr-defined]
    await asyncio.to_thread(engine.drop, "maths")
    await server.check_health()
    with pytest.raises(errors.ExpertUnavailableError):
        await server.healthy("maths")
    for expert in server._experts.values():
        await expert.aclose()
    with pytest.raises(errors.ExpertUnavailableError):
        await server.check_health()


async def test_config_entry_opens_one_expert_per_member(home):
    config = _config(home, input_usd_per_mtok=2.0, description="together")
    opened = open_experts(config)
    assert list(opened) == list(MEMBERS)
    card = opened["other"].card
    assert card.base_model == str(home / "other")
    assert card.input_usd_per_mtok == 2.0
    assert card.total_params_b is not None
    for expert in opened.values():
        await expert.check_health()
        await expert.aclose()
    with pytest.raises(errors.ExpertUnavailableError):
        await _ask(opened["other"])


def test_artefact_comes_back_as_it_was(home):
    members = load_members(_members(home), n_stacks=3, dtype="float32", device="cpu")
    model = load_latent(home / "artefact", members)
    expected = tiny.latent_model(members)
    for name, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)


def _copied(home: Path, target: Path) -> Path:
    shutil.copytree(home / "artefact", target)
    return target


def test_artefact_is_refused_on_other_weights_and_other_members(home, tmp_path):
    tiny.save(tmp_path / "maths", *MEMBERS["maths"], 99)
    others = [
        config
        if config.name != "maths"
        else config.model_copy(update={"model": str(tmp_path / "maths")})
        for config in _members(home)
    ]
    with pytest.raises(errors.ExpertConfigError, match="trained for other weights of 'maths'"):
        open_experts(_config(home, members=others))
    with pytest.raises(errors.ExpertConfigError, match="general, maths, other, not for general"):
        open_experts(_config(home, members=_members(home)[:2]))


def test_damaged_artefacts_are_refused(home, tmp_path):
    def refused(folder: Path, reason: str) -> None:
        with pytest.raises(errors.ExpertConfigError, match=reason):
            open_experts(_config(home, artefact=str(folder)))

    weights = _copied(home, tmp_path / "weights") / "interactions.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    refused(weights.parent, "does not match the hash")
    weights.unlink()
    refused(weights.parent, "cannot be read")
    manifest = _copied(home, tmp_path / "manifest") / "latent.json"
    fields = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**fields, "format_version": 99}))
    refused(manifest.parent, "format version 99")
    manifest.write_text(json.dumps({**fields, "width": 20}))
    refused(manifest.parent, "does not fit the experts")
    manifest.write_text("{")
    refused(manifest.parent, "latent.json")
    manifest.unlink()
    refused(manifest.parent, "latent.json is missing")
    refused(tmp_path / "nowhere", "does not exist")


def test_memory_is_checked_before_loading(home, monkeypatch):
    from experts.latent import members

    def load(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("loaded")

    noted = read_latent(home / "artefact").noted_bytes
    needed = members.needed_bytes(_members(home), "float32", 8 * 32, noted)
    parameters = sum(p.numel() for p in tiny.language_model("llama", 420).parameters())
    # Keys and values: 6 layers with 2 heads of 8 numbers each, twice; and those of interactions.
    assert needed["general"] == 4 * parameters + 8 * 32 * (2 * 4 * 2 * 6 * 2 * 8 + noted)
    monkeypatch.setattr(members, "_load", load)
    monkeypatch.setattr(members, "_free_bytes", lambda device: sum(needed.values()) - 1)
    with pytest.raises(errors.ExpertConfigError, match=r"3 experts take 0\.00 GiB \(general 0\.00"):
        open_experts(_config(home))
    monkeypatch.setattr(members, "_free_bytes", lambda device: sum(needed.values()))
    with pytest.raises(AssertionError, match="loaded"):
        open_experts(_config(home))


def test_what_interactions_keep_of_a_token_is_counted(home):
    loaded = load_members(_members(home), n_stacks=3, dtype="float32", device="cpu")
    model = load_latent(home / "artefact", loaded)
    width = loaded["other"].stacked.width
    layers: list[Any] = list(model.interactions)
    kept = [
        layer.note("other", torch.zeros(1, 1, width), torch.ones(1), torch.zeros(1, 1))
        for layer in layers
    ]
    total = sum(memory.keys.nbytes + memory.values.nbytes for memory in kept)
    assert read_latent(home / "artefact").noted_bytes == total


def test_models_that_keep_no_keys_and_values_are_refused(tmp_path):
    from transformers import MambaConfig

    from experts.latent.members import needed_bytes

    MambaConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2).save_pretrained(tmp_path)
    with pytest.raises(errors.ExpertConfigError, match=r"'odd': .* cannot be loaded"):
        needed_bytes([MemberConfig(name="odd", model=str(tmp_path))], "float32")


def test_revision_of_an_adapter_is_also_that_of_its_description(home, tmp_path):
    """It says how much the adapter counts."""
    from experts.latent.members import member_revision

    config = MemberConfig(name="x", model=str(home / "general"), adapter=str(tmp_path))
    found = []
    for weights, description in ((b"1", "{}"), (b"2", "{}"), (b"2", '{"lora_alpha": 2}')):
        (tmp_path / "adapter_model.safetensors").write_bytes(weights)
        (tmp_path / "adapter_config.json").write_text(description)
        found.append(member_revision(config))
    assert len(set(found)) == 3
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(errors.ExpertConfigError, match=r"holds no adapter_config\.json"):
        member_revision(config)


def test_devices_that_are_not_there_are_a_config_error(home):
    for device in ("nonsense", "cuda:63"):
        with pytest.raises(errors.ExpertConfigError, match="cannot be used"):
            open_experts(_config(home, device=device))


def test_name_of_the_entry_is_no_expert_and_belongs_to_it_alone(home, tmp_path):
    from orchestrator.config import parse_config

    entry = _config(home).model_dump(mode="json")
    assert list(parse_config({"experts": [entry]}).cards()) == list(MEMBERS)
    for name in ("thoughts", "maths"):
        with pytest.raises(Exception, match=f"{name!r} is defined twice"):
            parse_config({"experts": [entry, {"name": name, "engine": "scripted"}]})
    twice = {**entry, "members": [entry["members"][0]] * 2}
    with pytest.raises(Exception, match="'general' is defined twice"):
        parse_config({"experts": [twice]})


def test_relative_artefact_is_looked_for_beside_the_config(home):
    from orchestrator.config import load_config

    entry = _config(home, artefact="artefact").model_dump(mode="json")
    (home / "config.yaml").write_text(json.dumps({"experts": [entry]}))
    found = load_config(home / "config.yaml").experts[0]
    assert isinstance(found, LatentExpertConfig)
    assert found.artefact == str(home / "artefact")


@pytest.mark.parametrize("peers", [None, {"other": 0.3}])
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("think", "must be an object"),
        ({"chat_template": "{{ '' }}"}, "'chat_template' is not"),
        ({"tokenize": False}, "'tokenize' is not"),
        ({"truncation": True, "max_length": 3}, "'max_length' is not"),
        ({"return_tensors": "pt"}, "'return_tensors' is not"),
    ],
)
async def test_template_options_are_for_the_template_alone(shared, options, reason, peers):
    """Others would have prompts cut, or the decode loop wait for a prompt of no tokens."""
    expert = shared.experts()["general"]
    with pytest.raises(errors.InvalidRequestError, match=reason) as caught:
        await _ask(expert, chat_template_kwargs=options, peers=peers)
    assert caught.value.param == "chat_template_kwargs"
    answer = await _ask(expert, chat_template_kwargs={"documents": [], "think": 1}, peers=peers)
    assert answer.usage.completion_tokens == 6


@pytest.mark.parametrize(
    "fields",
    [
        {"logit_bias": {"5": 101}},
        {"logit_bias": {"5": "nan"}},
        {"logit_bias": {"100000": 1}},
        {"logit_bias": [5]},
        {"top_k": 0},
        {"top_k": True},
        {"top_k": "few"},
    ],
)
async def test_malformed_sampling_is_refused(shared, fields):
    with pytest.raises(errors.InvalidRequestError) as caught:
        await _ask(shared.experts()["general"], **fields)
    assert [caught.value.param] == list(fields)


async def test_top_k_reaches_the_sampler(shared):
    """``docs/http-api.md`` promises it to whoever asks an expert by name."""
    expert, options = shared.experts()["general"], {"temperature": 2.0, "seed": 1}
    greedy = await _ask(expert)
    assert (await _ask(expert, top_k=1, **options)).text == greedy.text
    assert (await _ask(expert, **options)).text != greedy.text
