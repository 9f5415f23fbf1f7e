"""ONNX directories: what the graph can say, hostile graphs, other files in the same directory."""

import json

import pytest
import torch

from fewbits.dtypes import BF16
from fewbits.errors import FewbitsError, FileError, PlanError
from fewbits.files.directory import FILE_TYPES
from fewbits.files.onnx.decoder import decoder_of
from fewbits.files.open import open_checkpoint
from fewbits.formats import FORMATS, kind_of
from fewbits.workflow.request import Request
from fewbits.workflow.run import convert
from fewbits.workflow.run import run as quantize
from tests.files.directories import ONE_BLOCK, kinds, one_block, random_qtensor, write_directory
from tests.tiny import save_tiny

onnx = pytest.importorskip("onnx")
ONNX = FILE_TYPES.get("onnx")
O_PROJ = "model.layers.0.self_attn.o_proj.weight"
TINY = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.fixture
def directory(tmp_path):
    q = random_qtensor(FORMATS.get("int4_g32_asym"), 64, 256)
    return write_directory(tmp_path / "m", "onnx", one_block({O_PROJ: q}), ONE_BLOCK)


def decoded(path):
    found = {}
    for name, tensor in open_checkpoint(path).tensors.items():
        value = tensor.load()
        found[name] = value if isinstance(value, torch.Tensor) else value.decode()
    return found


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_graph_is_valid_and_its_arrays_can_be_mapped(directory):
    onnx.checker.check_model(directory / "model.onnx")
    model = onnx.load(directory / "model.onnx", load_external_data=False)
    offsets = [
        int(entry.value)
        for t in model.graph.initializer
        for entry in t.external_data
        if entry.key == "offset"
    ]
    assert len(offsets) == 11 + 3 and not any(offset % 4096 for offset in offsets)
    onnx.load(directory / "model.onnx")  # the package finds the bytes where ours says they lie


@pytest.mark.parametrize("format", ["int4_g32_asym", "int4_g128", "int8_g64", "int4_g64_bf16"])
def test_a_last_group_that_is_not_whole(format):
    q = random_qtensor(FORMATS.get(format), 8, 80 + 2 * 40)
    arrays = ONNX.pack(q)
    groups = -(-160 // q.format.cells.columns)
    assert arrays[0].shape == (8, groups, q.format.cells.columns * q.format.bits // 8)
    back = ONNX.unpack(q.format, q.shape, arrays)
    assert all(torch.equal(back.planes[name], plane) for name, plane in q.planes.items())


@pytest.mark.parametrize("format", ["int8_channel", "int8_channel_asym", "int8_tensor"])
def test_the_package_s_reference_decodes_the_very_values(format):
    from onnx import TensorProto, helper
    from onnx.reference import ReferenceEvaluator

    q = random_qtensor(FORMATS.get(format), 6, 40)
    parts = [part.float().numpy() if part.is_floating_point() else part.numpy() for part in ONNX.pack(q)]
    names = ["codes", "scale", "zero"][: len(parts)]
    infos = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(part.dtype), part.shape)
        for name, part in zip(names, parts, strict=True)
    ]
    out = helper.make_tensor_value_info("w", TensorProto.FLOAT, q.shape)
    node = helper.make_node("DequantizeLinear", names, ["w"], axis=0)
    opsets = [helper.make_opsetid("", 21)]  # the first that its reference has with an axis
    model = helper.make_model(helper.make_graph([node], "g", infos, [out]), opset_imports=opsets)
    (found,) = ReferenceEvaluator(model).run(None, dict(zip(names, parts, strict=True)))
    assert torch.equal(torch.from_numpy(found), q.decode())


