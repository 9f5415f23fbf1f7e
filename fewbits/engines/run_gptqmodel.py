"""A GPTQ or AWQ directory in GPTQModel, by its kernel in plain torch.

The kernel is compiled for each number of tokens, half a minute a time. So every pass has the prompt and
guesses of all new tokens; its choices are the guesses of the next, and where they are the same they are the
greedy continuation. Each pass makes at least one more token right.
"""

import json
import sys
from time import perf_counter

import numpy as np
import torch

# GPTQ in f32, 1e-7; its AWQ kernel takes f16 only, 6.7e-5.
ENGINES = [
    {"name": "GPTQModel", "packages": ("gptqmodel",), "install": "`make gptqmodel`", "apart": "gptqmodel",
     "wider": {"awq": 1.5e-4}},
]  # fmt: skip


def main(model_path: str, task_path: str, result: str) -> None:
    import gptqmodel
    from gptqmodel import BACKEND, GPTQModel

    with open(task_path, encoding="utf-8") as file:
        task = json.load(file)
    torch.set_num_threads(task["threads"])
    with open(f"{model_path}/config.json", encoding="utf-8") as file:
        awq = json.load(file)["quantization_config"]["quant_method"] == "awq"
    model = GPTQModel.load(model_path, device="cpu", backend=BACKEND.TORCH, dtype=torch.float16).model.eval()
    if not awq:  # loaded in f32 it is refused; its AWQ kernel takes f16 only
        model = model.float()
    chosen, start = [], perf_counter()
    for i, window in enumerate(task["windows"]):
        prompt, new = len(window), [0] * task["new"]
        for _ in range(task["new"] + 1):
            guess = new
            with torch.no_grad():
                logits = model(torch.tensor([window + guess])).logits[0].float()
            new = logits[prompt - 1 : -1].argmax(-1).tolist()
            if new == guess:
                break
        chosen.append(new)
        np.save(f"{result}/{i}.npy", logits[task["first"] : prompt].numpy())
    about = {"engine": "gptqmodel", "version": gptqmodel.__version__}
    print(json.dumps({**about, "new": chosen, "seconds": perf_counter() - start}))


if __name__ == "__main__":
    main(*sys.argv[1:])
