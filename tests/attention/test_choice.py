"""The rule of the decode kernel, at the sizes it was measured at."""

import pytest

from helix_runtime.attention.choice import gqa_kernel_name, mla_kernel_name


@pytest.mark.parametrize(
    "head_dim, block_size, name",
    [(128, 16, "TRITON"), (128, 128, "TRITON"), (128, 64, "FLASH_ATTN"), (64, 16, "FLASH_ATTN")],
)
def test_gqa(head_dim, block_size, name):
    assert gqa_kernel_name(head_dim, block_size) == name


@pytest.mark.parametrize(
    "heads, block_size, name", [(16, 64, "FLASH_ATTN_MLA"), (128, 64, "FLASHMLA"), (128, 16, "FLASH_ATTN_MLA")]
)
def test_mla(heads, block_size, name):
    assert mla_kernel_name(heads, block_size) == name
