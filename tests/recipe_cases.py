"""Models for the recipe tests: tensor lists with the shapes that matter (row lengths), two rows each."""

from fewbits.plan.recipes import Hyper, stream_order

Tensors = list[tuple[str, tuple[int, ...], str]]

BLOCK = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


def model(
    hyper: Hyper, width: int, inner: int, tied: bool = False, block: tuple[str, ...] = BLOCK
) -> Tensors:
    """Every tensor of a model, `inner` long rows in ffn_down and `width` long ones elsewhere."""
    tensors: Tensors = [("token_embd.weight", (2, width), "f32"), ("output_norm.weight", (width,), "f32")]
    if not tied:
        tensors.append(("output.weight", (2, width), "f32"))
    for layer in range(hyper.n_layer):
        tensors += [(f"blk.{layer}.{norm}_norm.weight", (width,), "f32") for norm in ("attn", "ffn")]
        for name in block:
            row = inner if "ffn_down" in name else width
            shape = (2, 2, row) if name.endswith("_exps") else (2, row)
            tensors.append((f"blk.{layer}.{name}.weight", shape, "f32"))
    return tensors


ATTENTION = BLOCK[:4]
EXPERTS = ("ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
SHARED = ("ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp")

CASES: dict[str, tuple[Hyper, Tensors]] = {}


def _case(name: str, hyper: Hyper, *shape: int, **options: object) -> None:
    CASES[name] = (hyper, model(hyper, *shape, **options))  # type: ignore[arg-type]


_case("llama", Hyper("llama", 32, 4, 4), 256, 512)
_case("llama-grouped-tied", Hyper("llama", 20, 8, 2), 256, 256, tied=True)
_case("llama-70b", Hyper("llama", 80, 8, 1), 256, 256, block=("attn_v", "ffn_down"))
_case("smollm", Hyper("llama", 30, 9, 3), 576, 1536, tied=True)
_case("smollm-untied", Hyper("llama", 30, 9, 3), 576, 1536)
_case("rows-of-80", Hyper("llama", 3, 4, 4), 80, 256)
_case("mixtral", Hyper("llama", 16, 8, 2, 8), 256, 256, block=ATTENTION + EXPERTS)
_case("qwen2moe", Hyper("qwen2moe", 9, 4, 4, 4), 256, 256, block=ATTENTION + EXPERTS + SHARED)
_case("phi3", Hyper("phi3", 17, 4, 4), 256, 256, block=("attn_qkv", "attn_output", "ffn_up", "ffn_down"))
_case("falcon", Hyper("falcon", 16, 4, 1), 256, 256, block=("attn_qkv", "attn_output", "ffn_up", "ffn_down"))


def summarize(types: dict[str, str]) -> dict[str, str]:
    """{name: type} -> {name without its block: run lengths in block order}, small enough to read and keep."""
    runs: dict[str, list[list]] = {}
    for name in sorted(types, key=stream_order):
        part = name.split(".", 2)[2] if name.startswith("blk.") else name
        run = runs.setdefault(part, [])
        if run and run[-1][0] == types[name]:
            run[-1][1] += 1
        else:
            run.append([types[name], 1])
    return {part: " ".join(f"{t}*{count}" for t, count in run) for part, run in sorted(runs.items())}
