"""From a model reference to something `from_pretrained` reads.

GGUF files are converted once to safetensors in a cache, because vLLM cannot read them on a
CPU and both engines shall read the same weights. Knows nothing of experts or engines.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from experts.errors import ExpertConfigError
from experts.paths import PACKAGE_PREFIX, resolve_path

__all__ = ["default_cache_dir", "model_revision", "resolve_model"]

# Part of a cached conversion's name: raise it when the converter writes something else.
_CONVERTER_VERSION = 2
_SOURCE_FILE = "gguf-sha256.txt"


def resolve_model(reference: str, *, cache_dir: Path | None = None) -> Path | str:
    """Return the local folder with a model's weights, or a hub name as it is.

    A GGUF file is converted to the Hugging Face format on first use, under a lock, so that
    several processes may ask at once.

    Args:
        reference: A folder or ``.gguf`` file, ``package:NAME/PATH`` for one inside an
            installed Python package, or a name on the model hub.
        cache_dir: Where conversions are kept; `default_cache_dir` if not given.

    Raises:
        ExpertConfigError: If a path or package does not exist, or the conversion fails.
    """
    is_file = reference.endswith(".gguf") or reference.startswith(("/", "./", "../", "~"))
    if not reference.startswith(PACKAGE_PREFIX) and not is_file:
        local = Path(reference)
        return local if local.exists() else reference
    path = resolve_path(reference)
    if path.is_dir():
        return path
    if path.suffix != ".gguf":
        raise ExpertConfigError(f"{reference!r} is neither a folder nor a .gguf file")
    return _converted(path, cache_dir or default_cache_dir())


def default_cache_dir() -> Path:
    """Return ``$COLLEGIUM_CACHE``, or ``~/.cache/collegium``."""
    return Path(os.environ.get("COLLEGIUM_CACHE") or "~/.cache/collegium").expanduser()


def model_revision(resolved: Path | str) -> str:
    """Return what tells these weights from others: a hash, or a hub name with its commit.

    Args:
        resolved: What `resolve_model` returned.
    """
    if isinstance(resolved, str):
        from transformers import AutoConfig

        commit = getattr(AutoConfig.from_pretrained(resolved), "_commit_hash", None)
        return f"{resolved}@{commit}"
    source = resolved / _SOURCE_FILE
    if source.exists():
        return f"gguf-sha256:{source.read_text().strip()}"
    digest = hashlib.sha256()
    patterns = ("*.safetensors", "pytorch_model*.bin", "config.json")
    for file in sorted(file for pattern in patterns for file in resolved.glob(pattern)):
        digest.update(_sha256(file).encode())
    return f"sha256:{digest.hexdigest()}"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _converted(gguf: Path, cache_dir: Path) -> Path:
    from filelock import FileLock

    sha256 = _sha256(gguf)
    target = cache_dir / "models" / f"{gguf.stem}-{sha256[:16]}-v{_CONVERTER_VERSION}"
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_name(f"{target.name}.lock")):
            # Another process may have converted it while this one waited for the lock.
            if not target.is_dir():
                print(f"converting {gguf.name} to safetensors, once ...", file=sys.stderr)
                _convert_into(gguf, target, sha256)
                print(f"converted to {target}", file=sys.stderr)
    except OSError as error:
        raise ExpertConfigError(
            f"cannot convert {gguf.name} in {cache_dir}: {error}; "
            "set COLLEGIUM_CACHE to a writable folder with space for the weights"
        ) from error
    return target


def _convert_into(gguf: Path, target: Path, sha256: str) -> None:
    # Whoever holds the lock is alone, so what lies here is left over from an interruption.
    for leftover in target.parent.glob(f".{target.name}-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    try:
        _convert(gguf, temporary)
        (temporary / _SOURCE_FILE).write_text(sha256 + "\n")
        _make_readable(temporary)
        os.replace(temporary, target)
    except OSError:
        raise
    except Exception as error:
        # Readers of damaged files raise whatever they stumble over.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ExpertConfigError(f"cannot convert {gguf.name}: {reason}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _make_readable(folder: Path) -> None:
    # `mkdtemp` and safetensors make private files, but a cache may be shared between users.
    folder.chmod(0o755)
    for file in folder.iterdir():
        file.chmod(0o644)


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    _restore_tokenizer(tokenizer, gguf)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    # `save_pretrained` refuses a model that still claims to be quantised.
    model.hf_quantizer = None
    model.is_quantized = False
    del model.config.quantization_config
    # Rounding to bfloat16 moves a weight by at most 1/256 of itself, a small part of what
    # four-bit quantisation has moved it, and halves the file. Engines that compute in
    # float32 still agree with each other, since they read the same rounded values.
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _restore_tokenizer(tokenizer: Any, gguf: Path) -> None:
    """Put back what the conversion of a tokenizer drops."""
    from tokenizers import pre_tokenizers

    # Models with this tokenizer were trained with every digit by itself.
    if _field(gguf, "tokenizer.ggml.pre") == "smollm":
        backend = tokenizer.backend_tokenizer
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
    # The loaded tokenizer does not say so, and a model that has never read without is lost.
    if tokenizer.bos_token and _field(gguf, "tokenizer.ggml.add_bos_token"):
        _prepend_bos(tokenizer)


def _prepend_bos(tokenizer: Any) -> None:
    from tokenizers.processors import TemplateProcessing

    if tokenizer("a")["input_ids"][0] != tokenizer.bos_token_id:
        bos = tokenizer.bos_token
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B",
            special_tokens=[(bos, tokenizer.bos_token_id)],
        )  # fmt: skip


def _field(gguf: Path, name: str) -> Any:
    """A field of the file's header; none if it has no such."""
    from gguf import GGUFReader

    field = GGUFReader(gguf).get_field(name)
    return field.contents() if field else None
