"""A directory in transformers, with whatever quantizer its config names; f32 where that can be had."""

import json
import sys

import numpy as np
import torch


def main(model_path: str, task_path: str, result_path: str) -> None:
    import transformers

    with open(task_path) as file:
        task = json.load(file)
    torch.set_num_threads(task["threads"])
    for name in task.get("imports", []):
        __import__(name)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        model_path, dtype=torch.float32, device_map="cpu", local_files_only=True
    ).eval()
    ids = list(task["tokens"])
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].float()
        for _ in range(task["new"]):
            last = logits[-1] if len(ids) == len(task["tokens"]) else model(torch.tensor([ids])).logits[0, -1]
            ids.append(int(last.argmax()))
    np.savez(result_path, logits=logits.numpy(), new=np.array(ids[len(task["tokens"]) :]))
    print(json.dumps({"engine": "transformers", "version": transformers.__version__}))


if __name__ == "__main__":
    main(*sys.argv[1:])
