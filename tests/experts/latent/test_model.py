"""The parts of a latent collaboration over whole texts, on all architectures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from experts.errors import ExpertConfigError
from experts.latent.alignment import AlignedTokens, align
from experts.latent.interaction import Scale
from experts.latent.model import LatentText
from experts.latent.stacks import StackedModel
from experts.types import Message
from tests.experts.latent import tiny

IDS = list(range(5, 25))
NAMES = list(tiny.ARCHITECTURES)


@pytest.fixture(scope="module")
def members():
    return {name: tiny.member(name, 300) for name in NAMES}


@pytest.fixture(scope="module")
def trained(members):
    return tiny.latent_model(members)


def _peers(writer: str) -> list[str]:
    return [name for name in NAMES if name != writer][:2]


def _text(writer: str, ids=IDS, *, gate: float | None = None, peers=None) -> LatentText:
    active = [writer, *(_peers(writer) if peers is None else peers)]
    weight = 1.0 / len(active) if gate is None else gate
    tokens = AlignedTokens(ids, list(range(len(ids))))
    return LatentText(
        writer, dict.fromkeys(active, tokens), {name: torch.tensor(weight) for name in active}
    )


def _alone(member: Any, ids=IDS) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = member.stacked.model(input_ids=torch.tensor([ids])).logits[0]
    return logits


@pytest.mark.parametrize("writer", NAMES)
def test_untrained_collaboration_is_the_writer_alone_bit_for_bit(members, writer):
    """Fails without ``nn.init.zeros_`` in ``Interaction``."""
    found = tiny.latent_model(members, trained=False)([_text(writer)])[0]
    assert torch.equal(found, _alone(members[writer]))


@pytest.mark.parametrize("writer", NAMES)
def test_gates_of_zero_give_the_writers_own_logits_bit_for_bit(members, trained, writer):
    """Fails where a layer between values and the writer's states gets ``bias=True``."""
    alone = _alone(members[writer])
    assert torch.equal(trained([_text(writer, gate=0.0)])[0], alone)
    assert (trained([_text(writer)])[0] - alone).abs().max() > 0.01


def test_loss_of_the_writer_reaches_the_gates(trained):
    """Defect 1. Fails without ``* gate`` in ``Interaction.note``."""
    text = _text("llama")
    text.gates = {name: gate.clone().requires_grad_() for name, gate in text.gates.items()}
    logits = trained([text])[0]
    functional.cross_entropy(logits[:-1], torch.tensor(IDS[1:])).backward()
    for name, gate in text.gates.items():
        assert gate.grad is not None, name
        assert gate.grad.abs() > 1e-6, name


