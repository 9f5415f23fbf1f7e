"""A directory of mlx-lm, on the CPU."""

import json
import sys
from pathlib import Path

import numpy as np


def main(model_path: str, task_path: str, result_path: str) -> None:
    import mlx.core as mx
    import mlx_lm
    from mlx_lm.utils import load_model

    with open(task_path) as file:
        task = json.load(file)
    mx.set_default_device(mx.cpu)
    model, _ = load_model(Path(model_path))
    ids = list(task["tokens"])
    logits = np.array(model(mx.array([ids]))[0].astype(mx.float32))
    last = logits[-1]
    for _ in range(task["new"]):
        ids.append(int(last.argmax()))
        last = np.array(model(mx.array([ids]))[0, -1].astype(mx.float32))
    np.savez(result_path, logits=logits, new=np.array(ids[len(task["tokens"]) :]))
    print(json.dumps({"engine": "mlx-lm", "version": mlx_lm.__version__}))


if __name__ == "__main__":
    main(*sys.argv[1:])
