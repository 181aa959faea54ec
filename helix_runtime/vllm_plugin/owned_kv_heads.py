"""Which KV heads a rank needs for its own new tokens: those that its owned query heads read."""


def owned_kv_heads(num_heads: int, num_kv_heads: int, kvp: int, kvp_rank: int) -> slice | list[int]:
    """The local KV heads read by the query heads that rank `kvp_rank` owns after the exchange.

    Query head h of the Q/TPA = `num_heads` computed here reads local KV head h // (num_heads / num_kv_heads); owned are
    heads [kvp_rank * n, (kvp_rank + 1) * n), n = num_heads / kvp. A slice where the owned heads fill whole KV heads or
    lie in one; otherwise one KV head for each owned query head, to be gathered.
    """
    owned, group = num_heads // kvp, num_heads // num_kv_heads
    first = kvp_rank * owned
    if owned % group == 0 or group % owned == 0:
        return slice(first // group, (first + owned - 1) // group + 1)
    return [head // group for head in range(first, first + owned)]
