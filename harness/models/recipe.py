"""The registry of recipes and the cache of models made from them."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from harness.frozen import Frozen, content_hash
from harness.models.tokenizer import write_tokenizer
from harness.models.weights import GENERATOR, Arrays, make_weights

if TYPE_CHECKING:
    from helix_runtime.shapes import ModelShape

PREFIX = "recipe:"


class Recipe(Frozen):
    """A dense decoder made from a seed. Widths are in elements.

    `spread` is the standard deviation of the attention scores, so attention is peaky but never one-hot; `attention` and
    `mlp` are the sizes of their contributions relative to `embedding`, so that the context outweighs the last token;
    `contrast` is the standard deviation of the logits, which sets the gap between the best two tokens.
    """

    name: str
    architecture: str = "LlamaForCausalLM"
    model_type: str = "llama"
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 32
    hidden: int = 256
    intermediate: int = 512
    layers: int = 3
    vocab: int = 512
    positions: int = 32768
    rope_theta: float = 10000.0
    qk_norm: bool = False
    seed: int = 20250707
    spread: float = 2.0
    embedding: float = 1.0
    attention: float = 2.0
    mlp: float = 0.5
    contrast: float = 8.0

    @property
    def key(self) -> str:
        return content_hash({"generator": GENERATOR, "config": self.config(), **self.model_dump(mode="json")})

    def config(self) -> dict:
        """The model's `config.json` as Hugging Face and vLLM read it."""
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab,
            "max_position_embeddings": self.positions,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "rope_theta": self.rope_theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": False,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "dtype": "float32",
        }

    def weights(self) -> Arrays:
        return make_weights(self)

    def save(self, folder: Path) -> None:
        """Write the weights into `folder`, as Hugging Face and vLLM read them."""
        from safetensors.numpy import save_file

        save_file(self.weights(), folder / "model.safetensors", metadata={"format": "pt"})


#: Every recipe by name. `@recipe` adds one.
RECIPES: dict[str, Recipe] = {}


def recipe(build: Callable[[], Recipe]) -> Callable[[], Recipe]:
    """Register the recipe that `build` returns."""
    register(build())
    return build


def register(made: Recipe) -> None:
    """Add a recipe to the registry; ValueError when its name is taken."""
    if made.name in RECIPES:
        raise ValueError(f"recipe {made.name!r} is registered twice")
    RECIPES[made.name] = made


#: Recipes made by name alone: a pattern and what makes a recipe from its named groups. `@family` adds one.
FAMILIES: list[tuple[re.Pattern, Callable[..., Recipe]]] = []


def family(pattern: str) -> Callable[[Callable[..., Recipe]], Callable[..., Recipe]]:
    """Let `find` answer for every name that `pattern` matches whole, without registering each."""

    def add(build: Callable[..., Recipe]) -> Callable[..., Recipe]:
        FAMILIES.append((re.compile(pattern), build))
        return build

    return add


def find(name: str) -> Recipe:
    """The recipe called `name`, with or without the `recipe:` prefix; a KeyError that lists the choices otherwise."""
    bare = name.removeprefix(PREFIX)
    if bare in RECIPES:
        return RECIPES[bare]
    for pattern, build in FAMILIES:
        if match := pattern.fullmatch(bare):
            return build(**match.groupdict())
    raise KeyError(f"no recipe {bare!r}; there are: {', '.join(sorted(RECIPES))}")


def shape(name: str) -> "ModelShape":
    """The shape of a recipe's model, as the layout rules want it."""
    from helix_runtime.shapes import ModelShape

    made = find(name)
    return ModelShape.from_config(made.config(), name=PREFIX + made.name)


def cache_root() -> Path:
    """`$HELIX_CACHE` or `~/.cache/helix`, with `/models` below it."""
    return Path(os.environ.get("HELIX_CACHE") or Path.home() / ".cache" / "helix") / "models"


def folder_of(made: Recipe) -> Path:
    return cache_root() / f"{made.name}-{made.key}"


def ensure_apart(name: str) -> Path:
    """As `ensure`, in a process of its own where the model must be made: weights take as much memory as a harness.

    OSError, with the last line of what went wrong.
    """
    target = folder_of(find(name))
    if not target.is_dir():
        command = [sys.executable, "-m", "harness.models", name]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if done.returncode:
            said = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
            raise OSError(f"{name} cannot be made: {said}")
    return target


def ensure(name: str) -> Path:
    """The folder of a recipe's model, made now if it is not there yet.

    Safe for concurrent makers: each builds a private folder and renames it; the first wins, the others use its.
    """
    made = find(name)
    target = folder_of(made)
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{made.name}-", dir=target.parent))
    try:
        _write(made, scratch)
        scratch.chmod(0o755)
        scratch.rename(target)
    except OSError:
        if not target.is_dir():
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def _write(made: Recipe, folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(made.config(), indent=2))
    generation = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2))
    made.save(folder)
    write_tokenizer(folder, made.vocab, made.positions)


@recipe
def _llama_k1() -> Recipe:
    return Recipe(name="llama-k1", kv_heads=1)


@recipe
def _llama_k2() -> Recipe:
    return Recipe(name="llama-k2", kv_heads=2)


@recipe
def _llama_k4() -> Recipe:
    return Recipe(name="llama-k4", kv_heads=4)


@recipe
def _llama_k3() -> Recipe:
    # Eight query heads a KV head, on three ranks or, as TPA 3, on six.
    return Recipe(name="llama-k3", heads=24, kv_heads=3, hidden=384, intermediate=768, vocab=576)


@recipe
def _llama_k6() -> Recipe:
    # Three KV heads a rank under TPA 2; vocabulary and widths divide by 6 ranks as well.
    return Recipe(name="llama-k6", heads=24, kv_heads=6, hidden=384, intermediate=768, vocab=576)


@recipe
def _qwen3_k4() -> Recipe:
    return Recipe(name="qwen3-k4", architecture="Qwen3ForCausalLM", model_type="qwen3", kv_heads=4, qk_norm=True)


@family(r"(?P<base>llama-k\d+|qwen3-k4|deepseek-v2)-seed(?P<seed>\d+)")
def _other_weights(base: str, seed: str) -> Recipe:
    """The same model with other random weights: `llama-k4-seed1`."""
    return find(base).model_copy(update={"name": f"{base}-seed{seed}", "seed": int(seed)})
