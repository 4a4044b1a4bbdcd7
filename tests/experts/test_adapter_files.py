from __future__ import annotations

import json

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from safetensors.torch import load_file, save_file  # noqa: E402

from experts.adapter_files import (  # noqa: E402
    LowRank,
    inner,
    read_updates,
    refuse_pickles,
    similarity,
    weights_hash,
    write_updates,
)
from experts.errors import ExpertConfigError  # noqa: E402
from tests.experts.latent import tiny  # noqa: E402


@pytest.fixture
def base():
    return tiny.language_model("llama", 300)


def _adapter(base, folder, seed=0, **settings):
    """An adapter that changes something, written by PEFT; and PEFT's model of it."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    options = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], **settings}
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **options))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"layers.1.self_attn.q_proj": 3}},
    ],
)
def test_updates_are_what_peft_adds_to_the_weights(base, tmp_path, settings):
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    merged = _adapter(base, tmp_path, **settings).merge_and_unload()
    updates = read_updates(tmp_path)
    assert len(updates) == 12
    for path, update in updates.items():
        change = merged.get_submodule(path).weight - before[f"{path}.weight"]
        torch.testing.assert_close(update.up @ update.down, change, atol=1e-5, rtol=1e-4)


def test_inner_products_are_those_of_the_whole_matrices():
    torch.manual_seed(0)
    one, other = (
        {path: LowRank(torch.randn(2, 5), torch.randn(7, 2)) for path in "ab"} for _ in range(2)
    )
    flat = [torch.cat([(u.up @ u.down).flatten() for u in us.values()]) for us in (one, other)]
    assert inner(one, other) == pytest.approx(float(flat[0] @ flat[1]), rel=1e-4)
    cosine = float(torch.cosine_similarity(*flat, dim=0))
    assert similarity(one, other) == pytest.approx(cosine, rel=1e-4)
    assert similarity(one, one) == pytest.approx(1)


def test_top_direction_is_the_input_that_is_answered_most():
    torch.manual_seed(0)
    update = LowRank(torch.randn(3, 8), torch.randn(6, 3))
    whole = update.up @ update.down
    _, lengths, right = torch.linalg.svd(whole)
    found = update.top_direction()
    assert abs(float(found @ right[0])) == pytest.approx(1, abs=1e-5)
    assert float((whole @ found).norm()) == pytest.approx(float(lengths[0]), rel=1e-5)


def test_what_is_no_plain_lora_is_refused(base, tmp_path):
    _adapter(base, tmp_path)
    file, described = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    tensors, settings = load_file(file), json.loads(described.read_text())

    def refused(match):
        with pytest.raises(ExpertConfigError, match=match):
            read_updates(tmp_path)

    name = next(iter(tensors))
    save_file({**tensors, name: torch.full_like(tensors[name], float("nan"))}, file)
    refused("1 of 24 tensors hold numbers that are not finite")
    save_file({n: t for n, t in tensors.items() if n != name}, file)
    refused("do not match")
    save_file({**tensors, "lm_head.weight": torch.zeros(2, 2)}, file)
    refused(r"it holds lm_head\.weight")
    file.write_bytes(b"nothing")
    refused("is damaged")
    file.unlink()
    refused("holds no adapter_model")
    save_file(tensors, file)
    pickle = tmp_path / "adapter_model.bin"
    torch.save(tensors, pickle)
    read_updates(tmp_path)
    with pytest.raises(ExpertConfigError, match=r"adapter_model\.bin, and who loads such a file"):
        refuse_pickles(tmp_path)
    pickle.unlink()
    described.write_text(json.dumps({**settings, "use_dora": True}))
    refused("uses use_dora")
    described.write_text(json.dumps({**settings, "peft_type": "IA3"}))
    refused("describes no LoRA adapter")
    described.write_text("{")
    refused("cannot be read")
    described.unlink()
    refused("holds no adapter_config.json")


def test_hash_covers_weights_and_what_scales_them(tmp_path):
    torch.manual_seed(0)
    updates = {f"layers.{n}.q_proj": LowRank(torch.randn(2, 5), torch.randn(7, 2)) for n in "9876"}
    assert weights_hash(tmp_path) == ""
    write_updates(tmp_path, updates, "base")
    hashes = [weights_hash(tmp_path)]
    described = tmp_path / "adapter_config.json"
    settings = json.loads(described.read_text())
    # In a fixed order, or the hash would be another each time.
    assert settings["target_modules"] == sorted(updates)
    described.write_text(json.dumps({**settings, "alpha_pattern": {"q_proj": 2000}}))
    hashes.append(weights_hash(tmp_path))
    described.unlink()
    hashes.append(weights_hash(tmp_path))
    write_updates(tmp_path, dict(list(updates.items())[:3]), "base")
    hashes.append(weights_hash(tmp_path))
    assert len(set(hashes)) == 4
    write_updates(tmp_path, updates, "base")
    assert weights_hash(tmp_path) == hashes[0]
