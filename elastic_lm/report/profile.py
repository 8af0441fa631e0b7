"""How to look at what JAX's profiler has traced."""

from pathlib import Path


def how_to_look(folder: Path | str) -> str:
    """Commands that show the traces of a folder."""
    return (
        f"pip install xprof && xprof --logdir {folder} shows them, and https://ui.perfetto.dev opens "
        f"{folder}/plugins/profile/*/perfetto_trace.json.gz"
    )
