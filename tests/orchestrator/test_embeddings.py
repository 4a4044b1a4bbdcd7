"""``/v1/embeddings`` by the real openai client, and retrievers behind routes."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import openai
import pytest

from evals.retrieval import read_questions
from experts.base import Expert
from experts.config import ScriptedExpertConfig
from experts.paths import resolve_path
from experts.registry import open_experts
from experts.retrieval.index import build_index
from experts.retrieval.passages import read_documents
from orchestrator.config import CollegiumConfig, ConfigError, parse_config
from orchestrator.core import Orchestrator, load_routers
from orchestrator.http import schemas
from orchestrator.http.app import create_app
from orchestrator.retrieval import with_retrievers
from routers.coe import CoERouter
from routers.encoders import get_encoder
from routers.outcomes import OutcomeTable, Prompts
from routers.pilots import PilotsRouter
from tests.orchestrator.support import (
    CHAT,
    ROUTE,
    build,
    chat_body,
    client,
    config_content,
    metric,
    running_server,
)

EMBEDDINGS = "/v1/embeddings"
EMBEDDERS = {
    "english": {"encoder": "minilm-int8", "description": "English"},
    "spelling": {"encoder": "characters"},
}
GERMAN = ["Wo kann ich mein Fahrrad abstellen?", "Was kostet ein neuer Ausweis?"]
ENGLISH = ["Where do I park my bicycle?", "How much is a new card?"]


def table(
    rows: Mapping[str, tuple[float, float]], models: list[str], **columns: Any
) -> OutcomeTable:
    """An outcome table from each prompt's scores."""
    prompts = Prompts([f"p{n}" for n in range(len(rows))], list(rows), **columns)
    return OutcomeTable(prompts, models=models, numbers={"score": np.array(list(rows.values()))})


@pytest.fixture(scope="module")
def routed(tmp_path_factory):
    """A config whose ``auto`` takes ``spelling`` for German and ``english`` for the rest."""
    path = tmp_path_factory.mktemp("embeddings") / "router"
    questions = read_questions(resolve_path("package:evals/data/retrieval/questions.jsonl"))
    train = [q for q in questions if q.split == "train" and q.category in ("stadt", "handbook")]
    german = {q.text: q.category == "stadt" for q in train}
    scores = {text: (0.1, 0.9) if is_german else (0.9, 0.1) for text, is_german in german.items()}
    PilotsRouter(n_clusters=2).fit(table(scores, ["english", "spelling"])).save(path)
    return parse_config(
        config_content(
            embedders=EMBEDDERS,
            embedding_route={"router": "languages"},
            routers={
                **config_content()["routers"],
                "languages": {"type": "artefact", "path": str(path)},
            },
        )
    )


@pytest.fixture(scope="module")
def address(routed):
    with running_server(create_app(build(routed), api_keys=["key"])) as address:
        yield address


@pytest.fixture
def api(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="key", max_retries=0) as client:
        yield client


def plain(**changes: Any) -> CollegiumConfig:
    return parse_config(config_content(**{"embedders": EMBEDDERS, **changes}))


