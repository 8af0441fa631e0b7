"""`python -m elastic_lm` is `elastic-lm`."""

from elastic_lm.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
