"""A directory in transformers, with whatever quantizer its config names; f32 where that can be had.

Where f32 does not fit in memory, weights stay in the type of the file, and a layer is in f32 while it runs.
"""

import json
import os
import sys
from contextlib import suppress
from inspect import signature
from time import perf_counter
from typing import Any

import numpy as np
import torch

# transformers alone, and with what a quantizer needs: its name, more packages, and what else `Engine` has.
_WITH: list[tuple[str, tuple[str, ...], dict[str, Any]]] = [
    ("", (), {"by_layer": True, "devices": True}),
    ("+fewbits", (), {"imports": ("fewbits.transformers",), "devices": True}),
    ("+accelerate", ("accelerate",), {"apart": "fp8"}),
    # In f32, as here; left alone, 4 bits in bf16 made 0.004, LLM.int8()'s rounding of inputs 0.05.
    ("+bitsandbytes", ("bitsandbytes", "accelerate"), {"apart": "bitsandbytes"}),
    # MX and NVFP types are decoded to bf16: 0.0042.
    ("+compressed-tensors", ("compressed-tensors",),
     {"apart": "compressed-tensors", "wider": {"mx": 0.01, "nv": 0.01}}),
    # Some kernels compute in bf16 or f16: 4.8e-6 of GPTQ, 2.9e-5 of AWQ.
    ("+gptqmodel", ("gptqmodel", "accelerate"),
     {"apart": "gptqmodel", "install": "`make gptqmodel`", "wider": {"awq": 6e-5},
      "by_method": {"gptq": ("optimum",)}}),
]  # fmt: skip
ENGINES = [
    {"name": f"transformers{name}", "packages": ("transformers", *packages),
     "install": f"pip install {' '.join(packages) or 'transformers'}", "heads": True, **about}
    for name, packages, about in _WITH
]  # fmt: skip


def main(model_path: str, task_path: str, result: str) -> None:
    import transformers

    with open(task_path, encoding="utf-8") as file:
        task = json.load(file)
    torch.set_num_threads(task["threads"])
    for name in task.get("imports", []):
        __import__(name)
    said = {"engine": "transformers", "version": transformers.__version__, **tried(model_path, task, result)}
    print(json.dumps(said))


def tried(model_path: str, task: dict, result: str) -> dict[str, Any]:
    """What `run` says by the first arguments that work, and a note on those arguments."""
    if task["stored"]:
        return run(model_path, task, result, getattr(torch, task["stored"]))
    settings = settings_of(model_path)
    ways: list[tuple[torch.dtype | str, dict, str | None]] = [(torch.float32, {}, None)]
    if settings.get("quant_method") == "compressed-tensors":
        from transformers import CompressedTensorsConfig

        # Some types are decoded to bf16 whatever the model computes in. 0.20 makes room for zero points that
        # are not packed, and finds packed ones.
        ways.append(("auto", {}, None))
        given = {"quantization_config": CompressedTensorsConfig(dequantize=True)}
        ways.append((torch.float32, given, "loaded with CompressedTensorsConfig(dequantize=True)"))
    if settings.get("quant_method") in ("gptq", "awq"):
        from transformers import AwqConfig, GPTQConfig

        # The kernels that they take for some CPUs want rows of whole groups, or have not every size of group.
        config, backend = {"gptq": (GPTQConfig, "torch"), "awq": (AwqConfig, "torch_awq")}[
            settings["quant_method"]
        ]
        given = {"quantization_config": config(bits=settings["bits"], backend=backend)}
        ways.append((torch.float32, given, f'loaded with {config.__name__}(backend="{backend}")'))
    for dtype, given, note in ways[:-1]:
        try:
            return {**run(model_path, task, result, dtype, **given), "note": note}
        except RuntimeError:
            continue
    dtype, given, note = ways[-1]
    return {**run(model_path, task, result, dtype, **given), "note": note}


@torch.no_grad()
def run(
    model_path: str, task: dict, result: str, dtype: torch.dtype | str, **given: object
) -> dict[str, Any]:
    """Write the logits of all windows; the greedy tokens after each, the time it took, what was left out of
    the model, and the tokens of the texts."""
    model, info = class_of(model_path, task.get("class")).from_pretrained(
        model_path, dtype=dtype, local_files_only=True, output_loading_info=True, **given
    )
    random = sorted(info["missing_keys"])
    if random:
        sys.exit(
            f"transformers fills {len(random)} tensors with random numbers, such as {', '.join(random[:3])}: "
            "the file does not have them under names that it knows"
        )
    model.eval().to(task["device"])
    if settings_of(model_path).get("quant_method") == "bitsandbytes":
        compute_in_f32(model)
    if task["stored"]:
        compute_by_layer_in_f32(model)
    chosen, start = [], perf_counter()
    for i, window in enumerate(task["windows"]):
        prompt, new = len(window), [0] * task["new"]
        for _ in range(task["new"] + 1):  # as in run_gptqmodel.py, whose kernels may run here too
            guess = new
            logits = logits_of(model, window + guess)
            new = logits[prompt - 1 : -1].argmax(-1).tolist()
            if new == guess:
                break
        chosen.append(new)
        np.save(f"{result}/{i}.npy", logits[task["first"] : prompt].numpy())
    return {
        "new": chosen,
        "seconds": perf_counter() - start,
        "unexpected": sorted(info["unexpected_keys"]),
        "tokens": tokens_of(model_path, model, task.get("texts", [])),
    }


