"""transformers' `generate` on the weights of `decoding`, in a process of its own without jax."""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

BATCHES = (1, 8)
ROUNDS = 3
LONGEST = 120.0  # seconds, importing torch and compiling included


def transformers(record: Any, cache: str, args: argparse.Namespace) -> None:
    """Puts their tokens/s, ours of the same shape, and ours / theirs, prefill included on both sides."""
    import os

    import numpy as np
    from decoding import NEW, big_model, prompts
    from graphs import child

    import elastic_lm as el

    big = big_model(args.tiny)
    result = record.path.parent / f"{record.section}.json"
    result.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        el.hf.export(big.plain, big.backbone, Path(folder) / "model")
        ids = prompts(big, max(BATCHES))
        Path(folder, "job.json").write_text(json.dumps({"ids": ids, "new": NEW, "cache": cache}))
        record.say("exported")
        command = [sys.executable, __file__, folder, str(result)]
        threads = {"OMP_NUM_THREADS": "1"} if args.tiny else {}
        found = child(command, {**os.environ, **threads}, min(max(record.left(), 20.0), LONGEST))
    theirs = json.loads(result.read_text()) if result.is_file() else {}
    record.put(**found, **theirs)
    for batch in BATCHES:
        seconds = record.found(f"decode_{batch}").get("seconds_plain", {}).get("plain")
        if seconds and f"batch_{batch}" in theirs:
            ours = batch * NEW / float(np.median(seconds))
            ratio = ours / theirs[f"batch_{batch}"]["tokens_per_s"]
            record.put(**{f"ours_batch_{batch}": {"tokens_per_s": ours, "ours_over_theirs": ratio}})


def main() -> None:
    """The process itself; writes its result after every batch size."""
    folder, result = map(Path, sys.argv[1:3])
    import torch
    from transformers import AutoModelForCausalLM

    job = json.loads((folder / "job.json").read_text())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.bfloat16).to(device).eval()
    attention = getattr(model.config, "_attn_implementation", "")
    found: dict[str, Any] = {"device": device, "cache": job["cache"], "attention": attention}
    for batch in BATCHES:
        found[f"batch_{batch}"] = timed(torch, model, torch.tensor(job["ids"][:batch], device=device), job)
        result.write_text(json.dumps(found))
        print(batch, found, flush=True)


def timed(torch: Any, model: Any, ids: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Median seconds of a call after one, which may compile, that is not counted."""
    how = {"max_new_tokens": job["new"], "min_new_tokens": job["new"], "do_sample": False, "pad_token_id": 0}
    if job["cache"] == "static":
        how["cache_implementation"] = "static"
    seconds = []
    for _ in range(ROUNDS + 1):
        began = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), **how)
        assert out.shape[1] == ids.shape[1] + job["new"]
        out.tolist()  # waits for the device
        seconds.append(time.perf_counter() - began)
    step = statistics.median(seconds[1:])
    return {"seconds": seconds, "tokens_per_s": len(ids) * job["new"] / step}


if __name__ == "__main__":
    main()
