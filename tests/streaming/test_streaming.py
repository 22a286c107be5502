"""A checkpoint pruned from file to file: the same weights as in memory, one block at a time, whatever interrupts it."""

import json
import os
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from helpers import tiny
from helpers.checkpoints import save, weights

from sparseprune.io.checkpoint import load
from sparseprune.io.safetensors import CheckpointError
from sparseprune.memory import parse_size
from sparseprune.models.loading import load_dense
from sparseprune.pruning import prune
from sparseprune.streaming import job, prune_folder, source
from sparseprune.streaming.state import State
from sparseprune.weights.linear import SparseLinear

BATCHES = [tiny.ids(batch=1, length=12, seed=seed) for seed in range(4)]


def qwen():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        **tiny.SIZES, num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=1, layer_types=["full_attention"] * 2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config).eval()
    for parameter in model.parameters():  # biases start at zero
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def neox():
    """A model whose head transformers renames when it loads it."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(**tiny.SIZES, max_position_embeddings=64, bos_token_id=1, eos_token_id=1)
    torch.manual_seed(0)
    return GPTNeoXForCausalLM(config).eval()


MODELS = {
    "llama": tiny.llama,
    "tied": lambda: tiny.llama(tied=True),
    "gpt2": tiny.gpt2,
    "qwen": qwen,
    "neox": neox,
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save(tiny.llama(layers=3), tmp_path_factory.mktemp("llama"))


def files(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def wanda(folder, out, **kwargs):
    arguments = {"pattern": "2:4", "method": "wanda", "calibration": BATCHES, **kwargs}
    return prune_folder(folder, out, **arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("method", "pattern", "sparsity"),
    [
        ("magnitude", "2:4", None),
        ("wanda", "unstructured", 0.6),
        ("wanda", "4:8", None),
        ("sparsegpt", "2:4", None),
    ],
)
def test_the_weights_are_those_of_prune_in_memory(tmp_path, name, method, pattern, sparsity, dtype):
    folder = save(MODELS[name](), tmp_path / "dense", dtype)
    data = None if method == "magnitude" else BATCHES
    report = prune_folder(
        folder, tmp_path / "out", pattern, method=method, sparsity=sparsity, calibration=data
    )
    expected, _ = load_dense(folder)
    in_memory = prune(expected, pattern, method, sparsity=sparsity, calibration=data)
    streamed = load(tmp_path / "out")
    found = weights(streamed)
    for layer, weight in weights(expected).items():
        assert torch.equal(found[layer], weight), layer
        assert found[layer].dtype == dtype
    assert sum(isinstance(module, SparseLinear) for module in streamed.modules()) == len(in_memory.layers)
    assert report.pruned.layers == in_memory.layers
    assert report.pruned.inputs == in_memory.inputs
    ids = tiny.ids(batch=2)
    with torch.no_grad():
        logits = expected(ids).logits
    torch.testing.assert_close(streamed(ids).logits, logits, rtol=0.05, atol=0.05 * float(logits.abs().max()))
    norms = {key: value for key, value in expected.state_dict().items() if "norm" in key or "ln_" in key}
    assert norms
    assert all(torch.equal(streamed.state_dict()[key], value) for key, value in norms.items())


def test_experts_that_transformers_merges_are_refused(tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM

    own = {"num_hidden_layers": 1, "num_key_value_heads": 2, "num_local_experts": 4}
    config = MixtralConfig(**(tiny.SIZES | own))
    folder = save(MixtralForCausalLM(config), tmp_path / "dense")
    with pytest.raises(CheckpointError, match=r"experts.*is merged or reordered by transformers .*in memory"):
        wanda(folder, tmp_path / "out")


def test_sequential_and_dense_inputs_differ_and_both_are_those_of_prune(tmp_path, llama):
    found = {}
    for sequential in (True, False):
        out = tmp_path / str(sequential)
        wanda(llama, out, sequential=sequential)
        expected, _ = load_dense(llama)
        prune(expected, "2:4", "wanda", calibration=BATCHES, sequential=sequential)
        found[sequential] = weights(load(out))
        assert all(torch.equal(found[sequential][name], it) for name, it in weights(expected).items())
    assert any(not torch.equal(found[True][name], it) for name, it in found[False].items())


def test_only_a_block_and_looked_up_rows_of_the_embedding_are_read(tmp_path, llama, monkeypatch):
    reads, alive = [], []
    read, loaded = source.Source.read, source.StreamedModel.loaded

    def recorded(self, key):
        reads.append(key)
        blocks = {name for name, it in self.model.named_parameters() if ".layers." in name and not it.is_meta}
        alive.append({name.split(".")[2] for name in blocks})
        return read(self, key)

    def remembered(self, *arguments):
        self.source.model = self.model
        return loaded(self, *arguments)

    monkeypatch.setattr(source.Source, "read", recorded)
    monkeypatch.setattr(source.StreamedModel, "loaded", remembered)
    wanda(llama, tmp_path / "out")
    assert "model.embed_tokens.weight" not in reads
    assert "lm_head.weight" not in reads
    assert "model.layers.2.mlp.down_proj.weight" in reads
    assert max(map(len, alive)) == 1


class KilledError(BaseException):
    """Nothing catches this, as nothing catches a kill."""


def kill_at(monkeypatch, target, name, call, before):
    """The `call`-th call of `target.name` raises, before it does its work or after."""
    original, calls = getattr(target, name), [0]

    def wrapped(*arguments, **kwargs):
        calls[0] += 1
        if before and calls[0] == call:
            raise KilledError
        result = original(*arguments, **kwargs)
        if calls[0] == call:
            raise KilledError
        return result

    monkeypatch.setattr(target, name, wrapped)


KILLS = {
    "before the first block": (job.Job, "_enter", 1, True),
    "within a block": (job, "prune_layer", 9, True),
    "before a shard is written": (job, "write_block", 2, True),
    "after a shard is written": (job, "write_block", 2, False),
    "between hidden states": (job, "run_block", 14, False),
    "before the state is written": (State, "write", 3, True),
    "after the state is written": (State, "write", 3, False),
    "before the index": (job, "write_index", 1, True),
    "after the index": (job, "write_index", 1, False),
}


@pytest.mark.parametrize("memory", [None, "spilled"])
@pytest.mark.parametrize("when", KILLS)
def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path, llama, monkeypatch, when, memory):
    arguments = {"method": "sparsegpt", "spill": tmp_path / "spill"}
    if memory == "spilled":
        monkeypatch.setattr(job, "check_memory", lambda needs, limit: 0)
    wanda(llama, tmp_path / "whole", **arguments)
    assert not list((tmp_path / "spill").iterdir())
    with monkeypatch.context() as patch:
        kill_at(patch, *KILLS[when])
        with pytest.raises(KilledError):
            wanda(llama, tmp_path / "out", **arguments)
    if when != "after the index":
        with pytest.raises(CheckpointError, match="no such file; .* or finish the stream that wrote it"):
            load(tmp_path / "out")
    report = wanda(llama, tmp_path / "out", **arguments)
    assert report.resumed_at == json.loads(json.dumps(report.to_dict()))["resumed_at"] is not None
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert not list((tmp_path / "spill").iterdir())
    assert len(report.pruned.layers) == 21


def test_hidden_states_past_the_limit_are_on_the_disk_and_change_nothing(tmp_path, llama, monkeypatch):
    whole = wanda(llama, tmp_path / "whole", memory=parse_size("100GB"))
    assert whole.spilled == 0
    assert whole.activations == len(BATCHES) * 12 * 32 * 4
    monkeypatch.setattr(job, "check_memory", lambda needs, limit: 2 * 12 * 32 * 4)
    half = wanda(llama, tmp_path / "half")
    assert half.spilled == whole.activations // 2
    assert files(tmp_path / "half") == files(tmp_path / "whole")
    assert "1.5 KiB" not in str(whole)
    assert "3.0 KiB of them on the disk only" in str(half)
    assert "peak memory" in str(half)


def test_windows_are_cut_to_the_models_positions_and_the_report_says_so(tmp_path, llama):
    long = [tiny.ids(batch=1, length=80, seed=5), tiny.ids(batch=1, length=12)]
    report = wanda(llama, tmp_path / "long", calibration=long)
    assert "1 of 2 windows were cut to the model's 64 positions, the longest had 80 tokens" in str(report)
    wanda(llama, tmp_path / "short", calibration=[long[0][:, :64], long[1]])
    assert files(tmp_path / "long") == files(tmp_path / "short")
    masked = [{"input_ids": long[0], "attention_mask": torch.ones_like(long[0])}]
    assert "cut to 64 tokens" in wanda(llama, tmp_path / "masked", calibration=masked).pruned.calibration


def test_formats_are_those_that_the_weights_allow(tmp_path, llama):
    def formats(name, folder=llama, **kwargs):
        return prune_folder(folder, tmp_path / name, method="magnitude", **kwargs).formats

    assert formats("nm", pattern="2:4") == {"2:4": {"pruned to 2:4": 21}}
    (bitmap,) = formats("bitmap", pattern="unstructured", sparsity=0.6).items()
    assert bitmap[0] == "bitmap" and sum(bitmap[1].values()) == 21
    assert all(it.startswith("pruned unstructured") for it in bitmap[1])
    wide = save(tiny.llama(hidden_size=256, intermediate_size=256, layers=1), tmp_path / "wide")
    (csr,) = formats("csr", wide, pattern="unstructured", sparsity=0.97).items()
    assert csr[0] == "csr" and all(it.startswith("pruned unstructured; smallest (bitmap ") for it in csr[1])
    few = "too few zeros (1.0%): no sparse format would be smaller"
    assert formats("none", pattern="unstructured", sparsity=0.01, scope="layer", include="*q_proj") == {
        "dense": {few: 3}
    }
    assert formats("asked", pattern="2:4", format="bitmap") == {"bitmap": {"asked for": 21}}
    assert len(weights(load(tmp_path / "none"))) == 21
    assert formats("some", pattern="2:4", exclude="*mlp*") == {"2:4": {"pruned to 2:4": 12}}


def test_settings_of_an_unfinished_run_must_be_the_same(tmp_path, llama, monkeypatch):
    with monkeypatch.context() as patch:
        kill_at(patch, job, "write_block", 1, True)
        with pytest.raises(KilledError):
            wanda(llama, tmp_path / "out", pattern="4:8")  # nothing is done yet: no settings to keep to
    with monkeypatch.context() as patch:
        kill_at(patch, job, "write_block", 2, True)
        with pytest.raises(KilledError):
            wanda(llama, tmp_path / "out")
    before = files(tmp_path / "out" / ".activations")
    for other, named in (
        ({"pattern": "4:8"}, "pattern was '2:4' and is '4:8'"),
        ({"method": "sparsegpt"}, "method was 'wanda' and is 'sparsegpt'"),
        ({"calibration": BATCHES[:3]}, "calibration was '[0-9a-f]{64}' and is '[0-9a-f]{64}'"),
        ({"exclude": "*mlp*"}, r"exclude was None and is '\*mlp\*'"),
        ({"dtype": torch.bfloat16}, "dtype was 'torch.float32' and is 'torch.bfloat16'"),
    ):
        with pytest.raises(
            ValueError, match=f"out: .* unfinished run with other settings: .*{named}.*; go on with"
        ):
            wanda(llama, tmp_path / "out", **other)
    changed = save(tiny.llama(layers=3), tmp_path / "changed")
    other = tiny.llama(layers=3)
    other.model.layers[2].mlp.up_proj.weight.data[0, 0] += 1
    save(other, changed)
    with pytest.raises(ValueError, match="other settings: model was"):
        wanda(changed, tmp_path / "out")
    assert files(tmp_path / "out" / ".activations") == before
    with pytest.raises(CheckpointError, match="no such file; .* or finish the stream that wrote it"):
        load(tmp_path / "out")
    (tmp_path / "out" / ".activations" / "hidden-00001.0").write_bytes(b"short")
    with pytest.raises(
        ValueError, match="hidden-00001.0: the activations to go on with must have 6,144 bytes"
    ):
        wanda(llama, tmp_path / "out")
    (tmp_path / "out" / "stream.json").write_text("{")
    with pytest.raises(ValueError, match="stream.json cannot be read .*; delete"):
        wanda(llama, tmp_path / "out")


def test_two_streams_do_not_write_to_one_folder(tmp_path, llama, monkeypatch):
    def second(*arguments):
        with monkeypatch.context() as patch:
            patch.setattr(job, "write_block", original)
            with pytest.raises(ValueError, match="out: another process is writing to .*out; wait for it"):
                wanda(llama, tmp_path / "out")
        return original(*arguments)

    original = job.write_block
    wanda(llama, tmp_path / "alone")
    monkeypatch.setattr(job, "write_block", second)
    wanda(llama, tmp_path / "out")
    assert files(tmp_path / "out") == files(tmp_path / "alone")


def test_a_finished_or_foreign_out_is_left_alone(tmp_path, llama):
    wanda(llama, tmp_path / "out")
    before = files(tmp_path / "out")
    for out in (tmp_path / "out", llama):
        with pytest.raises(ValueError, match="out: .* holds a model .*; name another folder, or delete it"):
            wanda(llama, out)
    assert files(tmp_path / "out") == before
    with pytest.raises(ValueError, match="folder: must be dense, .* is sparse already"):
        wanda(tmp_path / "out", tmp_path / "twice")
    (tmp_path / "file").write_text("precious")
    with pytest.raises(NotADirectoryError, match="out: must be a folder"):
        wanda(llama, tmp_path / "file")


def first_shard(folder):
    return sorted(folder.glob("model-*.safetensors"))[0]


def drop_tensor(folder):
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.nowhere.weight"] = first_shard(folder).name
    index.write_text(json.dumps(content))


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def put_nan(folder):
    model = tiny.llama(layers=3)
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    save(model, folder)


DAMAGE = {
    "missing shard": (lambda it: first_shard(it).unlink(), CheckpointError, "model-00001-.*: no such shard"),
    "truncated shard": (
        lambda it: os.truncate(first_shard(it), first_shard(it).stat().st_size - 1),
        CheckpointError,
        "model-00001-.*: must be a whole safetensors file, got .* it may be truncated",
    ),
    "empty shard": (lambda it: os.truncate(first_shard(it), 0), CheckpointError, "must be a whole safetensors file"),
    "no tensor": (drop_tensor, CheckpointError, "lacks model.nowhere.weight, which the index says is there"),
    "no weights": (lambda it: (it / "model.safetensors.index.json").unlink(), CheckpointError, "must hold model.safeten"),
    "other width": (lambda it: edit_config(it, hidden_size=64), CheckpointError, "shape must be .*as in the model"),
    "more blocks": (lambda it: edit_config(it, num_hidden_layers=4), CheckpointError, "lacks 9 of the model's tensors"),
    "quantized": (
        lambda it: edit_config(it, quantization_config={"quant_method": "gptq"}), ValueError, "holds quantized weights"
    ),
    "nan": (put_nan, ValueError, "model.layers.1.mlp.up_proj: weights must be finite"),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_checkpoint_is_refused_by_name(tmp_path, what):
    damage, error, message = DAMAGE[what]
    folder = save(tiny.llama(layers=3), tmp_path / "dense")
    damage(folder)
    with pytest.raises(error, match=message):
        wanda(folder, tmp_path / "out")
    assert what == "nan" or not (tmp_path / "out").exists()  # a NaN is found when its block is read


def test_what_cannot_work_is_said_before_it_starts(tmp_path, llama, monkeypatch):
    out = tmp_path / "out"
    with pytest.raises(
        ValueError, match="memory: must be at least .* MiB for this model, got 200 MiB: the largest block"
    ):
        wanda(llama, out, memory=200 * 2**20)
    with monkeypatch.context() as patch:
        patch.setattr("sparseprune.streaming.plan.room_under_ulimit", lambda: 1 << 10)
        with pytest.raises(
            ValueError, match="memory: .* are needed at once .*, ulimit leaves 1.0 KiB; raise ulimit -v"
        ):
            wanda(llama, out)
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: usage(0, 0, 1000))
        with pytest.raises(
            OSError, match="no space: .* has 1.0 KiB free, the shards and the activations need about"
        ):
            wanda(llama, out)
    with pytest.raises(ValueError, match="model.layers.0.self_attn.q_proj: columns must be a multiple of 5"):
        wanda(llama, out, pattern="2:5")
    with pytest.raises(ValueError, match="calibration: method wanda needs some, got none"):
        wanda(llama, out, calibration=None)
    with pytest.raises(ValueError, match="sequential: method magnitude looks at weights only"):
        wanda(llama, out, method="magnitude", calibration=None, sequential=True)
    with pytest.raises(ValueError, match="folder: has no linear layer to prune in its blocks"):
        wanda(llama, out, exclude="*")
    with pytest.raises(ValueError, match="include: 'nothing' matches no linear layer"):
        wanda(llama, out, include="nothing")
    assert not out.exists()


SPOIL = {
    "a shard is gone": (lambda it: first_shard(it).unlink(), "model-00001-of-00004.safetensors: no such file, though"),
    "a shard is cut": (
        lambda it: os.truncate(first_shard(it), 99), "model-00001-of-00004.safetensors: must be a whole safetensors file"
    ),
    "a shard of another model": (
        lambda it: (it / "model-00002-of-00004.safetensors").write_bytes(first_shard(it).read_bytes()),
        "model.layers.*shards of two checkpoints are mixed|must be in model-00001",
    ),
    "no JSON": (lambda it: (it / "model.safetensors.index.json").write_text("{"), "must be an index of safetensors shards"),
    "out of the folder": (
        lambda it: (it / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x.safetensors"}}'),
        "a shard must be a .safetensors file beside it, got '../x.safetensors'",
    ),
    "empty": (lambda it: (it / "model.safetensors.index.json").write_text('{"weight_map": {}}'), "names no tensor"),
}  # fmt: skip


@pytest.mark.parametrize("what", SPOIL)
def test_loading_shards_checks_them(tmp_path, llama, what):
    spoil, message = SPOIL[what]
    wanda(llama, tmp_path / "out")
    spoil(tmp_path / "out")
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "out")


def test_loading_refuses_the_dense_shards_of_another_program(llama):
    with pytest.raises(CheckpointError, match="not written by sparseprune"):
        load(llama)


def test_auto_is_admm(tmp_path, llama):
    report = wanda(llama, tmp_path / "auto", method="auto")
    assert "auto: admm" in str(report)
    wanda(llama, tmp_path / "admm", method="admm")
    assert files(tmp_path / "auto") == files(tmp_path / "admm")
