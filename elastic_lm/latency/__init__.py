"""Latency tables: `table` holds and loads them, `build` measures them, `verify` checks their predictions."""