def test_vectors_are_the_encoders_own(api):
    answer = api.embeddings.create(model="english", input=ENGLISH)
    assert answer.model == "english"
    assert [entry.index for entry in answer.data] == [0, 1]
    vectors = np.array([entry.embedding for entry in answer.data], np.float32)
    assert np.array_equal(vectors, get_encoder("minilm-int8").encode(ENGLISH))
    assert (
        answer.usage.prompt_tokens == answer.usage.total_tokens == sum(len(t) // 4 for t in ENGLISH)
    )


def test_numbers_and_base64_are_the_same_vector(api):
    numbers = api.embeddings.create(model="spelling", input="one", encoding_format="float")
    raw = api.embeddings.with_raw_response.create(
        model="spelling", input="one", encoding_format="base64"
    )
    text = json.loads(raw.text)["data"][0]["embedding"]
    assert np.array_equal(
        np.frombuffer(base64.b64decode(text), "<f4"),
        np.array(numbers.data[0].embedding, np.float32),
    )


def test_auto_takes_the_embedder_that_the_router_expects_to_win(api):
    assert api.embeddings.create(model="auto", input=ENGLISH).model == "english"
    assert api.embeddings.create(model="auto", input=GERMAN).model == "spelling"


def test_all_inputs_get_the_embedder_of_the_whole(api):
    mixed = [*GERMAN, ENGLISH[0]]
    answers = [api.embeddings.create(model="auto", input=i) for i in (mixed, mixed[::-1])]
    assert [answer.model for answer in answers] == ["spelling", "spelling"]
    assert {len(entry.embedding) for entry in answers[0].data} == {1024}
    assert [e.embedding for e in answers[0].data] == [e.embedding for e in answers[1].data][::-1]


def test_dimensions_choose_among_embedders_and_shorten_none(api):
    answer = api.embeddings.create(model="auto", input=GERMAN, dimensions=384)
    assert answer.model == "english"
    message = r"dimensions: vectors cannot be shortened; 'english' has 384, got 100"
    with pytest.raises(openai.BadRequestError, match=message) as error:
        api.embeddings.create(model="english", input="x", dimensions=100)
    assert error.value.param == "dimensions"


def test_models_list_embedders(api):
    kinds = {model.id: model.kind for model in api.models.list()}
    assert kinds["english"] == "embedder"
    assert api.models.retrieve("english").description == "English"


def test_a_key_is_asked_for(address):
    with (
        openai.OpenAI(base_url=f"{address}/v1", api_key="no", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.embeddings.create(model="english", input="x")


@pytest.mark.parametrize(
    ("body", "status", "param", "message"),
    [
        ({"input": "x", "model": "large"}, 404, "model", "known: 'auto', 'english', 'spelling'"),
        ({"model": "english"}, 400, "input", "Field required"),
        ({"input": ""}, 400, "input", "at least 1 character"),
        ({"input": []}, 400, "input", "1 to 2048 texts, got 0"),
        ({"input": ["a", ""]}, 400, "input.1", "at least 1 character"),
        ({"input": ["a"] * 2049}, 400, "input", "1 to 2048 texts, got 2049"),
        ({"input": [1, 2]}, 400, "input", "send texts"),
        ({"input": [[1], [2]]}, 400, "input", "send texts"),
        ({"input": "a", "encoding_format": "hex"}, 400, "encoding_format", "'float' or 'base64'"),
        ({"input": "a", "dimensions": 0}, 400, "dimensions", "greater than or equal to 1"),
    ],
)
async def test_bad_input_is_refused_by_name(body, status, param, message):
    response = await client(build(plain())).post(EMBEDDINGS, json=body)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (status, param)
    assert message in error["message"]


async def test_without_a_route_auto_is_the_first_embedder():
    http = client(build(plain()))
    response = await http.post(EMBEDDINGS, json={"input": GERMAN})
    schemas.EmbeddingList.model_validate_json(response.content, strict=True)
    assert response.json()["model"] == "english"
    none = await client(build(parse_config(config_content()))).post(EMBEDDINGS, json={"input": "a"})
    assert none.json()["error"]["message"] == "unknown model 'auto'; known: none"


async def test_many_inputs_at_once_and_one_by_one_are_the_same():
    http = client(build(plain()))
    texts = [f"text number {n}" for n in range(40)]
    together = await http.post(EMBEDDINGS, json={"input": texts, "model": "english"})
    alone = await http.post(EMBEDDINGS, json={"input": texts[33], "model": "english"})
    assert together.json()["data"][33]["embedding"] == alone.json()["data"][0]["embedding"]


async def test_requests_are_counted():
    http = client(build(plain()))
    await http.post(EMBEDDINGS, json={"input": ["twelve chars"] * 2, "model": "spelling"})
    await http.post(EMBEDDINGS, json={"input": "a", "model": "made up"})
    page = (await http.get("/metrics")).text
    one = 'collegium_requests_total{expert="spelling",model="spelling",status="200"}'
    assert metric(page, one) == 1
    assert metric(page, 'collegium_tokens_total{expert="spelling",kind="prompt"}') == 6
    assert metric(page, 'collegium_requests_total{expert="",model="",status="404"}') == 1
    assert metric(page, "collegium_in_flight_requests") == 0


async def test_deadline_and_load_hold_here_too():
    late = client(build(plain(server={"limits": {"timeout_s": 0.02}})))
    texts = [f"{n} {'many words ' * 80}" for n in range(64)]
    response = await late.post(EMBEDDINGS, json={"input": texts, "model": "english"})
    assert (response.status_code, response.json()["error"]["code"]) == (504, "expert_timeout")
    busy = client(build(plain(server={"limits": {"max_in_flight": 1}})))
    body = {"input": texts[:32], "model": "english"}
    statuses = await asyncio.gather(*(busy.post(EMBEDDINGS, json=body) for _ in range(2)))
    assert sorted(response.status_code for response in statuses) == [200, 429]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embedders": {"a": {"encoder": "bert"}}}, "embedder 'a': unknown encoder 'bert'"),
        ({"embedders": {"auto": {"encoder": "static"}}}, "no embedder may be called 'auto'"),
        ({"embedders": {"large": {"encoder": "static"}}}, "'large' names an embedder and a route"),
        ({"embedding_route": {"router": "x"}}, "embedding_route uses the unknown router 'x'"),
        ({"embedding_route": {"router": "table", "embedders": ["x"]}}, "unknown embedder 'x'"),
        ({"embedding_route": {"router": "table"}}, "router 'table' knows 'small', 'medium', 'la"),
    ],
)
def test_wrong_configs_say_what_is_wrong(changes, message):
    with pytest.raises(ConfigError, match=message):
        build(plain(**changes))


# --- retrievers behind routes

GENERAL = [
    "Write a poem about autumn", "Who painted the Mona Lisa?", "Translate hello into Italian",
    "What is the capital of Peru?", "Tell me a joke about cats", "Explain photosynthesis",
    "Suggest a name for my parrot", "How far away is the moon?", "Summarise the plot of Hamlet",
    "What rhymes with orange?", "Give me a recipe for lentil soup", "Who won the 1998 world cup?",
    "How do magnets work?", "Compose a birthday wish for my uncle", "What is a haiku?",
    "List three prime numbers", "Why is the sky blue?", "Name a film with a robot in it",
]  # fmt: skip
NEW_GENERAL = ["What is the capital of Chile?", "Write a poem about winter", "How do rockets work?",
               "Who painted Guernica?", "Tell me a joke about horses"]  # fmt: skip
READER = {"name": "plain", "engine": "scripted", "input_usd_per_mtok": 1, "output_usd_per_mtok": 1,
          "rules": [{"match": "<passages>", "answer": "As it says [1]."},
                    {"answer": "Out of my head."}]}  # fmt: skip


def questions(split: str) -> list[str]:
    found = read_questions(resolve_path("package:evals/data/retrieval/questions.jsonl"))
    return [q.text for q in found if q.split == split and q.category == "manual"]


def with_documents(tmp_path, **changes: Any) -> Orchestrator:
    """An expert, and a retriever that reads the manual for it."""
    manual = list(read_documents(resolve_path("package:evals/data/retrieval/documents/manual")))
    build_index(manual, [get_encoder("minilm-int8")], tmp_path / "index")
    docs = {"name": "docs", "engine": "retriever", "index": "index", "reader": "plain"}
    content = config_content(experts=[docs, READER], routers={}, routes={})
    config = parse_config({**content, **changes}, base=tmp_path)
    experts: dict[str, Expert] = {}
    for entry in config.experts:
        if isinstance(entry, ScriptedExpertConfig):
            experts |= open_experts(entry)
    return Orchestrator(config, with_retrievers(config, experts), load_routers(config))


async def test_auto_retrieves_only_where_the_gain_is_worth_the_cost(tmp_path):
    rows = {text: (0.1, 0.9) for text in questions("train")}
    # Passages do no harm here, they only cost.
    rows |= dict.fromkeys(GENERAL, (0.9, 0.9))
    kinds = ["documents" if gain else "general" for gain in (b > a for a, b in rows.values())]
    CoERouter().fit(table(rows, ["plain", "docs"], categories=kinds)).save(tmp_path / "router")
    orchestrator = with_documents(
        tmp_path,
        routers={"gate": {"type": "artefact", "path": "router"}},
        routes={"auto": {"router": "gate", "policy": {"cost_quality": 0.7}}},
    )
    http = client(orchestrator)

    async def chosen(text: str) -> str:
        return str((await http.post(ROUTE, json=chat_body(text))).json()["experts"][0])

    about = [await chosen(text) for text in questions("test")]
    other = [await chosen(text) for text in NEW_GENERAL]
    assert about.count("docs") >= 0.85 * len(about)
    assert other == ["plain"] * len(other)
    decided = (await http.post(ROUTE, json=chat_body(GENERAL[0]))).json()
    costs = {c["expert"]: c["cost_usd"] for c in decided["candidates"]}
    assert costs["docs"] == pytest.approx(costs["plain"] + 1024e-6)
    answer = (await http.post(CHAT, json=chat_body(questions("train")[0]))).json()
    assert (answer["model"], answer["choices"][0]["message"]["content"]) == (
        "docs",
        "As it says [1].",
    )
    plain_answer = (await http.post(CHAT, json=chat_body(GENERAL[0]))).json()
    assert "sources" not in plain_answer["choices"][0]["message"]


def test_clients_get_the_sources(tmp_path):
    orchestrator = with_documents(tmp_path)
    with (
        running_server(create_app(orchestrator)) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key="-", max_retries=0) as opened,
    ):
        api: Any = opened  # its types know no fields but OpenAI's
        messages = [{"role": "user", "content": "What does error E05 mean?"}]
        answer = api.chat.completions.create(model="docs", messages=messages)
        message = answer.choices[0].message
        assert message.content == "As it says [1]."
        assert message.sources[0]["path"] == "e05.md"
        assert set(message.sources[0]) == {"id", "title", "path", "score"}
        chunks = list(api.chat.completions.create(model="docs", messages=messages, stream=True))
        carrying = [c for c in chunks if getattr(c.choices[0].delta, "sources", None)]
        assert [c.choices[0].finish_reason for c in carrying] == ["stop"]
        assert carrying[0].choices[0].delta.sources == message.sources
        assert api.models.retrieve("docs").card["added_prompt_tokens"] == 1024


