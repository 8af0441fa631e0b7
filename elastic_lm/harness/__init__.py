"""The lm-evaluation-harness: our models as models of it, tasks on data in a folder, accuracy against compute.

Nothing here needs `lm_eval` (the extra `harness`) before it is used.
"""
