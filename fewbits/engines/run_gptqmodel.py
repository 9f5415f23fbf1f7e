"""A GPTQ or AWQ directory in GPTQModel, by its kernel in plain torch."""

import json
import sys

import numpy as np
import torch


def main(model_path: str, task_path: str, result_path: str) -> None:
    import gptqmodel
    from gptqmodel import BACKEND, GPTQModel

    with open(task_path) as file:
        task = json.load(file)
    torch.set_num_threads(task["threads"])
    with open(f"{model_path}/config.json") as file:
        awq = json.load(file)["quantization_config"]["quant_method"] == "awq"
    model = GPTQModel.load(model_path, device="cpu", backend=BACKEND.TORCH, dtype=torch.float16).model.eval()
    if not awq:  # loaded in f32 it is refused; its AWQ kernel takes f16 only
        model = model.float()
    ids = list(task["tokens"])
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].float()
        for _ in range(task["new"]):
            last = logits[-1] if len(ids) == len(task["tokens"]) else model(torch.tensor([ids])).logits[0, -1]
            ids.append(int(last.argmax()))
    np.savez(result_path, logits=logits.numpy(), new=np.array(ids[len(task["tokens"]) :]))
    print(json.dumps({"engine": "gptqmodel", "version": gptqmodel.__version__}))


if __name__ == "__main__":
    main(*sys.argv[1:])
