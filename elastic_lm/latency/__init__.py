"""Latency tables (`elastic_lm.latency_table`): `build` measures them, `verify` checks their predictions."""
