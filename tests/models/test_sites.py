"""Every kind of site: its view, writing, hooks, sizes, replacing. On real transformers classes, with random weights."""

from contextlib import ExitStack, contextmanager
from dataclasses import replace

import pytest
import torch
from helpers import tiny
from torch import nn

import sparseprune as sp
from sparseprune.models import sites as sites_module
from sparseprune.models.sites import (
    Conv1DSite,
    EmbeddingSite,
    ExpertSite,
    LinearSite,
    WeightSite,
    find_sites,
    linear_shape,
    site_of,
)
from sparseprune.pruning.methods import find_method


def mixtral():
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    return MixtralForCausalLM(config).eval()


def conv1d(out=6, inner=4):
    from transformers.pytorch_utils import Conv1D

    return Conv1D(out, inner)


@pytest.mark.parametrize("module", [nn.Linear(4, 6), conv1d()], ids=["Linear", "Conv1D"])
def test_a_linear_reads_as_out_in_whatever_it_stores(module):
    site = site_of(module)
    x = torch.randn(3, 4)
    assert (site.out_features, site.in_features) == tuple(site.weight.shape) == linear_shape(module) == (6, 4)
    torch.testing.assert_close(module(x), x @ site.weight.T + site.bias)
    site.weight[2] = 0.0  # a view: the model changes
    assert torch.equal(module(x)[:, 2], site.bias[2].expand(3))
    mask = site.weight != 0
    assert torch.equal(site.stored(mask), site.parameter != 0)


@pytest.mark.parametrize("module", [nn.Linear(4, 6), conv1d()], ids=["Linear", "Conv1D"])
def test_another_size_is_a_new_parameter_and_what_the_module_states_follows(module):
    before = module.weight
    site = site_of(module)
    kept = site.weight[:5, 1:].clone()
    site.set(site.weight[:5, 1:], site.bias[:5])
    assert module.weight is not before and module.weight.is_contiguous()
    assert torch.equal(site_of(module).weight, kept) and linear_shape(module) == (5, 3)
    assert module(torch.randn(2, 3)).shape == (2, 5)
    names = ("nf", "nx") if isinstance(site, Conv1DSite) else ("out_features", "in_features")
    assert tuple(getattr(module, name) for name in names) == (5, 3)


def test_hooks_see_every_place_once_and_are_removed():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    (site,) = find_sites(model)
    assert [name for name, _ in site.tied] == ["1"] and site.places == (model[0], model[1])
    seen = []
    x = torch.randn(2, 4)
    with site.on_inputs(seen.append):
        model(x)
    model(x)
    assert len(seen) == 2 and torch.equal(seen[0], x) and torch.equal(seen[1], model[0](x))
    with site.changing_inputs(torch.zeros_like):
        assert torch.equal(model(x), model[1].bias.expand(2, 4))
    with site.on_outputs(lambda inputs, output: output * 0):
        assert not model(x).any()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_replace_reaches_every_place_of_one_module_and_refuses_a_shared_weight():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    (site,) = find_sites(model)
    new = nn.Identity()
    site.replace(model, new)
    assert model[0] is model[2] is new
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    with pytest.raises(ValueError, match="0: no other module can take its place: weight shared with 1"):
        find_sites(tied)[0].replace(tied, new)


def test_embeddings_are_found_where_asked_for_and_have_no_inputs():
    model = tiny.llama()
    assert not any(isinstance(site, EmbeddingSite) for site in find_sites(model))
    (site,) = find_sites(model, kinds=[EmbeddingSite])
    embedding = model.get_input_embeddings()
    assert site.weight.shape == (embedding.num_embeddings, embedding.embedding_dim)
    site.weight[3] = 0.0
    assert not embedding(torch.tensor([3])).any()
    both = find_sites(model, kinds=[LinearSite, EmbeddingSite])
    assert [it.name for it in both] == [site.name, *(it.name for it in find_sites(model))]  # and not the head
    with (
        pytest.raises(ValueError, match=f"{site.name}: an embedding has no inputs"),
        site.on_inputs(lambda x: None),
    ):
        pass


