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
    try:
        logits, new = run(model_path, task, torch.float32)
    except RuntimeError:  # compressed-tensors decodes some types to bf16 whatever the model computes in
        logits, new = run(model_path, task, "auto")
    np.savez(result_path, logits=logits.numpy(), new=np.array(new))
    print(json.dumps({"engine": "transformers", "version": transformers.__version__}))


@torch.no_grad()
def run(model_path: str, task: dict, dtype: torch.dtype | str) -> tuple[torch.Tensor, list[int]]:
    """Logits `(t, vocabulary)` f32 of the tokens, and the greedy tokens after them."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=dtype, local_files_only=True).eval()
    ids = list(task["tokens"])
    logits = last = model(torch.tensor([ids])).logits[0].float()
    for _ in range(task["new"]):
        ids.append(int(last[-1].argmax()))
        last = model(torch.tensor([ids])).logits[0]
    return logits, ids[len(task["tokens"]) :]


if __name__ == "__main__":
    main(*sys.argv[1:])