def logits_of(model: Any, ids: list[int]) -> torch.Tensor:
    """Of each token, or of the text; hidden states of a model without logits. A decoder gets its encoder's
    tokens too."""
    given, tokens = {}, torch.tensor([ids], device=model.device)
    twice = getattr(model.config, "is_encoder_decoder", False)
    if twice and "decoder_input_ids" in signature(model.forward).parameters:
        given = {"decoder_input_ids": tokens}
    out = model(tokens, **given)
    rows = out.get("logits", out.get("last_hidden_state"))
    if rows is None or rows.ndim not in (2, 3):
        sys.exit(f"{type(model).__name__} gives neither logits nor hidden states")
    found: torch.Tensor = rows.float().cpu()
    return found[0] if found.ndim == 3 else found


def class_of(model_path: str, name: str | None = None) -> Any:
    """The class of this name, or that the config names, where transformers has it; else that of language
    models."""
    import transformers

    with open(f"{model_path}/config.json", encoding="utf-8") as file:
        named = json.load(file).get("architectures") or ["none"]
    return getattr(transformers, name or str(named[0]), transformers.AutoModelForCausalLM)


def tokens_of(model_path: str, model: Any, texts: list[str]) -> dict[str, Any] | None:
    """What AutoTokenizer and the generation config say; None where no tokenizer can be loaded. Some classes
    make an empty one of a directory that has none."""
    from jinja2 import TemplateError
    from transformers import AutoTokenizer

    if not any("token" in name or "vocab" in name for name in os.listdir(model_path)):
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_path, local_files_only=True)
    except (OSError, ValueError, LookupError, ImportError, AttributeError, TypeError):
        return None
    template = getattr(tokenizer, "chat_template", None)
    template = template.get("default") if isinstance(template, dict) else template
    with suppress(TemplateError, ValueError, TypeError):  # there is none, or it takes other turns
        turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "How are you?"}]
        texts = [*texts, tokenizer.apply_chat_template(turns, tokenize=False)]
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}
    return {
        "texts": texts,
        "ids": [list(tokenizer(text)["input_ids"]) for text in texts],
        "bos": tokenizer.bos_token_id,
        "ends": sorted(ends),
        "template": template if isinstance(template, str) else None,
    }


def compute_in_f32(model: torch.nn.Module) -> None:
    """bitsandbytes, whatever dtype is given, leaves floats in the type of the file, computes 4 bits in bf16
    and rounds the inputs of int8 weights to 8 bits (0.05 nats on the demo model). It is the file that is
    tested here, so all of that is put in f32; in training, inputs are not rounded."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    module: Any
    for module in model.modules():
        kind = type(module).__name__
        if kind == "Linear4bit":
            module.support_avx512bf16_for_cpu = False
            module.weight.quant_state.dtype = module.compute_dtype = torch.float32
        elif kind == "Linear8bitLt":
            module.train()


def compute_by_layer_in_f32(model: torch.nn.Module) -> None:
    """Each element of a list of layers is in f32 while it runs, and what stands outside of them always."""
    layers: tuple[str, ...] = ()
    outside: list[torch.Tensor] = []
    for name, module in model.named_modules():
        if name.startswith(layers):
            continue
        whole = isinstance(model.get_submodule(name.rpartition(".")[0]), torch.nn.ModuleList)
        tensors = [*module.parameters(whole), *module.buffers(whole)]
        floats = [tensor for tensor in tensors if tensor.is_floating_point()]
        if whole:
            layers += (f"{name}.",)
            put_in_f32_while_it_runs(module, floats)
        else:
            outside += floats
    for tensor in outside:
        tensor.data = tensor.data.float()


def put_in_f32_while_it_runs(module: torch.nn.Module, tensors: list[torch.Tensor]) -> None:
    stored = [tensor.data for tensor in tensors]

    def before(*_: object) -> None:
        for tensor in tensors:
            tensor.data = tensor.data.float()

    def after(*_: object) -> None:
        for tensor, data in zip(tensors, stored, strict=True):
            tensor.data = data

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after)


def settings_of(model_path: str) -> dict:
    with open(f"{model_path}/config.json", encoding="utf-8") as file:
        found: dict = json.load(file).get("quantization_config", {})
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
