from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from experts.errors import ExpertConfigError
from experts.finetune_data import ChatPair, TokenPair, pack, plan_batches, read_pairs, tokenize

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from experts.finetune import AdapterTrainingConfig, TrainingManifest, train_adapter  # noqa: E402

WORDS = "what is one two three four plus minus user assistant <eos>".split()
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' <eos> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of a few thousand weights with a word tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("base")
    vocabulary = {word: number for number, word in enumerate(["<unk>", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>", unk_token="<unk>"
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    pairs = [("what is one plus one", "two"), ("what is three minus one", "two"),
             ("what is two plus one", "three"), ("what is one plus three", "four")]  # fmt: skip
    path.write_text("".join(json.dumps({"prompt": p, "answer": a}) + "\n" for p, a in pairs))
    return path


@pytest.fixture
def config(base: Path, data: Path) -> AdapterTrainingConfig:
    return AdapterTrainingConfig(
        data=data, base=str(base), steps=12, batch_size=2, rank=2, learning_rate=0.05,
        warmup_steps=2, dropout=0.1, precision="float32", checkpoint_every=4, device="cpu",
    )  # fmt: skip


def adapter_weights(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


def test_training_lowers_the_loss(config: AdapterTrainingConfig, tmp_path: Path) -> None:
    losses: list[float] = []
    train_adapter(config, tmp_path / "out", on_step=lambda step, loss: losses.append(loss))
    assert len(losses) == 12
    assert sum(losses[-3:]) < 0.95 * sum(losses[:3])


def test_adapter_loads_with_peft_and_changes_the_answer(
    config: AdapterTrainingConfig, base: Path, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    train_adapter(config, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(base)
    ids = torch.tensor([[1, 2, 3]])
    plain = model(ids).logits.detach()
    adapted = PeftModel.from_pretrained(model, str(tmp_path / "out"))
    assert not torch.allclose(adapted(ids).logits, plain)
    assert {w.dtype for w in adapter_weights(tmp_path / "out").values()} == {torch.bfloat16}


def test_interrupted_training_ends_with_the_weights_of_an_uninterrupted_one(
    config: AdapterTrainingConfig, tmp_path: Path
) -> None:
    def interrupt(step: int, loss: float) -> None:
        if step == 6:
            raise KeyboardInterrupt

    train_adapter(config, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train_adapter(config, tmp_path / "resumed", on_step=interrupt)
    steps: list[int] = []
    train_adapter(config, tmp_path / "resumed", on_step=lambda step, loss: steps.append(step))

    assert steps[0] == 5
    whole, resumed = adapter_weights(tmp_path / "whole"), adapter_weights(tmp_path / "resumed")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_finished_folder_holds_adapter_and_manifest_only(
    config: AdapterTrainingConfig, tmp_path: Path
) -> None:
    manifest = train_adapter(config, tmp_path / "out")
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "adapter_model.safetensors", "adapter_config.json", "training.json",
    }  # fmt: skip
    written = (tmp_path / "out" / "training.json").read_text()
    assert TrainingManifest.model_validate_json(written) == manifest
    saved = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == config.base


def test_finished_training_is_not_repeated(config: AdapterTrainingConfig, tmp_path: Path) -> None:
    steps: list[int] = []
    first = train_adapter(config, tmp_path / "out")
    again = train_adapter(config, tmp_path / "out", on_step=lambda step, loss: steps.append(step))
    assert again == first
    assert steps == []


def test_folder_of_another_training_is_refused(
    config: AdapterTrainingConfig, tmp_path: Path
) -> None:
    train_adapter(config, tmp_path / "out")
    with pytest.raises(ExpertConfigError, match="another training"):
        train_adapter(config.model_copy(update={"seed": 1}), tmp_path / "out")


def test_unknown_target_module_is_named(config: AdapterTrainingConfig, tmp_path: Path) -> None:
    wrong = config.model_copy(update={"target_modules": ("nowhere",)})
    with pytest.raises(ExpertConfigError, match="nowhere"):
        train_adapter(wrong, tmp_path / "out")


def test_packed_pairs_get_the_logits_of_separate_rows(base: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="sdpa")
    pairs = [TokenPair([1, 2, 3, 4], [5, 6]), TokenPair([1, 2, 7], [8, 9, 10])]
    batch = pack(pairs)
    assert batch.input_ids.shape == (1, 2 + 4 + 4)
    assert batch.labels.tolist() == [5, 6, 8, 9, 10]
    with torch.no_grad():
        packed = model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            attention_mask=batch.attention_mask,
            logits_to_keep=batch.predicting,
        ).logits[0]
        alone = [
            model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            for prompt, answer in pairs
        ]
    torch.testing.assert_close(packed, torch.cat(alone))


def test_every_epoch_of_the_plan_visits_every_pair_once() -> None:
    plan = plan_batches([5, 1, 4, 2, 3], batch_size=2, steps=6, seed=3)
    epochs = [sorted(chain.from_iterable(plan[i : i + 3])) for i in (0, 3)]
    assert epochs == [[0, 1, 2, 3, 4]] * 2
    assert plan == plan_batches([5, 1, 4, 2, 3], batch_size=2, steps=6, seed=3)


def test_line_separators_within_texts_end_no_line(tmp_path: Path) -> None:
    pair = ChatPair("one\u2028two", "three\x85four")
    (tmp_path / "pairs.jsonl").write_text(
        json.dumps(pair._asdict(), ensure_ascii=False) + "\n", encoding="utf-8"
    )
    assert read_pairs(tmp_path / "pairs.jsonl") == ([pair], 0)


def test_answers_are_learnt_up_to_the_end_of_turn(base: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    (pair,) = tokenize([ChatPair("what is", "two")], tokenizer)
    assert tokenizer.convert_ids_to_tokens(pair.answer_ids) == ["two", "<eos>"]
    assert tokenizer.convert_ids_to_tokens(pair.prompt_ids)[-1] == "assistant"


def test_repeated_prompts_are_read_once(data: Path) -> None:
    data.write_text(data.read_text() * 2)
    pairs, repeated = read_pairs(data)
    assert len(pairs) == repeated == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no"),
        ("{", "line 1 .* not JSON"),
        ('{"prompt": "a"}', 'texts "prompt" and "answer"'),
        ('{"prompt": "a", "answer": 3}', 'texts "prompt" and "answer"'),
        ("[]", 'texts "prompt" and "answer"'),
        ('{"prompt": "a", "answer": " "}', "line 1 .* empty answer"),
    ],
)
def test_bad_data_is_named_by_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(ExpertConfigError, match=message):
        read_pairs(path)
