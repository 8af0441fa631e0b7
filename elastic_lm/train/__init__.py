"""Training."""

from etils import epy as _epy

with _epy.lazy_api_imports(globals()):
    from elastic_lm.train.load_config import load_config
    from elastic_lm.train.run import fit
