"""A GPTQ or AWQ directory in GPTQModel, by its kernel in plain torch, which is compiled for each number of
tokens, half a minute a time: so all go through it at once."""

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
    prompt = len(task["tokens"])
    with torch.no_grad():
        logits = model(torch.tensor([task["tokens"] + task["expected"]])).logits[0].float()
    new = logits[prompt - 1 : prompt - 1 + task["new"]].argmax(-1)
    np.savez(result_path, logits=logits[:prompt].numpy(), new=new.numpy())
    print(json.dumps({"engine": "gptqmodel", "version": gptqmodel.__version__}))


if __name__ == "__main__":
    main(*sys.argv[1:])
