"""Dense models with the head sizes and lengths of real ones: for GPU kernels, made on the spot like the small ones."""

from harness.models.recipe import Recipe, family


@family(r"llama-k(?P<kv_heads>[1-9]\d?)-h(?P<head_dim>64|128)")
def wide(kv_heads: str, head_dim: str) -> Recipe:
    """`llama-k4-h128`: 16 query heads of 128 that share 4 KV heads, positions up to 128k."""
    return Recipe(
        name=f"llama-k{kv_heads}-h{head_dim}",
        heads=16,
        kv_heads=int(kv_heads),
        head_dim=int(head_dim),
        hidden=512,
        intermediate=1024,
        positions=131072,
        rope_theta=500000.0,
    )
