import json
import os

import pytest
import torch
from helpers.backends import GPUS, running
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from sparseprune.io import checkpoint
from sparseprune.io.checkpoint import CheckpointError, is_checkpoint, load, load_tokenizer, save
from sparseprune.weights.linear import SparseLinear


def prune_24(weight):
    with torch.no_grad():
        weight.view(-1, 4)[:, 2:] = 0


class Net(nn.Module):
    """Dense, sparse and tied parts, a buffer that is saved and one that is not."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.up = nn.Linear(16, 40)
        self.down = nn.Linear(40, 16, bias=False)
        self.again = self.down
        self.norm = nn.BatchNorm1d(16)
        self.head = nn.Linear(16, 20, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.tensor(2.0), persistent=False)

    def forward(self, ids):
        x = self.down(self.up(self.embed(ids)).relu())
        return self.head(self.norm(x + self.again(self.up(x)))) * self.scale


def sparse_net(dtype=torch.float32):
    torch.manual_seed(0)
    net = Net().eval()
    for linear in (net.up, net.down):
        prune_24(linear.weight)
    net.up = SparseLinear.from_dense(net.up, "2:4")
    net.down = net.again = SparseLinear.from_dense(net.down, "bitmap")
    return net.to(dtype)


IDS = torch.arange(12)


@pytest.fixture(params=["cpu", "emulated"])
def everywhere(request):
    """The CPU's kernels, and the GPU's in the emulator. Files are read to the CPU: a real GPU is in the test below."""
    with running(request.param):
        yield


@pytest.mark.parametrize("there", GPUS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_saved_on_one_device_loads_on_the_other(tmp_path, there, dtype):
    def logits(net):
        return net(IDS.to(net.embed.weight.device)).cpu()

    with running("cpu"):
        net = sparse_net(dtype)
        save(net, tmp_path / "cpu")
        expected, weight = logits(net), net.up.weight
    with running(there) as place:
        moved = load(tmp_path / "cpu", model=Net()).to(place.device)
        layouts = [layer.packed_weight.layout for layer in (moved.up, moved.down)]
        assert layouts == ["sparse24" if dtype == torch.bfloat16 else "bitmap8", "bitmap8"]
        torch.testing.assert_close(logits(moved), expected, rtol=0.02, atol=0.02)
        save(moved, tmp_path / "gpu")
        assert torch.equal(moved.up.weight.cpu(), weight)
    files = [tmp_path / name / "model.safetensors" for name in ("cpu", "gpu")]
    assert files[0].read_bytes() == files[1].read_bytes()
    with running("cpu"):
        assert torch.equal(logits(load(tmp_path / "gpu", model=Net())), expected)


def test_round_trip_of_a_plain_model(everywhere, tmp_path):
    net = sparse_net()
    assert save(net, tmp_path / "new" / "out") == tmp_path / "new" / "out"
    assert sorted(os.listdir(tmp_path / "new" / "out")) == ["model.safetensors"]
    again = load(tmp_path / "new" / "out", model=Net())
    assert torch.equal(again(IDS), net(IDS))
    assert isinstance(again.up, SparseLinear)
    assert str(again.up.format) == "2:4"
    assert str(again.down.format) == "bitmap"
    assert again.again is again.down
    assert again.head.weight is again.embed.weight
    assert not again.training


def test_tied_weights_are_stored_once_and_tied_again_in_a_model_that_does_not_tie(everywhere, tmp_path):
    net = sparse_net()
    save(net, tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert "head.weight" not in file.keys()  # noqa: SIM118
        assert not any(key.startswith("again") for key in file.keys())  # noqa: SIM118
    untied = Net()
    untied.head.weight = nn.Parameter(untied.head.weight.detach().clone())
    untied.again = nn.Linear(40, 16, bias=False)
    again = load(tmp_path, model=untied)
    assert again.head.weight is again.embed.weight
    assert again.again is again.down
    assert torch.equal(again(IDS), net(IDS))


def test_a_skeleton_takes_the_files_dtype_and_keeps_requires_grad(everywhere, tmp_path):
    net = sparse_net(torch.bfloat16)
    save(net, tmp_path)
    skeleton = Net()
    skeleton.embed.weight.requires_grad_(False)
    again = load(tmp_path, model=skeleton)
    assert again.up.dtype == again.up.bias.dtype == again.embed.weight.dtype == torch.bfloat16
    assert again.up.bias.requires_grad
    assert not again.embed.weight.requires_grad


def test_meta_skeleton(everywhere, tmp_path):
    net = nn.Sequential(SparseLinear.from_dense(nn.Linear(8, 6), "bitmap"), nn.Linear(6, 2))
    save(net, tmp_path)
    with torch.device("meta"):
        skeleton = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 2))
    again = load(tmp_path, model=skeleton)
    x = torch.randn(3, 8)
    assert torch.equal(again(x), net(x))
    save(sparse_net(), tmp_path)
    with torch.device("meta"):
        skeleton = Net()
    with pytest.raises(
        CheckpointError, match="scale: a buffer that no checkpoint holds is on the meta device"
    ):
        load(tmp_path, model=skeleton)


def test_the_model_itself_may_be_the_sparse_layer(everywhere, tmp_path):
    layer = SparseLinear.from_dense(nn.Linear(8, 6), "csr")
    save(layer, tmp_path)
    x = torch.randn(3, 8)
    assert torch.equal(load(tmp_path, model=nn.Linear(8, 6))(x), layer(x))


def test_the_file_is_plain_safetensors_of_the_canonical_form(everywhere, tmp_path):
    net = sparse_net()
    seen = []
    save(net, tmp_path, progress=lambda done, total: seen.append((done, total)))
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors["up.weight.spec"].tolist() == [1, 1, 2, 4, 40, 16, 0, 0, 0]
    assert tensors["up.weight.mask"].shape == (40, 2)
    assert torch.equal(tensors["up.weight.values"], net.up.sparse_weight().values)
    assert torch.equal(tensors["norm.running_var"], net.norm.running_var)
    assert set(tensors) == set(net.state_dict()) - {"head.weight"} - {
        k for k in net.state_dict() if "again" in k
    }
    assert seen[-1][0] == seen[-1][1] == sum(tensor.nbytes for tensor in tensors.values())


def tiny_llama(tie=True, dtype=torch.float32):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    # Not .to(dtype), which would cast the rotary frequencies as well: a model loaded in bfloat16 has them in float32.
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=tie,
    )  # fmt: skip
    model = LlamaForCausalLM._from_config(config, dtype=dtype).eval()
    for layer in model.model.layers:
        for block, names in ((layer.self_attn, "q k v o"), (layer.mlp, "gate up down")):
            for name in names.split():
                linear = getattr(block, f"{name}_proj")
                prune_24(linear.weight)
                setattr(block, f"{name}_proj", SparseLinear.from_dense(linear, "2:4"))
    return model


@pytest.mark.parametrize("tie", [True, False])
def test_transformers_model_needs_no_skeleton(everywhere, tmp_path, tie):
    model = tiny_llama(tie, torch.bfloat16)
    model.generation_config.max_new_tokens = 7
    save(model, tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "generation_config.json", "model.safetensors"]
    again = load(tmp_path)
    ids = torch.arange(10)[None]
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tie
    assert again.generation_config.max_new_tokens == 7
    assert again.dtype == torch.bfloat16
    assert not any(tensor.is_meta for tensor in again.state_dict().values())
    assert torch.equal(again.generate(ids, max_new_tokens=4, do_sample=False), model.generate(ids, max_new_tokens=4, do_sample=False))  # fmt: skip
    save(again, tmp_path / "twice")
    assert (tmp_path / "twice" / "model.safetensors").read_bytes() == (
        tmp_path / "model.safetensors"
    ).read_bytes()
    assert (tmp_path / "twice" / "config.json").read_bytes() == (tmp_path / "config.json").read_bytes()


def test_conv1d_model(everywhere, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50, n_positions=32)).eval()
    mlp = model.transformer.h[0].mlp
    mlp.c_fc = SparseLinear.from_dense(mlp.c_fc, "bitmap")
    save(model, tmp_path)
    again = load(tmp_path)
    assert isinstance(again.transformer.h[0].mlp.c_fc, SparseLinear)
    ids = torch.arange(10)[None]
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_the_folder_is_not_taken_for_a_dense_model(tmp_path):
    from sparseprune.models.loading import load_dense

    save(tiny_llama(), tmp_path)
    with pytest.raises(ValueError, match="quantized"):
        load_dense(tmp_path)


def test_tokenizer_goes_along(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"a": 0, "b": 1, "[UNK]": 2}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, "[UNK]")), unk_token="[UNK]"
    )
    save(tiny_llama(), tmp_path, tokenizer=tokenizer)
    assert load_tokenizer(tmp_path)("b").input_ids == [1]
    save(tiny_llama(), tmp_path / "without")
    assert load_tokenizer(tmp_path / "without") is None


def edit(path, change=None, metadata=None):
    """Rewrites a checkpoint with the tensors (and header) changed."""
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    tensors = load_file(path)
    if change is not None:
        change(tensors)
    save_file(tensors, path, {**header, **(metadata or {})})


def put(key, index, value):
    def change(tensors):
        tensors[key][index] = value

    return change


BAD = {
    "missing spec": (lambda t: t.pop("up.weight.spec"), "up.weight.mask: not in the model|up.weight: missing"),
    "missing values": (lambda t: t.pop("up.weight.values"), "up.weight.values: missing, though weight.spec is there"),
    "missing dense": (lambda t: t.pop("up.bias"), r"up.bias: missing \(1 missing in all\)"),
    "missing tied": (lambda t: t.pop("embed.weight"), "embed.weight: missing"),
    "unexpected": (lambda t: t.update(extra=torch.ones(1)), r"extra: not in the model \(1 such in all\)"),
    "unexpected sparse": (
        lambda t: t.update({f"nowhere.weight.{p}": t[f"up.weight.{p}"].clone() for p in ("values", "mask", "spec")}),
        "nowhere.weight.spec: the model must have a linear layer or an embedding here, it has no such module",
    ),
    "not a linear": (
        lambda t: t.update({f"norm.weight.{p}": t[f"up.weight.{p}"].clone() for p in ("values", "mask", "spec")}),
        "norm.weight.spec: the model must have a linear layer or an embedding here, it has a BatchNorm1d",
    ),
    "dense shape": (lambda t: t.update({"up.bias": torch.ones(41)}), r"up.bias: shape must be \(40,\), as in the model, got \(41,\)"),
    "values too short": (lambda t: t.update({"up.weight.values": t["up.weight.values"][1:]}), "up.weight: values: shape must be"),
    "mask bit flipped": (put("down.weight.mask", (0, 0), 0), "down.weight: values: shape must be"),
    "mask dtype": (lambda t: t.update({"up.weight.mask": t["up.weight.mask"].short()}), "up.weight: mask: dtype must be torch.uint8"),
    "mask groups": (put("up.weight.mask", (0, 0), 0b01110001), "up.weight: mask: every group of 4 columns must keep 2"),
    "spec rows lie": (put("up.weight.spec", 4, 41), r"up.weight: mask: shape must be \(41, 2\)"),
    "spec cols lie": (put("up.weight.spec", 5, 12), "up.weight: (values: shape must be|mask: bits past column 11)"),
    "spec version": (put("up.weight.spec", 0, 3), "up.weight: spec: version must be one of"),
    "spec dtype": (put("up.weight.spec", 6, 1), "up.weight: values: dtype must be torch.bfloat16, as spec says"),
    "spec shape": (lambda t: t.update({"up.weight.spec": t["up.weight.spec"][:5]}), "up.weight: spec: must be int64 of shape"),
    "other layer's weight": (
        lambda t: t.update({f"up.weight.{p}": t[f"down.weight.{p}"].clone() for p in ("values", "mask", "spec")}),
        r"up.weight.spec: shape must be \(40, 16\), as in the model, got \(16, 40\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_contradictions_are_refused_and_the_model_stays_as_it_was(tmp_path, case):
    change, message = BAD[case]
    save(sparse_net(), tmp_path)
    edit(tmp_path / "model.safetensors", change)
    model = Net().eval()
    before = model(IDS)
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: ({message})"):
        load(tmp_path, model=model)
    assert torch.equal(model(IDS), before)
    assert type(model.up) is nn.Linear


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"format": "pt"}, r"not written by sparseprune \(format 'pt'\); load a dense model"),
        ({"version": "2"}, "version must be 1, got '2'; upgrade"),
        ({"tied": "{"}, "list of tied weights is damaged"),
        ({"tied": '["a"]'}, "list of tied weights is damaged"),
        ({"tied": '{"nowhere": "up"}'}, "nowhere: the model must have a layer here, tied to up"),
    ],
)
def test_foreign_or_damaged_headers_are_refused(tmp_path, metadata, message):
    save(sparse_net(), tmp_path)
    edit(tmp_path / "model.safetensors", metadata=metadata)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path, model=Net())
    assert is_checkpoint(tmp_path) == (metadata.get("format") != "pt")


def test_missing_truncated_and_garbled_files(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere: no such folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="model.safetensors: no such file"):
        load(tmp_path)
    save(sparse_net(), tmp_path)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    for damaged in (
        b"",
        whole[:5],
        whole[:100],
        whole[:-1],
        b"\xff" * 64 + whole[64:],
        b"PK\x03\x04" + whole,
    ):
        path.write_bytes(damaged)
        with pytest.raises(
            CheckpointError, match="must be a whole safetensors file, got: .*; it may be truncated"
        ):
            load(tmp_path, model=Net())
        assert not is_checkpoint(tmp_path)


def test_config_errors(tmp_path):
    save(tiny_llama(), tmp_path)
    path = tmp_path / "config.json"
    good = json.loads(path.read_text())
    cases = [
        ("{", "config.json: transformers cannot read it"),
        ({**good, "model_type": "no_such"}, "config.json: transformers cannot read it"),
        ({**good, "architectures": ["NoSuchModel"]}, "architectures must name one model class"),
        ({**good, "architectures": ["LlamaConfig"]}, "architectures must name one model class"),
        ({**good, "architectures": []}, "architectures must name one model class"),
        ({**good, "hidden_size": 64}, r"shape must be \(.*\), as in the model, got"),
        ({**good, "num_hidden_layers": 3}, "model.layers.2.* missing"),
        (
            {**good, "num_hidden_layers": 1},
            "model.layers.1.*the model must have a linear layer or an embedding here, it has no such",
        ),
        ({**good, "num_attention_heads": 0}, "config.json"),
    ]
    for config, message in cases:
        path.write_text(config if isinstance(config, str) else json.dumps(config))
        with pytest.raises(CheckpointError, match=message):
            load(tmp_path)
    path.unlink()
    with pytest.raises(CheckpointError, match="config.json: no such file; pass model="):
        load(tmp_path)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("where", ["write", "fsync"])
def test_a_failed_save_leaves_the_old_files_and_nothing_else(tmp_path, monkeypatch, error, where):
    model = tiny_llama()
    save(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(*_):
        raise error

    if where == "write":
        monkeypatch.setattr(SparseLinear, "sparse_weight", fail)
    else:
        monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(type(error)):
        save(model.half(), tmp_path) if where == "fsync" else save(model, tmp_path)
    with pytest.raises(type(error)):
        save(model, tmp_path / "new" / "folder")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_full_disk_for_real():
    sources, _ = checkpoint._sources(sparse_net())
    with pytest.raises(OSError, match="No space left"):
        checkpoint.write("/dev/full", sources, {})


def test_save_refuses_what_it_cannot_write(tmp_path):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(NotADirectoryError, match="must be a folder, got the file"):
        save(sparse_net(), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "precious"
    with pytest.raises(ValueError, match="weight is on the meta device and has no data"):
        save(sparse_net().to("meta"), tmp_path / "out")
    with pytest.raises(ValueError, match="dtype torch.complex64, which the file cannot hold"):
        save(nn.Linear(2, 2, dtype=torch.complex64), tmp_path / "out")

    class Odd(nn.Linear):
        def get_extra_state(self):
            return {"anything": 1}

    with pytest.raises(ValueError, match="_extra_state is a dict, only tensors are saved"):
        save(Odd(2, 2), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_files_in_the_folder_are_left_alone(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    save(sparse_net(), tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    assert oct((tmp_path / "model.safetensors").stat().st_mode & 0o777) == oct(0o666 & ~current_umask())


def current_umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask
