"""A directory with model.onnx in onnxruntime, on the CPU."""

import json
import sys

import numpy as np


def main(model_path: str, task_path: str, result_path: str) -> None:
    import onnxruntime

    with open(task_path) as file:
        task = json.load(file)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = task["threads"]
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(
        f"{model_path}/model.onnx", options, providers=["CPUExecutionProvider"]
    )

    def run(ids: list[int]) -> np.ndarray:
        """Logits `(t, vocabulary)`."""
        found: np.ndarray = session.run(["logits"], {"input_ids": np.array([ids])})[0][0]
        return found

    ids = list(task["tokens"])
    logits = last = run(ids)
    for _ in range(task["new"]):
        ids.append(int(last[-1].argmax()))
        last = run(ids)
    np.savez(result_path, logits=logits, new=np.array(ids[len(task["tokens"]) :]))
    print(json.dumps({"engine": "onnxruntime", "version": onnxruntime.__version__}))


if __name__ == "__main__":
    main(*sys.argv[1:])
