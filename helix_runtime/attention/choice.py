"""Which decode kernel to run, by rule from measurements on an H200 (benchmarks/README.md, `attention-*-h200.json`).

What was seen, as a share of read bandwidth:
- GQA, head size 128, 64k to 1M tokens a rank: TRITON 0.93 to 0.94 with blocks of 128 and 0.90 with 16, FLASH_ATTN 0.82
  to 0.93, FLASHINFER 0.88 to 0.92; with 16k tokens and 8 requests 0.76, 0.68 and 0.67;
- with blocks of 64 TRITON falls to 0.78 where one KV head has 8 query heads: FLASH_ATTN is ahead there;
- head size 64: within 2 % of each other, FLASH_ATTN ahead;
- MLA: FLASH_ATTN_MLA ahead of FLASHMLA everywhere (16 heads: 0.91 against 0.75 at 128k tokens; 128 heads: 0.57
  against 0.54), TRITON_MLA behind both at 128k tokens.
"""

#: Heads up to which FLASH_ATTN_MLA is chosen: with 128 its test on short shards was seen to fail once, unexplained.
_TESTED_MLA_HEADS = 64


def gqa_kernel_name(head_dim: int, block_size: int) -> str:
    """The GQA decode kernel for a head size and a cache's block size, both in elements and tokens."""
    return "TRITON" if head_dim >= 128 and block_size != 64 else "FLASH_ATTN"


def mla_kernel_name(heads: int, block_size: int) -> str:
    """The MLA decode kernel for this many query heads on a rank. FLASHMLA reads blocks of 64 only."""
    return "FLASHMLA" if heads > _TESTED_MLA_HEADS and block_size == 64 else "FLASH_ATTN_MLA"
