"""`nalora export gguf` and `nalora fuse --export-gguf`: llama.cpp gives the logits of base + adapter."""

import pytest
from mlx_lm.utils import load

from nalora_mlx.__main__ import main
from nalora_mlx.adapters.attach import adapt
from nalora_mlx.adapters.files import adapter_config, adapter_weights, load_adapter
from nalora_mlx.core import storage
from nalora_mlx.core.config import NALoRAConfig
from tests.conftest import random_adapters
from tests.interop import llama_cpp
from tests.interop.gguf_models import PROMPT, build, logits, save
from tests.logit_comparison import close

gguf = pytest.importorskip("gguf", reason="needs gguf: pip install 'nalora-mlx[export]'")


@pytest.fixture(autouse=True)
def _llama_cpp():
    llama_cpp.require()


@pytest.fixture
def base(tmp_path):
    model, config = build("llama", num_hidden_layers=2)  # random layers amplify rounding errors
    return save(tmp_path / "base", model, config)


@pytest.fixture
def adapter(base, tmp_path):
    model, _ = load(str(base))
    adapt(model, NALoRAConfig(num_layers=-1, rank=4, scale=4.0))
    random_adapters(model, size=0.1)
    files = {
        "adapters.safetensors": storage.arrays_writer(adapter_weights(model)),
        "adapter_config.json": storage.json_writer(adapter_config(model)),
    }
    storage.write_directory(tmp_path / "adapter", files)
    return tmp_path / "adapter"


@pytest.mark.parametrize("command", ["export", "fuse"])
def test_llama_cpp_gives_logits_of_base_plus_adapter(command, base, adapter, tmp_path):
    tuned, _ = load(str(base))
    load_adapter(tuned, adapter)
    expected = logits(tuned)
    plain = logits(load(str(base))[0])
    where = ["--model", str(base), "--adapter-path", str(adapter)]
    if command == "export":
        path, tolerance = tmp_path / "out.gguf", 1e-5
        assert main(["export", "gguf", *where, "--output", str(path), "--type", "f32"]) == 0
    else:
        path, tolerance = tmp_path / "fused" / "out.gguf", 2e-3
        flags = ["--save-path", str(tmp_path / "fused"), "--export-gguf", "--gguf-path", "out.gguf"]
        assert main(["fuse", *where, *flags]) == 0
    with llama_cpp.Llama(path) as model:
        close(model.logits(PROMPT), expected, plain, tolerance)
    name = gguf.GGUFReader(path).fields["general.name"].contents()
    assert name == ("base" if command == "export" else "fused")
