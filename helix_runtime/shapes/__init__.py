"""Models as shapes: the structural numbers of a `config.json`, without its weights, its hub or `transformers`.

The committed files are named `org--name.json` and hold only structural fields of the public configs.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_FOLDER = Path(__file__).parent

#: `model_type`s whose attention is multi-head latent attention when they name a `kv_lora_rank`.
_MLA_TYPES = ("deepseek_v2", "deepseek_v3", "kimi_k2")
#: `model_type`s with grouped-query attention that this module can read; Nemotron's Llama family says `llama`.
_GQA_TYPES = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe")


@dataclass(frozen=True, kw_only=True)
class MlaShape:
    """Sizes of multi-head latent attention. `q_lora_rank` is None where queries are projected in one step."""

    kv_lora_rank: int
    qk_rope_head_dim: int
    qk_nope_head_dim: int
    v_head_dim: int
    q_lora_rank: int | None

    @property
    def latent_size(self) -> int:
        """Values cached per token and layer."""
        return self.kv_lora_rank + self.qk_rope_head_dim


@dataclass(frozen=True, kw_only=True)
class MoeShape:
    """Experts: `routed` of them, `per_token` used at a time, `shared` always, each with `intermediate_size`.

    The first `first_dense_layers` layers have the dense FFN of `ModelShape.intermediate_size` instead.
    """

    routed: int
    per_token: int
    shared: int
    intermediate_size: int
    first_dense_layers: int


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """One model. `num_kv_heads` is 1 for MLA (the latent); `head_size` is then the cached size, as vLLM counts it.

    `quantization`: the method of its own checkpoint, None for weights of 16 bits.
    """

    name: str
    architecture: str
    num_query_heads: int
    num_kv_heads: int
    head_size: int
    num_layers: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    tie_word_embeddings: bool
    mla: MlaShape | None = None
    moe: MoeShape | None = None
    quantization: str | None = None

    @property
    def use_mla(self) -> bool:
        return self.mla is not None

    @classmethod
    def from_config(cls, config: Mapping[str, object], name: str) -> "ModelShape":
        """From a `config.json`. ValueError, with the model's name, for what is none: no object, an unknown family, a
        field that is missing or no size."""
        if not isinstance(config, Mapping):
            raise ValueError(f"{name}: its config.json holds {type(config).__name__}, not an object")
        family = config.get("model_type")
        if family not in (*_MLA_TYPES, *_GQA_TYPES):
            known = ", ".join((*_GQA_TYPES, *_MLA_TYPES))
            raise ValueError(f"{name}: model_type {family!r} is not a known family; known: {known}")
        try:
            mla = _mla(config) if family in _MLA_TYPES else None
            heads, hidden = _size(config, "num_attention_heads"), _size(config, "hidden_size")
            return cls(
                name=name,
                architecture=_architecture(config),
                num_query_heads=heads,
                # Absent or null means multi-head attention: as many KV heads as query heads.
                num_kv_heads=1 if mla else _size(config, "num_key_value_heads", heads),
                head_size=mla.latent_size if mla else _size(config, "head_dim", hidden // heads),
                num_layers=_size(config, "num_hidden_layers"),
                hidden_size=hidden,
                intermediate_size=_size(config, "intermediate_size"),
                vocab_size=_size(config, "vocab_size"),
                max_position_embeddings=_size(config, "max_position_embeddings"),
                tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
                mla=mla,
                moe=_moe(config),
                quantization=_quantization(config),
            )
        except KeyError as missing:
            raise ValueError(f"{name}: its config.json has no field {missing}") from None
        except ValueError as wrong:
            raise ValueError(f"{name}: its config.json has {wrong}") from None

    def layout_arguments(self) -> dict[str, object]:
        """The model's part of `layout.resolve_layout`'s and `layout.legal_layouts`' keywords."""
        return {
            "num_query_heads": self.num_query_heads,
            "num_kv_heads": self.num_kv_heads,
            "use_mla": self.use_mla,
            "head_size": self.head_size,
            "num_layers": self.num_layers,
            "latent_size": self.mla.latent_size if self.mla else None,
        }


