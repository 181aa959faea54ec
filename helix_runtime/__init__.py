"""Helix parallelism: layouts, partial attention, combine, and the plugin for stock vLLM."""