async def test_answers_with_sources_have_their_declared_shape(tmp_path):
    http = client(with_documents(tmp_path))
    answer = await http.post(CHAT, json=chat_body("Can I use vinegar?", model="docs"))
    schemas.ChatCompletion.model_validate_json(answer.content, strict=True)
    refused = await http.post("/v1/completions", json={"prompt": "a", "model": "docs"})
    assert refused.json()["error"]["code"] == "no_capable_expert"


async def test_the_ingress_opens_retrievers_itself(tmp_path):
    pytest.importorskip("ray")
    from deployments.builders import build as build_service
    from deployments.ingress import _experts
    from deployments.preflight import check_weights

    orchestrator = with_documents(tmp_path)
    # What the ingress gets is plain data, without the folder that paths were relative to.
    config = parse_config(orchestrator.config.model_dump(mode="json", by_alias=True))
    build_service(config)
    check_weights(config)
    docs = config.experts[0].model_copy(update={"reader": None})
    assert list(_experts(config.model_copy(update={"experts": (docs,)}), (None,))) == ["docs"]
    gone = docs.model_copy(update={"index": str(tmp_path / "gone")})
    with pytest.raises(ConfigError, match=r"expert 'docs': .*gone' does not exist"):
        check_weights(config.model_copy(update={"experts": (gone,)}))


def test_readers_must_be_experts_that_are_no_retrievers(tmp_path):
    one = {"name": "a", "engine": "retriever", "index": "i", "reader": "b"}
    with pytest.raises(ConfigError, match="the reader 'b' of expert 'a' is no expert"):
        parse_config({"experts": [one, {**one, "name": "b", "reader": None}]})