# ---- what the graph cannot say ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "gemma3_text"}, r"llama, mistral, qwen2, qwen3, not 'gemma3_text'; .*gguf"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "max_position_embeddings": 64}, "'yarn'"),
        ({"partial_rotary_factor": 0.5}, "a part of each head"),
        ({"num_key_value_heads": 3}, "4 heads of 64 with 3"),
        ({"num_hidden_layers": 2}, r"layers\.1\.self_attn\.q_proj\.weight' is missing"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"hidden_size": "64", "num_attention_heads": 0}, r"hidden_size is 64\n?.*num_attention_heads is 0"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps is 'small'"),
        ({"model_type": "mistral", "sliding_window": -1}, "sliding_window is '-1'"),
        ({"max_position_embeddings": 0}, "max_position_embeddings is '0'"),
        ({"head_dim": 32}, r"q_proj\.weight' is \(256, 64\), the config says \(128, 64\)"),
        ({"model_type": "qwen2", "sliding_window": 8, "use_sliding_window": True}, "layer_types"),
    ],
)
def test_what_the_graph_cannot_say_is_refused(change, said):
    given = kinds(one_block({}))
    with pytest.raises(PlanError, match=said):
        ONNX.settings(given, ONE_BLOCK | change, {})


def test_all_tensors_that_do_not_fit_are_listed():
    given = kinds(one_block({}))
    given["model.layers.0.mlp.router.weight"] = (BF16, (4, 64))
    given["model.norm.weight"] = (kind_of("f64"), (64,))
    del given["lm_head.weight"]
    with pytest.raises(PlanError) as caught:
        ONNX.settings(given, ONE_BLOCK, {})
    assert all(word in str(caught.value) for word in ("router", "is f64", "'lm_head.weight' is missing"))


def test_windows_and_frequencies_are_the_config_s():
    window = {"sliding_window": 8}
    assert decoder_of(ONE_BLOCK | window).windows == (None,)
    assert decoder_of(ONE_BLOCK | window | {"model_type": "mistral"}).windows == (8,)
    types = window | {"model_type": "qwen3", "num_hidden_layers": 2}
    types["layer_types"] = ["full_attention", "sliding_attention"]
    assert decoder_of(ONE_BLOCK | types).windows == (None, 8)
    linear = {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 100.0}}
    plain = {"rope_theta": 100.0}
    assert decoder_of(ONE_BLOCK | linear).frequencies[0] == decoder_of(ONE_BLOCK | plain).frequencies[0] / 4


# ---- hostile files ---------------------------------------------------------------------------------


def change_initializer(key, value):
    def change(model):
        tensor = next(t for t in model.graph.initializer if t.name == f"{O_PROJ}.codes")
        if key == "dims":
            tensor.dims[:] = value
        elif key == "data_type":
            tensor.data_type = value
        else:
            next(entry for entry in tensor.external_data if entry.key == key).value = value

    return change


def change_rows(change):
    def changed(model):
        said = json.loads(model.metadata_props[0].value)
        change(said)
        model.metadata_props[0].value = json.dumps(said)

    return changed


HOSTILE = [
    (change_initializer("location", "../../etc/passwd"), r"lies in '\.\./\.\./etc/passwd', not in"),
    (change_initializer("location", ""), "lies in ''"),
    (change_initializer("offset", "-4096"), "are no bytes"),
    (change_initializer("offset", "9" * 30), "are no bytes"),
    (change_initializer("offset", "\u0664096"), "are no bytes"),
    (change_initializer("offset", str(2**40)), "ends at byte"),
    (change_initializer("offset", "0"), "begins at byte"),
    (change_initializer("length", "1"), "its length is 1"),
    (change_initializer("dims", [2**62, 2**62, 16]), "needs"),
    (change_initializer("dims", [-64, -8, 16]), "not a list of sizes"),
    (change_initializer("dims", [64, 16, 8]), r"plane 'codes' is U8 \(64, 16, 8\)"),
    (change_initializer("data_type", 8), "type 8"),
    (lambda model: model.graph.initializer.append(model.graph.initializer[-1]), "twice|another ends"),
    (lambda model: model.metadata_props.pop(), "was not written by fewbits"),
    (change_rows(lambda said: said.update(version=2)), "version 2"),
    (change_rows(lambda said: said.update(tensors=[])), "version 1"),
    (change_rows(lambda said: said["tensors"][O_PROJ].update(format="nf4")), "does not support nf4"),
    (change_rows(lambda said: said["tensors"][O_PROJ].update(format="int4_g64")), "needs U8"),
    (change_rows(lambda said: said["tensors"][O_PROJ].update(shape=[64])), "not a format and a shape"),
    (change_rows(lambda said: said["tensors"].update(x=said["tensors"][O_PROJ])), "'x': plane 'x.codes'|'x'"),
]