@pytest.mark.parametrize("writer", NAMES)
def test_logits_are_the_same_alone_and_in_any_batch(trained, writer):
    """Defects 2 and 5. Fails if ``LatentModel.forward`` puts all texts into one group, or if
    padding in ``_views`` has 0 instead of ``NEVER``."""
    text = _text(writer)
    alone = trained([text])[0]
    others = [
        _text(writer, IDS * 3),
        _text(writer, IDS[:4]),
        _text(writer, IDS, peers=[]),
        *(_text(name, IDS[:7]) for name in _peers(writer)),
    ]
    for batch in ([*others, text], [text, *others]):
        found = trained(batch)[len(others) if batch[-1] is text else 0]
        torch.testing.assert_close(found, alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("writer", NAMES)
def test_text_after_a_token_leaves_logits_up_to_it(members, trained, writer):
    """Defect 3. Fails without ``masked_fill`` in ``Interaction``."""
    changed = [*IDS[:12], *(token + 100 for token in IDS[12:])]
    found, other = trained([_text(writer)])[0], trained([_text(writer, changed)])[0]
    torch.testing.assert_close(found[:12], other[:12], atol=1e-5, rtol=1e-4)
    assert (found[12:] - other[12:]).abs().max() > 0.01


def test_answer_after_a_token_leaves_logits_up_to_it_with_other_tokenizers(members):
    """Defect 3, by texts. Fails if ``first_views`` or ``align`` let peers be seen one earlier."""
    sizes = {"llama": 300, "gemma3": 258, "olmoe": 420}
    group = {name: tiny.member(name, size) for name, size in sizes.items()}
    tokenizers = {name: one.tokenizer for name, one in group.items()}
    model = tiny.latent_model(group)
    writer = tokenizers["llama"]

    def logits(prompt: str, answer: list[int]) -> torch.Tensor:
        message = Message(role="user", content=prompt)
        read = {name: one.chat([message]) for name, one in tokenizers.items()}
        tokens = align(read, tokenizers, "llama", answer)
        found: torch.Tensor = model(
            [LatentText("llama", tokens, {name: torch.tensor(0.3) for name in group})]
        )[0]
        return found

    start = writer.piece(" the naïve 🎉")
    for one, other in ((" fox", " 日本語 hello"), ("🎉🎉 two", "s and lazy dogs")):
        first = logits("hello 🎉", start + writer.piece(one))
        second = logits("hello 🎉", start + writer.piece(other))
        kept = len(writer.chat([Message(role="user", content="hello 🎉")]).ids) + len(start)
        torch.testing.assert_close(first[:kept], second[:kept], atol=1e-5, rtol=1e-4)
    # The same for prompts: the end of one is not seen from before it.
    first, second = logits("the lazy dog says hello", []), logits("the lazy dog says 日本語", [])
    kept = len(writer.piece("<user>the lazy dog says"))
    torch.testing.assert_close(first[: kept - 1], second[: kept - 1], atol=1e-5, rtol=1e-4)


def test_known_states_give_the_same_logits(trained):
    text = _text("qwen2")
    known = {name: trained.read(name, [IDS])[0] for name in text.gates}
    cached = LatentText(text.writer, text.tokens, text.gates, known)
    torch.testing.assert_close(trained([cached])[0], trained([text])[0], atol=1e-5, rtol=1e-4)


def test_last_gives_logits_of_the_end_alone(trained):
    text, other = _text("llama"), _text("llama", IDS[:8])
    whole = trained([text, other])
    ends = trained([text, other], last=[3, 1])
    assert [len(end) for end in ends] == [3, 1]
    torch.testing.assert_close(ends[0], whole[0][-3:])
    torch.testing.assert_close(ends[1], whole[1][-1:])


@pytest.mark.parametrize("name", NAMES)
def test_stacks_read_what_the_whole_model_computes(members, name):
    stacked = members[name].stacked
    inputs = torch.tensor([IDS])
    with torch.no_grad():
        whole = stacked.model(input_ids=inputs, output_hidden_states=True)
        read = stacked.read(input_ids=inputs, use_cache=False)
        passed = stacked.states(lambda boundary, hidden: hidden, input_ids=inputs)
    assert stacked.starts == [2, 4]
    for start, states in zip(stacked.starts, read, strict=True):
        assert torch.equal(states, whole.hidden_states[start])
    assert torch.equal(stacked.head(passed), whole.logits)


def test_experts_that_cannot_be_cut_are_refused():
    from transformers import GPT2Config, GPT2LMHeadModel

    llama = tiny.language_model("llama", 300)
    with pytest.raises(ExpertConfigError, match="6 layers cannot be cut into 7"):
        StackedModel("small", llama, 7)
    config = GPT2Config(
        vocab_size=64, n_embd=32, n_layer=4, n_head=2, bos_token_id=0, eos_token_id=0
    )
    with pytest.raises(ExpertConfigError, match="cannot be reached"):
        StackedModel("gpt2", GPT2LMHeadModel(config), 2)


def test_layers_that_take_more_than_the_states_before_are_refused():
    model = tiny.language_model("llama", 300).requires_grad_(False)
    ran: list[int] = []

    def count(number: int) -> Any:
        def hook(module: Any, args: Any) -> Any:
            if number == 0:
                ran.clear()
            ran.append(number)
            return (args[0] + len(ran), *args[1:]) if number == 4 else None

        return hook

    for number, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(count(number))
    with pytest.raises(ExpertConfigError, match="cannot be cut into stacks"):
        StackedModel("odd", model, 3).check()


def test_scales_show_what_differs_between_texts():
    scale = Scale(8)
    constant = torch.tensor([100.0, 0, 0, 0, 0, 0, 0, 0])
    texts = constant + torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    scale.fit(texts)
    found = scale(texts)
    torch.testing.assert_close(found.mean(0), torch.zeros(8), atol=1e-3, rtol=0)
    torch.testing.assert_close(found.std(0)[1:], torch.ones(7), atol=0.05, rtol=0)
    step = scale.back(torch.eye(8)[3])
    assert 0.5 < step[3] < 2
    assert torch.equal(scale.back(torch.zeros(8)), torch.zeros(8))
    assert scale(1e6 * torch.eye(8)).abs().max() <= 8
