"""Several runs -> one report: shards of a plan, hosts with other hardware, nights. `python -m harness merge`."""
