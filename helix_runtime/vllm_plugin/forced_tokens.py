"""What a request asks of forced decode. Imports nothing heavy: vLLM's front end validates requests with it."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm import SamplingParams

#: The key in `vllm_xargs` / `SamplingParams.extra_args`.
KEY = "helix_forced_tokens"


def wanted_tokens(params: "SamplingParams") -> list[int] | None:
    """The tokens a request asks for, or None when it does not ask; ValueError when it asks wrongly."""
    asked = (params.extra_args or {}).get(KEY)
    if asked is None:
        return None
    if not isinstance(asked, list) or not all(isinstance(token, int) and token >= 0 for token in asked):
        raise ValueError(f"{KEY} must be a list of token ids, whole numbers from 0 on; got {asked!r}")
    return asked
