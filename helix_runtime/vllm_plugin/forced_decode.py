"""Hook: a logits processor that imposes a continuation, token by token.

Why: two servers can only be compared step by step on the same prefix. Left to themselves they part at the first
near-tie and say nothing after it.
Hook: `--logits-processors helix_runtime.vllm_plugin.forced_decode:ForcedDecode` (vLLM's V1 model runner); a
request asks with `vllm_xargs={"helix_forced_tokens": [...]}`. It is not an entry point: a server that was not told
loads nothing.
Upstream: documented extension point, no patch. With `logprobs_mode=raw_logprobs` (the default) logprobs are taken
before any processor, so they stay the model's own. The V2 runner (GPUs) has another interface: `forced_decode_v2.py`.
Remove when: vLLM can score a given continuation through its decode path.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from helix_runtime.vllm_plugin.forced_tokens import wanted_tokens

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.config import VllmConfig

#: What a request asked for, and its running output as vLLM extends it.
Wanted = tuple[list[int], Sequence[int]]


class ForcedDecode(LogitsProcessor):
    """Masks all but the wanted token, found by its position in the request's output.

    The position is the length of vLLM's own output list, so preemption, chunked prefill and moves within the batch do
    not matter. Past the end of the wanted tokens, or where the wanted token is none of the model's, a request is free:
    the client sees that in the answer, and no request can bring the engine down.
    """

    @classmethod
    def validate_params(cls, sampling_params: "SamplingParams") -> None:
        """Raises ValueError (HTTP 400) when the tokens are not a list of non-negative whole numbers."""
        wanted_tokens(sampling_params)

    def __init__(self, vllm_config: "VllmConfig", device: torch.device, is_pin_memory: bool):
        self.wanted: dict[int, Wanted] = {}

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        process_dict_updates(self.wanted, batch_update, _wanted)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """`logits` [B, V], changed in place."""
        for row, (tokens, output) in self.wanted.items():
            step = len(output)
            if step < len(tokens) and tokens[step] < logits.shape[-1]:
                logits[row] = float("-inf")
                logits[row, tokens[step]] = 0.0
        return logits


def _wanted(params: "SamplingParams", _prompt: list[int] | None, output: list[int]) -> Wanted | None:
    tokens = wanted_tokens(params)
    return None if tokens is None else (tokens, output)
