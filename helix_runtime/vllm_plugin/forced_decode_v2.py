"""Hook: forced decode for vLLM's V2 model runner, the default on GPUs. See `forced_decode.py` for V1 and for why.

Hook: `--logits-processors helix_runtime.vllm_plugin.forced_decode_v2:ForcedDecodeV2`; requests ask as with V1.
Upstream: documented extension point (vllm `v1/worker/gpu/sample/logits_processor/interface.py`), no patch. Logprobs of
`logprobs_mode=raw_logprobs` (the default) are taken from the logits before any processor. 0.32 can also replay a trace
(`SamplingParams.trace_decode_token_ids`), in the V2 runner only.
Remove when: replaying a trace works in both runners and over HTTP.
"""

from typing import TYPE_CHECKING

import torch
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcessor, LogitsProcRequestState

from helix_runtime.vllm_plugin.forced_tokens import wanted_tokens

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.config import VllmConfig


class ForcedDecodeV2(LogitsProcessor):
    """Masks all but the wanted token of each request that asks, found by its position in the request's output.

    The position is counted on the host, so no step waits for the device: the batch's lengths, which are exact without
    speculative decoding, less the length of the user's prompt. A request that was preempted comes back with its old
    output as part of what is prefilled, but with its own prompt length, so it goes on where it was. With speculative
    decoding (several rows a request) nothing is forced; the client sees that in the answer.
    """

    def __init__(self, vllm_config: "VllmConfig", req_states: LogitsProcRequestState):
        self.prompt_lengths = req_states.prompt_len
        self.wanted: dict[int, list[int]] = {}

    @classmethod
    def validate_params(cls, sampling_params: "SamplingParams") -> None:
        """Raises ValueError (HTTP 400) when the tokens are not a list of non-negative whole numbers."""
        wanted_tokens(sampling_params)

    def add_request(self, req_idx: int, sampling_params: "SamplingParams") -> bool:
        """Slots are recycled, so a request that does not ask clears what the one before left."""
        tokens = wanted_tokens(sampling_params)
        if tokens is None:
            self.wanted.pop(req_idx, None)
            return False
        self.wanted[req_idx] = tokens
        return True

    def apply(self, logits: torch.Tensor, ctx: LogitsContext) -> torch.Tensor:
        """`logits` [rows, V], changed in place. A row without output yet (an unfinished prefill) is left alone."""
        slots, lengths = ctx.idx_mapping_np.tolist(), ctx.seq_lens_upper_bound_np.tolist()
        if not self.wanted or len(slots) != logits.shape[0]:
            return logits
        rows, forced = [], []
        for row, slot in enumerate(slots):
            tokens = self.wanted.get(slot, ())
            step = lengths[row] - int(self.prompt_lengths.np[slot])
            if 0 <= step < len(tokens) and tokens[step] < logits.shape[1]:
                rows.append(row)
                forced.append(tokens[step])
        if rows:
            at = torch.tensor([rows, forced], device="cpu").to(logits.device, non_blocking=True)
            logits.index_fill_(0, at[0], float("-inf"))
            logits[at[0], at[1]] = 0.0
        return logits
