from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from experts.errors import ExpertConfigError
from experts.weights import default_cache_dir, model_revision, resolve_model

gguf = pytest.importorskip("gguf")
pytest.importorskip("torch")

HIDDEN, LAYERS, HEADS, FEED_FORWARD = 32, 1, 2, 64
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def byte_tokens() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    return [*special, *sorted(ByteLevel.alphabet()), "ab", "12"]


def write_gguf(path: Path, *, add_bos: bool = False) -> Path:
    """A Llama of a few thousand random weights with a byte tokenizer."""
    import numpy as np

    tokens = byte_tokens()
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["a b", "1 2"])
    writer.add_bos_token_id(1)
    writer.add_add_bos_token(add_bos)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
    shapes = {
        "token_embd.weight": (len(tokens), HIDDEN),
        "output_norm.weight": (HIDDEN,),
        "output.weight": (len(tokens), HIDDEN),
        "blk.0.attn_norm.weight": (HIDDEN,),
        "blk.0.ffn_norm.weight": (HIDDEN,),
        **{f"blk.0.attn_{n}.weight": (HIDDEN, HIDDEN) for n in ("q", "k", "v", "output")},
        "blk.0.ffn_gate.weight": (FEED_FORWARD, HIDDEN),
        "blk.0.ffn_up.weight": (FEED_FORWARD, HIDDEN),
        "blk.0.ffn_down.weight": (HIDDEN, FEED_FORWARD),
    }
    for name, shape in shapes.items():
        writer.add_tensor(name, rng.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(scope="module")
def converted(tiny_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = resolve_model(str(tiny_gguf), cache_dir=tmp_path_factory.mktemp("cache"))
    assert isinstance(folder, Path)
    return folder


def test_converted_weights_are_those_of_the_gguf_file(tiny_gguf: Path, converted: Path) -> None:
    import torch
    from safetensors.torch import load_file

    read = {t.name: torch.tensor(t.data) for t in gguf.GGUFReader(tiny_gguf).tensors}
    weights = load_file(converted / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(weights[name], read["blk.0.ffn_up.weight"].to(torch.bfloat16))


def test_converted_folder_is_a_plain_model(converted: Path) -> None:
    from transformers import AutoModelForCausalLM

    config = json.loads((converted / "config.json").read_text())
    assert "quantization_config" not in config
    assert (converted / "generation_config.json").exists()
    assert AutoModelForCausalLM.from_pretrained(converted).num_parameters() > 0


def test_converted_tokenizer_keeps_template_and_single_digits(converted: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(converted)
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.tokenize("ab12") == ["ab", "1", "2"]
    assert tokenizer.eos_token == "<|im_end|>"


@pytest.mark.parametrize("add_bos", [True, False])
def test_texts_begin_with_the_token_the_model_was_trained_with(
    tmp_path: Path, add_bos: bool
) -> None:
    from transformers import AutoTokenizer

    file = write_gguf(tmp_path / "tiny.gguf", add_bos=add_bos)
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(str(file), cache_dir=tmp_path))
    ids = tokenizer("ab")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["<|im_start|>"] * add_bos + ["ab"]
    assert tokenizer("ab", add_special_tokens=False)["input_ids"] == ids[add_bos:]


def test_second_call_converts_nothing(
    tiny_gguf: Path, converted: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = (converted / "model.safetensors").stat().st_mtime_ns
    assert resolve_model(str(tiny_gguf), cache_dir=converted.parents[1]) == converted
    assert (converted / "model.safetensors").stat().st_mtime_ns == before
    assert capfd.readouterr().err == ""


def test_two_at_once_convert_once(
    tiny_gguf: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    found: list[Path | str] = []
    threads = [
        threading.Thread(
            target=lambda: found.append(resolve_model(str(tiny_gguf), cache_dir=tmp_path))
        )
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2
    assert found[0] == found[1]
    assert capfd.readouterr().err.count("converting tiny.gguf") == 1


def test_interrupted_conversion_is_made_again(
    tiny_gguf: Path, converted: Path, tmp_path: Path
) -> None:
    leftover = tmp_path / "models" / f".{converted.name}-abc"
    leftover.mkdir(parents=True)
    (leftover / "config.json").write_text("{")
    folder = resolve_model(str(tiny_gguf), cache_dir=tmp_path)
    assert isinstance(folder, Path)
    assert (folder / "model.safetensors").exists()
    assert not leftover.exists()


def test_damaged_gguf_is_one_line_and_leaves_nothing(tiny_gguf: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(tiny_gguf.read_bytes()[:200])
    with pytest.raises(ExpertConfigError, match=r"^cannot convert broken\.gguf: ") as caught:
        resolve_model(str(broken), cache_dir=tmp_path / "cache")
    assert "\n" not in str(caught.value)
    left = [path for path in (tmp_path / "cache" / "models").iterdir() if path.suffix != ".lock"]
    assert left == []


def test_unwritable_cache_says_which_variable_to_set(tiny_gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ExpertConfigError, match="set COLLEGIUM_CACHE"):
        resolve_model(str(tiny_gguf), cache_dir=tmp_path / "file")


def test_folder_is_returned_as_it_is(tmp_path: Path) -> None:
    assert resolve_model(str(tmp_path)) == tmp_path


def test_hub_name_is_passed_through() -> None:
    assert resolve_model("organisation/model-1B") == "organisation/model-1B"


def test_folder_inside_a_package_is_found() -> None:
    folder = resolve_model("package:experts/embedded/maths")
    assert isinstance(folder, Path)
    assert (folder / "adapter_config.json").exists()


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("package:no_such_package/file.gguf", "no_such_package"),
        ("package:experts/nothing.gguf", r"nothing\.gguf"),
        ("package:experts/types.py", "neither a folder nor a .gguf file"),
        ("/nowhere/model", "does not exist"),
        ("nowhere.gguf", "does not exist"),
    ],
)
def test_what_is_not_there_is_named(reference: str, message: str) -> None:
    with pytest.raises(ExpertConfigError, match=message):
        resolve_model(reference)


def test_cache_folder_follows_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert default_cache_dir() == Path("~/.cache/collegium").expanduser()
    monkeypatch.setenv("COLLEGIUM_CACHE", str(tmp_path))
    assert default_cache_dir() == tmp_path


def test_revision_tells_weights_apart(converted: Path, tmp_path: Path) -> None:
    assert model_revision(converted).startswith("gguf-sha256:")
    (tmp_path / "model.safetensors").write_bytes(b"one")
    one = model_revision(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"two")
    assert one.startswith("sha256:")
    assert model_revision(tmp_path) != one


def test_revision_tells_weights_of_the_older_format_apart(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"one")
    one = model_revision(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"two")
    assert model_revision(tmp_path) != one
