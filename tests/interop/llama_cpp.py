"""llama.cpp for tests: raw logits and token ids through the C API in the package xllamacpp.

The struct layouts belong to one version of llama.cpp, so the tests are skipped for any other version of the package.
"""

import ctypes
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int8, c_int32, c_size_t, c_uint32, c_void_p
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest

VERSION = "2026.10.11549"
INTS = POINTER(c_int32)


def _structure(**kinds: Any) -> type[ctypes.Structure]:
    fields = [(name, kind) for names, kind in kinds.values() for name in names.split()]
    return type("Structure", (ctypes.Structure,), {"_fields_": fields})


ModelParams = _structure(
    a=("devices tensor_buft", c_void_p),
    b=("n_gpu_layers split_mode load_mode lazy_mode main_gpu", c_int32),
    c=("tensor_split progress_callback progress_data kv_overrides", c_void_p),
    d=("vocab_only check_tensors use_extra_bufts no_host no_alloc load_mtp", c_bool),
)
ContextParams = _structure(
    a=("n_ctx n_batch n_ubatch n_seq_max n_rs_seq n_outputs_max n_outputs_max_per_seq", c_uint32),
    b=("n_threads n_threads_batch context_type rope_scaling pooling attention flash_attention", c_int32),
    c=("rope_freq_base rope_freq_scale yarn_ext yarn_attn yarn_beta_fast yarn_beta_slow", c_float),
    d=("yarn_orig_ctx", c_uint32),
    e=("defrag", c_float),
    f=("eval_callback eval_data", c_void_p),
    g=("type_k type_v", c_int32),
    h=("abort_callback abort_data unknown", c_void_p),
    i=("embeddings offload_kqv no_perf op_offload swa_full kv_unified", c_bool),
    j=("samplers", c_void_p),
    k=("n_samplers", c_size_t),
    l=("other_context", c_void_p),
)
Batch = _structure(
    a=("n_tokens", c_int32),
    b=("token", INTS),
    c=("embeddings", c_void_p),
    d=("position n_sequences", INTS),
    e=("sequence", POINTER(INTS)),
    f=("logits", POINTER(c_int8)),
)
FUNCTIONS: dict[str, tuple[Any, ...]] = {  # name: (result, arguments ...)
    "llama_backend_init": (None,),
    "llama_log_set": (None, c_void_p, c_void_p),
    "llama_model_default_params": (ModelParams,),
    "llama_context_default_params": (ContextParams,),
    "llama_model_load_from_file": (c_void_p, c_char_p, ModelParams),
    "llama_model_free": (None, c_void_p),
    "llama_init_from_model": (c_void_p, c_void_p, ContextParams),
    "llama_free": (None, c_void_p),
    "llama_model_get_vocab": (c_void_p, c_void_p),
    "llama_vocab_n_tokens": (c_int32, c_void_p),
    "llama_vocab_get_add_bos": (c_bool, c_void_p),
    "llama_vocab_bos": (c_int32, c_void_p),
    "llama_vocab_eos": (c_int32, c_void_p),
    "llama_vocab_is_eog": (c_bool, c_void_p, c_int32),
    "llama_model_chat_template": (c_char_p, c_void_p, c_char_p),
    "llama_tokenize": (c_int32, c_void_p, c_char_p, c_int32, INTS, c_int32, c_bool, c_bool),
    "llama_batch_init": (Batch, c_int32, c_int32, c_int32),
    "llama_batch_free": (None, Batch),
    "llama_get_memory": (c_void_p, c_void_p),
    "llama_memory_clear": (None, c_void_p, c_bool),
    "llama_decode": (c_int32, c_void_p, Batch),
    "llama_get_logits": (POINTER(c_float), c_void_p),
    "llama_adapter_lora_init": (c_void_p, c_void_p, c_char_p),
    "llama_set_adapters_lora": (c_int32, c_void_p, POINTER(c_void_p), c_size_t, POINTER(c_float)),
}


