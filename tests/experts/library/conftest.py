from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from safetensors.torch import load_file  # noqa: E402

from tests.experts.latent import tiny  # noqa: E402


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A base of random weights, and two adapters of it that share no matrix."""
    from peft import LoraConfig, get_peft_model

    home = tmp_path_factory.mktemp("library")
    base = tiny.save(home / "base", "llama")
    for seed, name in enumerate(["one", "two"]):
        model = tiny.language_model("llama", len(tiny.tokenizer(300)))
        settings = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "up_proj"])
        # The model draws from a seed of its own, so this comes after it and before both matrices.
        torch.manual_seed(seed)
        adapted = get_peft_model(model, settings)
        for parameter_name, parameter in adapted.named_parameters():
            if "lora_B" in parameter_name:
                torch.nn.init.normal_(parameter, std=0.3)
        adapted.peft_config["default"].base_model_name_or_path = base
        adapted.save_pretrained(home / name)
    one, two = (load_file(home / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert not any(torch.equal(one[name], two[name]) for name in one)
    return home