class TestExperts:
    def test_a_slice_of_a_3d_parameter_is_a_site(self):
        model = mixtral()
        sites = find_sites(model, kinds=[ExpertSite])
        experts = model.model.layers[0].mlp.experts
        assert [site.name.rpartition(".")[2] for site in sites[:2]] == ["gate_up_proj[0]", "gate_up_proj[1]"]
        assert {tuple(site.weight.shape) for site in sites} == {(96, 32), (32, 48)} and len(sites) == 8
        sites[1].weight[5] = 0.0
        assert not experts.gate_up_proj[1, 5].any() and experts.gate_up_proj[0, 5].any()
        both = find_sites(model, kinds=[LinearSite, ExpertSite], include="*.mlp.*")
        assert sum(isinstance(site, ExpertSite) for site in both) == 8

    def test_inputs_are_the_rows_routed_there(self):
        model = mixtral()
        experts = model.model.layers[0].mlp.experts
        sites = find_sites(model, kinds=[ExpertSite])
        rows, routed = [], []
        experts.register_forward_pre_hook(lambda module, args: routed.append(args))
        with sites[2].on_inputs(rows.append):
            model(torch.arange(12).view(1, 12))
        hidden, index, _ = routed[0]
        expected = hidden.reshape(-1, 32)[(index == 2).any(-1)]
        assert 0 < len(expected) < 12 and torch.equal(rows[0], expected)

    def test_what_it_cannot_do_is_said(self):
        model = mixtral()
        gate, down = (find_sites(model, kinds=[ExpertSite])[index] for index in (0, 4))
        with pytest.raises(ValueError, match=r"gate_up_proj\[0\]: .*: a slice of a parameter"):
            gate.replace(model, nn.Identity())
        with pytest.raises(ValueError, match=r"gate_up_proj\[0\]: one expert cannot change its size"):
            gate.set(gate.weight[:4])
        with (
            pytest.raises(ValueError, match=r"down_proj\[0\]: what it multiplies never leaves the module"),
            down.on_inputs(lambda x: None),
        ):
            pass


def test_only_a_linear_has_a_site_of_its_own():
    with pytest.raises(TypeError, match="must be an nn.Linear or a transformers Conv1D, got ReLU"):
        site_of(nn.ReLU())
    assert linear_shape(nn.ReLU()) is None and linear_shape(None) is None


class PointwiseSite(WeightSite):
    """`nn.Conv1d` with a kernel of 1: a linear of channels [batch, in, tokens], its weight [out, in, 1]."""

    @classmethod
    def holds(cls, module):
        return type(module) is nn.Conv1d and module.kernel_size == (1,) and module.groups == 1

    def matrix(self, stored):
        return stored[:, :, 0]

    def stored(self, matrix):
        return matrix.unsqueeze(2)

    @property
    def stays(self):
        return "a convolution"

    @contextmanager
    def on_inputs(self, see):
        with ExitStack() as stack:
            for module in self.places:
                hook = module.register_forward_pre_hook(lambda module, args: see(args[0].transpose(1, 2)))
                stack.callback(hook.remove)
            yield


class Pointwise(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.mix, self.head = nn.Embedding(64, 32), nn.Conv1d(32, 48, 1), nn.Linear(48, 64)

    def forward(self, ids):
        return self.head(torch.relu(self.mix(self.embed(ids).transpose(1, 2))).transpose(1, 2))


class TestAKindOfOnesOwn:
    """Nothing but the class knows how the weight is stored, and what passes it."""

    @pytest.fixture(autouse=True)
    def known(self, monkeypatch):
        monkeypatch.setattr(sites_module, "KINDS", (*sites_module.KINDS, PointwiseSite))

    @pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "taylor", "admm"])
    def test_methods(self, method):
        model, data = Pointwise(), [torch.randint(64, (2, 9)) for _ in range(3)]
        method = find_method(method)
        if method.name == "taylor":
            method = replace(method, loss=lambda output, batch: output.square().mean())
        report = sp.prune(model, "2:4", method, calibration=None if method.name == "magnitude" else data)
        assert [layer.shape for layer in report.layers] == [(48, 32), (64, 48)]
        assert (model.mix.weight.reshape(48, 8, 4).count_nonzero(dim=2) == 2).all()
        if method.name == "wanda":
            norms = torch.cat([Pointwise().embed(it).flatten(0, 1) for it in data]).norm(dim=0)
            scores = (Pointwise().mix.weight[:, :, 0].abs() * norms).reshape(48, 8, 4)
            kept = model.mix.weight.reshape(48, 8, 4) != 0
            assert (scores.masked_fill(~kept, torch.inf).amin(2) >= scores.masked_fill(kept, 0).amax(2)).all()

    @pytest.mark.parametrize("lora", [None, 2])
    def test_recovery_and_conversion(self, lora):
        model = Pointwise()
        sp.prune(model, "2:4")
        before, zeros = model.mix.weight.detach().clone(), model.mix.weight == 0
        batches = [{"ids": torch.randint(64, (2, 9))} for _ in range(3)]
        loss = sp.recovery.Distillation(loss=lambda output, batch: output.square().mean())
        training = sp.recovery.Training(lora=lora, autocast=None)
        sp.recover(model, batches, steps=3, distillation=loss, training=training)
        assert torch.equal(model.mix.weight == 0, zeros) and not torch.equal(model.mix.weight, before)
        mix, head = sp.sparsify(model, policy="always").layers
        assert (mix.format, mix.reason, head.format) == (None, "a convolution", "2:4")
        assert sp.sparsify(Pointwise(), batch=1, seconds=0.1).layers[0].reason == "a convolution"