def require() -> None:
    """Skip the tests unless the version of llama.cpp with these struct layouts is installed."""
    pytest.importorskip("xllamacpp", reason="needs llama.cpp: pip install 'nalora-mlx[interop]'")
    if (found := metadata.version("xllamacpp")) != VERSION:
        pytest.skip(f"the struct layouts are for xllamacpp {VERSION}, not {found}", allow_module_level=True)


@cache
def library() -> ctypes.CDLL:
    """Load llama.cpp without logging, and declare the types of its functions."""
    import xllamacpp

    shared = next(Path(xllamacpp.__file__).parent.glob("xllamacpp*.so"))
    llama = ctypes.CDLL(str(shared))
    for name, (result, *arguments) in FUNCTIONS.items():
        function = getattr(llama, name)
        function.restype, function.argtypes = result, arguments
    # Stored on the library, so that the callback is not garbage-collected while llama.cpp can call it.
    llama.silent = ctypes.CFUNCTYPE(None, c_int32, c_char_p, c_void_p)(lambda level, text, data: None)
    llama.llama_log_set(ctypes.cast(llama.silent, c_void_p), None)
    llama.llama_backend_init()
    return llama


class LoadError(RuntimeError):
    """llama.cpp does not load a file."""


class Llama:
    """A GGUF file in llama.cpp on the CPU, with a float32 KV cache and no flash attention for exact comparisons."""

    def __init__(
        self,
        path: Path,
        *,
        loras: dict[Path, float] | None = None,
        context: int = 256,
        vocab_only: bool = False,
    ) -> None:
        self.llama = library()
        params = self.llama.llama_model_default_params()
        params.n_gpu_layers, params.vocab_only = 0, vocab_only
        self.model = self.llama.llama_model_load_from_file(str(path).encode(), params)
        if not self.model:
            raise LoadError(f"llama.cpp does not load {path.name}")
        self.vocab = self.llama.llama_model_get_vocab(self.model)
        self.context, self.size = None, context
        if vocab_only:
            return
        params = self.llama.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = context
        params.type_k = params.type_v = params.flash_attention = 0
        params.n_threads = params.n_threads_batch = (
            1  # several threads would wait for each other on a busy machine
        )
        self.context = self.llama.llama_init_from_model(self.model, params)
        assert self.context, f"llama.cpp creates no context for {path.name}"
        if loras:
            self._add(loras)

    def _add(self, loras: dict[Path, float]) -> None:
        """Add adapters with their factors; llama.cpp frees them with the model."""
        adapters = [self.llama.llama_adapter_lora_init(self.model, str(path).encode()) for path in loras]
        if not all(adapters):
            raise LoadError(f"llama.cpp does not load one of {', '.join(path.name for path in loras)}")
        count = len(adapters)
        given = (c_void_p * count)(*adapters), count, (c_float * count)(*loras.values())
        assert self.llama.llama_set_adapters_lora(self.context, *given) == 0

    def __enter__(self) -> "Llama":
        return self

    def __exit__(self, *error: object) -> None:
        if self.context:
            self.llama.llama_free(self.context)
        self.llama.llama_model_free(self.model)

    def tokenize(self, text: str, *, special: bool = True, affixes: bool = False) -> list[int]:
        """Return token ids. `special` parses special tokens in the text, `affixes` adds BOS and EOS."""
        data = text.encode()
        capacity = len(data) + 8
        ids = (c_int32 * capacity)()
        count = self.llama.llama_tokenize(self.vocab, data, len(data), ids, capacity, affixes, special)
        return list(ids[:count])

    def logits(self, ids: list[int]) -> np.ndarray:
        """Return float32 [tokens, vocabulary] for one sequence."""
        self.llama.llama_memory_clear(self.llama.llama_get_memory(self.context), True)
        batch = self.llama.llama_batch_init(self.size, 0, 1)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.position[i], batch.n_sequences[i], batch.logits[i] = token, i, 1, 1
            batch.sequence[i][0] = 0
        assert self.llama.llama_decode(self.context, batch) == 0
        shape = (len(ids), self.llama.llama_vocab_n_tokens(self.vocab))
        logits = np.ctypeslib.as_array(self.llama.llama_get_logits(self.context), shape).copy()
        self.llama.llama_batch_free(batch)
        return logits
