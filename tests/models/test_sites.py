"""Every kind of site: its view, writing, hooks, sizes, replacing. On real transformers classes, with random weights."""

import pytest
import torch
from helpers import tiny
from torch import nn

from sparseprune.models.sites import (
    Conv1DSite,
    EmbeddingSite,
    ExpertSite,
    LinearSite,
    find_sites,
    linear_shape,
    site_of,
)


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
    with pytest.raises(ValueError, match="0: its weight is shared with 1; replace neither"):
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
        with pytest.raises(ValueError, match=r"gate_up_proj\[0\]: a slice of a parameter"):
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