@pytest.mark.parametrize(("change", "said"), HOSTILE)
def test_a_forged_graph_is_one_error(directory, change, said):
    path = directory / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    change(model)
    path.write_bytes(model.SerializeToString())
    with pytest.raises(FileError, match=said):
        open_checkpoint(directory)


def test_all_faults_are_listed(directory):
    path = directory / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    outside = [t for t in model.graph.initializer if t.external_data]
    outside[0].external_data[0].value = "elsewhere"
    outside[1].data_type = 16
    outside[1].dims[:] = [3]
    path.write_bytes(model.SerializeToString())
    with pytest.raises(FileError) as caught:
        open_checkpoint(directory)
    assert outside[0].name in str(caught.value) and outside[1].name in str(caught.value)


@pytest.mark.parametrize("cut", [0, 1, 100, 3000])
def test_truncated_files_are_errors(directory, cut):
    path = directory / "model.onnx"
    path.write_bytes(path.read_bytes()[: cut or -1])
    with pytest.raises(FileError):
        open_checkpoint(directory)
    data = directory / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:cut])
    with pytest.raises(FileError):
        open_checkpoint(directory)


# ---- in the pipeline -------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path):
    return save_tiny("LlamaForCausalLM", tmp_path / "source", **TINY)


def test_a_run_that_was_killed_gives_the_same_bytes(tmp_path, source):
    class KilledError(Exception):
        pass

    def kill(name, done, total):
        if "layers.1.mlp" in name:
            raise KilledError

    request = Request(to="int4_g32", file="onnx")
    quantize(source, tmp_path / "whole", request)
    with pytest.raises(KilledError):
        quantize(source, tmp_path / "killed", request, kill)
    with pytest.raises(FewbitsError):
        open_checkpoint(tmp_path / "killed")
    quantize(source, tmp_path / "killed", request)
    for name in ("model.onnx", "model.onnx.data", "config.json", "genai_config.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()


@pytest.mark.parametrize("file", ["gptq", "mlx", "native", "gguf"])
def test_conversion_keeps_every_value(tmp_path, source, file):
    end = ".gguf" if file == "gguf" else ""
    format = "q4_0" if file == "gguf" else "int4_g32"
    quantize(source, tmp_path / f"a{end}", Request(to=format, file=file))
    requantize = file in ("mlx", "gguf")  # they have the tables quantized, too
    convert(tmp_path / f"a{end}", tmp_path / "b", "onnx", requantize=requantize)
    first, second = decoded(tmp_path / f"a{end}"), decoded(tmp_path / "b")
    tables = [name for name in first if "embed_tokens" in name or name.startswith("lm_head")]
    for name in tables if requantize else ():
        first.pop(name), second.pop(name)
    assert same(first, second)
    convert(tmp_path / "b", tmp_path / "c", "native")
    third = decoded(tmp_path / "c")
    assert all(torch.equal(third[name], second[name]) for name in second)


def test_another_file_type_in_its_place(tmp_path, source):
    out = tmp_path / "out"
    quantize(source, out, Request(to="int4_g32"))
    with pytest.raises(FileError, match=r"fewbits\.json: exists"):
        quantize(source, out, Request(to="int4_g32", file="onnx"))
    quantize(source, out, Request(to="int4_g32", file="onnx", overwrite=True))
    assert open_checkpoint(out).file_type.name == "onnx"
    with pytest.raises(FileError, match=r"genai_config\.json: exists"):
        quantize(source, out, Request(to="int4_g32", file="gptq"))
    quantize(source, out, Request(to="int4_g32", file="gptq", overwrite=True))
    assert open_checkpoint(out).file_type.name == "gptq"
    assert not any((out / name).exists() for name in ("model.onnx", "model.onnx.data", "genai_config.json"))
