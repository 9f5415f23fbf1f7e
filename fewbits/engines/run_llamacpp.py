"""A GGUF file in llama.cpp, through the C API of llama-cpp-python; cache in f32, no flash attention."""

import ctypes
import json
import sys
from time import perf_counter

import numpy as np

# It rounds activations to 8 bits: 0.015 of 4 bits and more. Beyond that, which formats of 1 to 3 bits reach,
# its rounding is put into our forward pass (blocks/rounding.py).
ENGINES = [
    {"name": "llama.cpp", "packages": ("llama-cpp-python",), "install": "pip install 'fewbits[engine]'",
     "tolerance": 0.02, "mapped": True},
]  # fmt: skip


def main(model_path: str, task_path: str, result: str) -> None:
    import llama_cpp
    from llama_cpp import llama_cpp as api

    with open(task_path, encoding="utf-8") as file:
        task = json.load(file)
    api.llama_backend_init()
    params = api.llama_model_default_params()
    params.n_gpu_layers = 0
    model = api.llama_model_load_from_file(model_path.encode(), params)
    if not model:
        sys.exit("llama.cpp cannot load the file")
    total = max(map(len, task["windows"])) + task["new"]
    params = api.llama_context_default_params()
    params.n_ctx = params.n_batch = total
    params.n_ubatch = min(total, params.n_ubatch)
    params.n_threads = params.n_threads_batch = task["threads"]
    params.type_k = params.type_v = 0  # GGML_TYPE_F32
    params.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_DISABLED
    context = api.llama_init_from_model(model, params)
    if not context:
        sys.exit(f"llama.cpp cannot make a context of {total} tokens")
    vocab = api.llama_model_get_vocab(model)
    vocabulary = api.llama_vocab_n_tokens(vocab)
    new, start = [], perf_counter()
    for i, window in enumerate(task["windows"]):
        api.llama_memory_clear(api.llama_get_memory(context), True)
        ids = list(window)
        logits = decode(api, context, ids, 0, vocabulary, task["first"])
        last = logits[-1]
        for _ in range(task["new"]):
            ids.append(int(last.argmax()))
            last = decode(api, context, ids[-1:], len(ids) - 1, vocabulary)[-1]
        new.append(ids[len(window) :])
        np.save(f"{result}/{i}.npy", logits)
    about = {"engine": "llama-cpp-python", "version": llama_cpp.__version__}
    seconds = perf_counter() - start
    tokens = tokens_of(api, model, vocab, task.get("texts", []))
    print(json.dumps({**about, "new": new, "seconds": seconds, "tokens": tokens}))


def tokens_of(api, model, vocab, texts: list[str]) -> dict | None:  # type: ignore[no-untyped-def]
    """What the file's tokenizer says; None where it has none."""
    if api.llama_vocab_type(vocab) == api.LLAMA_VOCAB_TYPE_NONE:
        return None
    template, bos = api.llama_model_chat_template(model, None), api.llama_vocab_bos(vocab)
    every = range(api.llama_vocab_n_tokens(vocab))
    return {
        "texts": texts,
        "ids": [tokenized(api, vocab, text.encode()) for text in texts],
        "bos": bos if bos >= 0 else None,
        "ends": [i for i in every if api.llama_vocab_is_eog(vocab, i)],
        "template": template.decode() if template else None,
    }


def tokenized(api, vocab, text: bytes) -> list[int]:  # type: ignore[no-untyped-def]
    room = len(text) + 8  # a token has at least a byte, except for BOS, EOS and a leading space
    ids = (api.llama_token * room)()
    return list(ids[: api.llama_tokenize(vocab, text, len(text), ids, room, True, True)])


def decode(  # type: ignore[no-untyped-def]
    api, context, ids: list[int], start: int, vocabulary: int, first: int = 0
) -> np.ndarray:
    """Tokens at positions start, start + 1, ... -> logits `(t - first, vocabulary)`, of all but the first."""
    batch = api.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for place, token in enumerate(ids):
        batch.token[place], batch.pos[place] = token, start + place
        batch.n_seq_id[place], batch.seq_id[place][0], batch.logits[place] = 1, 0, place >= first
    if api.llama_decode(context, batch) != 0:
        sys.exit(f"llama.cpp failed to decode {len(ids)} tokens")
    flat = np.ctypeslib.as_array(
        ctypes.cast(api.llama_get_logits(context), ctypes.POINTER(ctypes.c_float)),
        ((len(ids) - first) * vocabulary,),
    )
    found = flat.reshape(-1, vocabulary).copy()
    api.llama_batch_free(batch)
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
