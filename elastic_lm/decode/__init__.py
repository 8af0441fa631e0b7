"""Decoding, the engine that both dials drive: tokens leave early (depth), and sub-networks run (width).

To read it from the top: `sampler` is what a caller sees, `options` and `settings` are what a caller chooses,
`served` holds the models that run, `prefill` begins, and `loop` is the mechanism. In the loop, `exit_check`
decides which rows emit, `lossless` verifies drafts, and `propagate` is CALM's approximation. Encoder-decoder
models have their own pair, `seq2seq` and `seq2seq_loop`.
"""
