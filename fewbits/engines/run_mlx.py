"""A directory of mlx-lm, on the CPU."""

import json
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

# It computes in f16: 6.3e-5.
ENGINES = [
    {"name": "mlx-lm", "packages": ("mlx-lm",), "install": "pip install mlx-lm 'mlx[cpu]'", "apart": "mlx",
     "tolerance": 1.5e-4},
]  # fmt: skip


def main(model_path: str, task_path: str, result: str) -> None:
    import mlx.core as mx
    import mlx_lm
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.utils import load_model

    with open(task_path, encoding="utf-8") as file:
        task = json.load(file)
    mx.set_default_device(mx.cpu)
    model, _ = load_model(Path(model_path))

    def run(ids: list[int], cache: Any) -> np.ndarray:
        """Tokens after those of the cache -> logits `(t, vocabulary)`."""
        return np.array(model(mx.array([ids]), cache=cache)[0].astype(mx.float32))

    chosen, start = [], perf_counter()
    for i, window in enumerate(task["windows"]):
        cache = make_prompt_cache(model)
        logits = last = run(window, cache)
        new: list[int] = []
        for _ in range(task["new"]):
            new.append(int(last[-1].argmax()))
            last = run(new[-1:], cache)
        chosen.append(new)
        np.save(f"{result}/{i}.npy", logits[task["first"] :])
    about = {"engine": "mlx-lm", "version": mlx_lm.__version__}
    print(json.dumps({**about, "new": chosen, "seconds": perf_counter() - start}))


if __name__ == "__main__":
    main(*sys.argv[1:])
