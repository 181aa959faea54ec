"""A model folder without weights: enough for everything that happens before a worker starts."""

import json
from pathlib import Path

import pytest

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "torch_dtype": "float32",
}


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """`model_folder(num_key_value_heads=2, …)` -> a folder with a `config.json` of that shape."""
    made: dict[str, Path] = {}

    def make(**changes) -> str:
        text = json.dumps({**LLAMA, **changes})
        if text not in made:
            made[text] = tmp_path_factory.mktemp("model")
            (made[text] / "config.json").write_text(text)
        return str(made[text])

    return make


@pytest.fixture
def engine_config(model_folder):
    """`engine_config(tensor_parallel_size=4, helix={…}, model={…}, …)` -> vLLM's verified VllmConfig."""
    pytest.importorskip("vllm", reason="needs vLLM: install the extra `cpu`")
    from vllm.engine.arg_utils import EngineArgs

    def make(*, helix=None, model=None, **arguments):
        additional = {} if helix is None else {"helix": helix}
        return EngineArgs(
            model=model_folder(**(model or {})),
            skip_tokenizer_init=True,
            dtype="float32",
            enforce_eager=True,
            max_model_len=1024,
            additional_config=additional,
            **{"block_size": 32, **arguments},
        ).create_engine_config()

    return make