def load_shape(name_or_path: str | Path) -> ModelShape:
    """A committed shape by hub id, or the shape of a model folder or a `config.json`.

    A hub id without a committed shape is looked up in the hub's cache on this machine, and nowhere else. Raises
    ValueError with the known names where it is none of these.
    """
    name = str(name_or_path)
    if name in known_shapes():
        return _shape_in(_FOLDER / f"{name.replace('/', '--')}.json", name)
    path = Path(name_or_path)
    if path.is_dir():
        path = path / "config.json"
    if path.is_file() or (path := _cached(name)):
        return _shape_in(path, name)
    raise ValueError(
        f"{name!r} is neither a committed shape, nor a folder or file with a config.json, nor in the hub's cache "
        f"(hf download {name} config.json puts it there); known: {', '.join(known_shapes())}"
    )


def _shape_in(file: Path, name: str) -> ModelShape:
    try:
        config = json.loads(file.read_text())
    except ValueError as problem:
        raise ValueError(f"{name}: {file.name} is no JSON: {problem}") from None
    return ModelShape.from_config(config, name)


def _cached(name: str) -> Path | None:
    """`config.json` of a hub model that was downloaded before; None without it, or without the hub's library."""
    try:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(name, "config.json")
    except (ImportError, ValueError):  # ValueError: `name` cannot be a hub id
        return None
    return Path(found) if isinstance(found, str) else None


def config_of(name: str) -> dict:
    """The committed structural fields of a hub model's `config.json`; how its weights are stored is not one of them.

    KeyError for a model without.
    """
    if name not in known_shapes():
        raise KeyError(f"no committed config of {name!r}; there are: {', '.join(known_shapes())}")
    found = json.loads((_FOLDER / f"{name.replace('/', '--')}.json").read_text())
    found.pop("quantization_config", None)
    return found


def known_shapes() -> tuple[str, ...]:
    """Hub ids of the committed shapes, in order."""
    return tuple(sorted(path.stem.replace("--", "/", 1) for path in _FOLDER.glob("*--*.json")))


def _mla(config: Mapping[str, object]) -> MlaShape:
    return MlaShape(
        kv_lora_rank=_size(config, "kv_lora_rank"),
        qk_rope_head_dim=_size(config, "qk_rope_head_dim"),
        qk_nope_head_dim=_size(config, "qk_nope_head_dim"),
        v_head_dim=_size(config, "v_head_dim"),
        q_lora_rank=None if config["q_lora_rank"] is None else _size(config, "q_lora_rank"),
    )


def _moe(config: Mapping[str, object]) -> MoeShape | None:
    """Qwen3-MoE says `num_experts`, DeepSeek `n_routed_experts`."""
    field = "n_routed_experts" if config.get("n_routed_experts") else "num_experts"
    if not config.get(field):
        return None
    return MoeShape(
        routed=_size(config, field),
        per_token=_size(config, "num_experts_per_tok"),
        shared=_size(config, "n_shared_experts", 0),
        intermediate_size=_size(config, "moe_intermediate_size"),
        first_dense_layers=_size(config, "first_k_dense_replace", 0),
    )


def _size(config: Mapping[str, object], field: str, absent: int | None = None) -> int:
    """A whole number from 1; `absent` where the field is missing, null or 0. KeyError or ValueError otherwise."""
    value = config[field] if absent is None else config.get(field) or absent
    least = 0 if absent == 0 else 1
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{field} {value!r}; allowed: a whole number from 1")
    return value


def _architecture(config: Mapping[str, object]) -> str:
    found = config["architectures"]
    if not isinstance(found, list) or not found or not isinstance(found[0], str):
        raise ValueError(f"architectures {found!r}; allowed: a list of names")
    return found[0]


def _quantization(config: Mapping[str, object]) -> str | None:
    found = config.get("quantization_config")
    return str(found.get("quant_method")) if isinstance(found, Mapping) else None
