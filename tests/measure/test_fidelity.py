import copy
import json
import math

import pytest
import torch
from helpers import tiny
from torch.nn import functional as F

from sparseprune.convert import sparsify
from sparseprune.measure.evaluate import perplexity
from sparseprune.measure.fidelity import divergence, fidelity, layer_errors
from sparseprune.models.sites import find_sites
from sparseprune.pruning import prune
from sparseprune.statistics.overlap import remember

IDS = tiny.ids(1, 300)[0]


def decided(build):
    """A model with opinions: at its small initial weights every token is as likely as another."""
    model = build()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(5)
    return model


def pruned(reference, sparsity=0.5):
    model = copy.deepcopy(reference)
    prune(model, "unstructured", "magnitude", sparsity=sparsity)
    return model


def naive(model, reference, window, stride, max_windows=None):
    kls, same, done = [], [], set()
    starts = list(range(0, len(IDS) - window + 1, stride))[:max_windows]
    for start in starts:
        piece = IDS[None, start : start + window]
        with torch.no_grad():
            q = F.log_softmax(model(input_ids=piece).logits[0].double(), -1)
            p = F.log_softmax(reference(input_ids=piece).logits[0].double(), -1)
        for position in range(1, window):
            if start + position not in done:
                done.add(start + position)
                kls.append(float((p[position - 1].exp() * (p[position - 1] - q[position - 1])).sum()))
                same.append(float(p[position - 1].argmax() == q[position - 1].argmax()))
    return sum(kls) / len(kls), sum(same) / len(same)


class TestFidelity:
    @pytest.mark.parametrize("build", [tiny.llama, tiny.gpt2])
    @pytest.mark.parametrize(("stride", "max_windows"), [(32, None), (32, 3), (8, None)])
    def test_equals_the_naive_reference(self, build, stride, max_windows):
        reference = decided(build)
        model = pruned(reference)
        result = fidelity(model, reference, None, text=IDS, window=32, max_windows=max_windows, stride=stride)
        kl, agreement = naive(model, reference, 32, stride, max_windows)
        assert result.kl == pytest.approx(kl, rel=1e-4)
        assert result.kl > 1e-3
        assert result.agreement == pytest.approx(agreement, abs=1e-9)
        assert result.model == perplexity(model, None, IDS, window=32, max_windows=max_windows, stride=stride)
        assert result.reference == perplexity(
            reference, None, IDS, window=32, max_windows=max_windows, stride=stride
        )

    def test_a_model_equals_itself(self):
        result = fidelity(tiny.llama(), tiny.llama(), None, text=IDS, window=32)
        assert (result.kl, result.agreement) == (0, 1)

    def test_divergence_is_of_the_reference_from_the_model(self):
        p, q = torch.tensor([[0.9, 0.1]]), torch.tensor([[0.5, 0.5]])
        expected = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
        assert divergence(p.log(), q.log()) == (pytest.approx(expected, rel=1e-6), 1)

    def test_divergence_where_both_rule_a_class_out(self):
        logits = torch.tensor([[0.0, 1.0, -torch.inf]]).repeat(300, 1)
        assert divergence(logits, logits) == (0, 300)

    def test_more_pruning_is_further_away(self):
        reference = tiny.llama()
        found = [
            fidelity(pruned(reference, sparsity), reference, None, text=IDS, window=32).kl
            for sparsity in (0.2, 0.5, 0.9)
        ]
        assert found == sorted(found)

    def test_protocol_and_warning(self):
        reference = tiny.llama()
        model = pruned(reference).bfloat16()
        remember(model, [IDS[None]])
        result = fidelity(model, reference, None, text=IDS, window=32, text_name="ids")
        assert "ids: 279 tokens scored in 9 windows of 32" in str(result)
        assert "compared with a float32 reference" in str(result)
        assert "WARNING: the model was calibrated on" in str(result)
        data = json.loads(json.dumps(result.to_dict()))
        assert data["kl"] == result.kl
        assert data["model"]["dtype"] == "bfloat16"

    def test_errors(self):
        with pytest.raises(
            ValueError, match="reference: must have the model's vocabulary, 96 tokens, got 50"
        ):
            fidelity(tiny.llama(), tiny.llama(vocab_size=50), None, text=IDS % 50, window=32)
        with pytest.raises(ValueError, match="text: must hold at least one window of 32 tokens, got 9"):
            fidelity(tiny.llama(), tiny.llama(), None, text=IDS[:9], window=32)


class TestLayerErrors:
    @pytest.mark.parametrize("build", [tiny.llama, tiny.gpt2])
    @pytest.mark.parametrize("sparse", [False, True])
    def test_against_inputs_taken_by_hand(self, build, sparse):
        reference = decided(build)
        model = pruned(reference)
        weights = {layer.name: layer.weight.double().clone() for layer in find_sites(model)}
        if sparse:
            sparsify(model, policy="always")
        batches = [IDS[None, :32], IDS[None, 32:64]]
        errors = {row.name: row for row in layer_errors(model, reference, batches).rows}
        for layer in find_sites(reference):
            inputs = []
            handle = layer.module.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))  # noqa: B023
            with torch.no_grad():
                for ids in batches:
                    reference(input_ids=ids)
            handle.remove()
            x = torch.cat([it.reshape(-1, it.shape[-1]) for it in inputs]).double()
            y = x @ layer.weight.double().t() + (0 if layer.bias is None else layer.bias.double())
            expected = (x @ (layer.weight.double() - weights[layer.name]).t()).norm() / y.norm()
            assert errors[layer.name].kind == "layer"
            assert errors[layer.name].error == pytest.approx(float(expected), rel=1e-4)
        assert sum(row.kind == "block" for row in errors.values()) == 2

    def test_one_layer_pruned_shows_there_and_in_its_block_only(self):
        reference = tiny.llama(layers=3)
        model = copy.deepcopy(reference)
        prune(model, "2:4", include="model.layers.1.mlp.up_proj")
        result = layer_errors(model, reference, [IDS[None, :32]])
        wrong = {row.name for row in result.rows if row.error > 0}
        assert wrong == {"model.layers.1", "model.layers.1.mlp.up_proj"}
        text = str(result)
        assert "mlp.up_proj" in text
        assert "32 tokens" in text
        assert json.loads(json.dumps(result.to_dict()))["tokens"] == 32

    def test_dtypes_may_differ(self):
        reference = tiny.llama()
        exact = layer_errors(pruned(reference), reference, [IDS[None, :32]]).rows
        rounded = layer_errors(pruned(reference).bfloat16(), reference, [IDS[None, :32]]).rows
        for a, b in zip(exact, rounded, strict=True):
            assert b.error == pytest.approx(a.error, rel=0.05)

    def test_blocks_that_moved_up_are_not_compared(self):
        reference = tiny.llama(layers=3)
        model = copy.deepcopy(reference)
        del model.model.layers[0]
        with pytest.raises(ValueError, match="reference: must be the dense model .* no layer of this Llama"):
            layer_errors(model, reference, [IDS[None, :32]])

    def test_modes_and_hooks_are_as_before(self):
        reference, model = tiny.llama().train(), tiny.llama()
        layer_errors(model, reference, [IDS[None, :32]])
        assert reference.training
        assert not any(module._forward_hooks for module in reference.modules())
