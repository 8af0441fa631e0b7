"""`elastic-lm route`: fitting a rule between two models and running it over JSONL."""
