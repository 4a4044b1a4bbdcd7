from __future__ import annotations

import copy

import pytest

from experts.latent.alignment import Follower, MemberTokenizer, PromptTokens, align, first_views
from experts.types import Message
from tests.experts.latent import tiny

TEXTS = [
    "hello world",
    "🎉",
    " naïve 日本語🎉🎉 Ωμέγα. user",
    "the quick brown fox\n\nsays\thello  ",
    "👩‍👩‍👧 e\u0301 \U0001f1e9\U0001f1ea",
]


@pytest.fixture(scope="module")
def tokenizers():
    return {str(size): MemberTokenizer(str(size), tiny.tokenizer(size)) for size in (258, 300, 420)}


def _chat(*contents: str) -> list[Message]:
    roles = ("user", "assistant")
    return [
        Message.model_validate({"role": roles[number % 2], "content": content})
        for number, content in enumerate(contents)
    ]


def test_token_is_seen_from_the_first_that_ends_no_earlier():
    writer = PromptTokens([1, 2, 3], [3, 6, 9], [3, 6, 9])
    peer = PromptTokens([4, 5, 6, 7], [3, 4, 6, 9], [3, 4, 6, 9])
    assert first_views(writer, peer) == [0, 1, 1, 2]


def test_peer_with_the_same_tokens_is_seen_token_by_token(tokenizers):
    """What it thinks where the answer begins must not be one of all that its template says."""
    prompt = tokenizers["300"].chat(_chat("hello world", "so", "the quick fox"))
    assert first_views(prompt, prompt) == list(range(len(prompt.ids)))


def test_where_the_answer_begins_both_have_just_read_the_last_of_the_prompt(tokenizers):
    for writer in tokenizers.values():
        for peer in tokenizers.values():
            own, heard = (one.chat(_chat("hello world")) for one in (writer, peer))
            views = first_views(own, heard)
            assert views[-1] == len(own.ids) - 1
            assert views[-2] < views[-1]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("writer", ["258", "300", "420"])
def test_no_token_of_a_peer_says_more_than_the_writer_has_read(tokenizers, writer, text):
    """Fails if ``_located`` takes ``looks`` from the ends of tokens inside a character."""
    prompts = {name: one.chat(_chat(text, "so", text)) for name, one in tokenizers.items()}
    answer = tokenizers[writer].piece(text)
    found = align(prompts, tokenizers, writer, answer)
    own = found[writer].ids
    for name, tokens in found.items():
        assert len(tokens.ids) == len(tokens.seen_from)
        assert tokens.seen_from == sorted(tokens.seen_from)
        for number, position in enumerate(tokens.seen_from):
            heard = _contents(tokenizers[name].decode(tokens.ids[: number + 1]))
            read = _contents(tokenizers[writer].decode(own[: position + 1]))
            assert read.startswith(heard), (name, number)
    whole = tokenizers[writer].decode(answer)
    for name, tokens in found.items():
        heard = tokenizers[name].decode(tokens.ids[len(prompts[name].ids) :])
        assert whole.startswith(heard)


def _contents(text: str) -> str:
    """A decoded prefix without what the template writes and without half a character."""
    for tag in ("<user>", "<assistant>"):
        text = text.replace(tag, "")
        for length in range(len(tag) - 1, 0, -1):
            text = text.removesuffix(tag[:length])
    return text.rstrip("\N{REPLACEMENT CHARACTER}")


def test_follower_never_takes_back_what_it_gave(tokenizers):
    """What the whole answer would be cut into differs from what its pieces are."""
    writer, peer = tokenizers["258"], tokenizers["420"]
    text = "hello to the world 🎉🎉"
    follower = Follower(writer, peer)
    given = [new for token in writer.piece(text) for new in follower.feed(token)]
    assert peer.decode(given) == text
    assert given != peer.piece(text)
    assert Follower(writer, tokenizers["258"]).feed(7) == [7]


def test_character_of_several_tokens_comes_with_its_last(tokenizers):
    writer, peer = tokenizers["258"], tokenizers["300"]
    follower = Follower(writer, peer)
    pieces = [follower.feed(token) for token in writer.piece("🎉")]
    assert [bool(piece) for piece in pieces] == [False, False, False, True]


def test_prompt_tokens_are_those_of_the_chat_template(tokenizers):
    for one in tokenizers.values():
        messages = [{"role": "user", "content": TEXTS[2]}]
        expected = one.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )
        read = one.chat(_chat(TEXTS[2]))
        assert read.ids == expected
        assert read.looks[-1] == len(TEXTS[2])
        assert all(look <= seen for look, seen in zip(read.looks, read.seen, strict=True))


@pytest.mark.parametrize("starts", [True, False])
def test_base_models_prompt_begins_as_its_texts_do(starts):
    """Gemma without its first token has ten times its perplexity."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = copy.deepcopy(tiny.tokenizer(300))
    tokenizer.chat_template = None
    tokenizer.bos_token = "</s>"
    if starts:
        first = [("</s>", tokenizer.bos_token_id)]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="</s> $A", special_tokens=first
        )
    tokens = MemberTokenizer("base", tokenizer).chat(_chat("hello"))
    text = tokenizer.decode(tokens.ids)
    assert text == "</s>" * starts + "User: hello\n\nAssistant:"
    assert tokens.looks[:1] == [0]


@pytest.mark.parametrize("text", ["user", "system", "a", "\n"])
def test_content_that_a_template_writes_as_well_is_found_where_it_is(text):
    tokenizer = copy.deepcopy(tiny.tokenizer(300))
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>\n{{ m['content'] }}\n{% endfor %}<assistant>"
    )
    messages = [Message(role="system", content="a"), Message(role="user", content=text)]
    read = MemberTokenizer("x", tokenizer).chat(messages)
    before = "<system>\na\n<user>\n"
    first = next(n for n, end in enumerate(read.seen) if end > 1)
    assert len(tokenizer.decode(read.ids[:first])) >= len(before)


def test_content_that_a_template_changes_is_seen_at_its_end_alone():
    tokenizer = copy.deepcopy(tiny.tokenizer(300))
    tokenizer.chat_template = "{{ messages[0]['content'] | upper }}!"
    one = MemberTokenizer("x", tokenizer)
    read = one.chat(_chat("hello"))
    assert set(read.looks[:-1]) == {0}
    assert set(read.seen) == {5}
    assert read.looks[-1] == 5
