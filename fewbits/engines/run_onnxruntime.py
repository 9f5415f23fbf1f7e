"""A directory with model.onnx in onnxruntime, on the CPU.

    prompt     input_ids (1, t), past of length 0      ->  logits of all its tokens, present
    each step  the token last chosen, past = present   ->  logits of one token, present, one token longer

So the logits are the prompt's, and the tokens after it come through the cache, as they do for a user. A graph
without past has no cache: all tokens go through it at each step. The rows of a model that generates no text
are those of its first output: logits or last_hidden_state.
"""

import json
import sys
from time import perf_counter
from typing import Any

import numpy as np

ENGINES = [
    {"name": "onnxruntime", "packages": ("onnxruntime",), "install": "pip install 'fewbits[onnx]'",
     "apart": "onnx", "heads": True},
]  # fmt: skip


class Decoder:
    """A session with its cache of keys and values."""

    def __init__(self, session: Any):
        self.session = session
        self.rows = session.get_outputs()[0].name
        self.inputs = {entry.name: entry.shape for entry in session.get_inputs()}
        self.present = [entry.name for entry in session.get_outputs() if entry.name.startswith("present.")]
        self.past = {
            name: np.zeros((1, shape[1], 0, shape[3]), np.float32)
            for name, shape in self.inputs.items()
            if name.startswith("past_key_values.")
        }
        self.ids: list[int] = []

    def __call__(self, new: list[int]) -> np.ndarray:
        """Tokens that follow those of the calls before -> their logits `(t, vocabulary)`."""
        before, self.ids = len(self.ids), self.ids + new
        fed = new if self.past else self.ids
        place = np.arange(len(self.ids) - len(fed), len(self.ids), dtype=np.int64)
        given = {
            "input_ids": np.array([fed], np.int64),
            "attention_mask": np.ones((1, len(self.ids)), np.int64),
            "position_ids": place[None],
            "token_type_ids": np.zeros((1, len(fed)), np.int64),
        }
        given = {name: value for name, value in given.items() if name in self.inputs}
        rows, *present = self.session.run([self.rows, *self.present], given | self.past)
        names = [name.replace("present.", "past_key_values.", 1) for name in self.present]
        self.past = dict(zip(names, present, strict=True))
        found: np.ndarray = rows[0, 0 if self.past else before :] if rows.ndim == 3 else rows
        return found


def main(model_path: str, task_path: str, result: str) -> None:
    import onnxruntime

    with open(task_path, encoding="utf-8") as file:
        task = json.load(file)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = task["threads"]
    options.log_severity_level = 3  # errors
    # Else inputs of int8 weights with zero points are rounded to 8 bits, 0.001 nats: the file is tested here.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    session = onnxruntime.InferenceSession(
        f"{model_path}/model.onnx", options, providers=["CPUExecutionProvider"]
    )
    chosen, start = [], perf_counter()
    for i, window in enumerate(task["windows"]):
        decode = Decoder(session)
        logits = last = decode(window)
        new: list[int] = []
        for _ in range(task["new"]):
            new.append(int(last[-1].argmax()))
            last = decode(new[-1:])
        chosen.append(new)
        np.save(f"{result}/{i}.npy", logits[task["first"] :])
    about = {"engine": "onnxruntime", "version": onnxruntime.__version__}
    print(json.dumps({**about, "new": chosen, "seconds": perf_counter() - start}))


if __name__ == "__main__":
    main(*sys.argv[1:])
