import copy

import pytest
import torch
from helpers import tiny
from helpers.structured import FAMILIES, TRANSFORMERS, gpt_neox, logits, phi3
from torch import nn

import sparseprune as sp
from sparseprune.calibration import CalibrationData
from sparseprune.io.sizes import apply_sizes
from sparseprune.models.blocks import find_blocks
from sparseprune.surgery import cut, remove_heads, remove_layers, remove_neurons
from sparseprune.surgery.probe import find_heads, find_neurons, sample_batch


@pytest.fixture(scope="module")
def data():
    return CalibrationData([tiny.ids(2, 24, seed) for seed in range(4)])


class TestHeads:
    @pytest.mark.parametrize("make", [*(FAMILIES[name] for name in TRANSFORMERS), phi3, gpt_neox])
    @pytest.mark.parametrize("criterion", ["activation", "l1", "obs", "taylor"])
    def test_heads_that_add_nothing_go_and_outputs_stay(self, make, criterion, data):
        model = make()
        if criterion == "taylor" and make in (FAMILIES["bert"], FAMILIES["bert mlm"]):
            with pytest.raises(ValueError, match="loss: Bert.* gives none"):
                remove_heads(model, 0.5, criterion, calibration=data)
            return
        dead = {}
        for index, group in enumerate(find_heads(model, sample_batch(model, None), 4)):
            heads = group.groups[index] if len(group.groups) == 2 else (index, 3)
            group.consumer.weight[:, group.channels(heads)] = 0
            if criterion == "l1":
                for number, producer in enumerate(group.producers):
                    producer.weight[group.rows(number, heads)] *= 1e-3
            dead[group.consumer.name] = tuple(heads)
        expected = logits(model)
        report = remove_heads(
            model, 0.5, criterion, calibration=None if criterion == "l1" else data, compensate=False
        )
        assert {cut.name: cut.removed for cut in report.cuts} == dead
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("make", [tiny.llama, phi3])
    def test_query_heads_of_every_group(self, make, data):
        model = make()
        for group in find_heads(model, sample_batch(model, None), 4):
            group.consumer.weight[:, group.channels((1, 2))] = 0
        expected = logits(model)
        report = remove_heads(model, 0.5, calibration=data, unit="query", compensate=False)
        assert {cut.removed for cut in report.cuts} == {(1, 2)}
        assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (2, 2)
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)

    def test_groups_go_with_their_key_and_value(self, data):
        model = tiny.llama()
        remove_heads(model, 0.5, calibration=data)
        attention = model.model.layers[1].self_attn
        assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (2, 1)
        assert attention.q_proj.weight.shape == (16, 32) and attention.k_proj.weight.shape == (8, 32)
        assert attention.num_key_value_groups == 2 and model.config.head_dim == 8

    def test_only_numbers_that_the_config_can_say(self):
        # 48 wide, 6 heads: 5 and 7 do not divide it, transformers would refuse the config
        model = tiny.llama(hidden_size=48, num_attention_heads=6, num_key_value_heads=6)
        report = remove_heads(model, 0.2, "l1")
        assert model.config.num_attention_heads == 4 and report.removed_fraction == pytest.approx(1 / 3)

    def test_compensation_lowers_the_error(self, data):
        for family in ("llama", "gpt2", "bert"):
            model = FAMILIES[family]()
            ids = data.batches[0]
            for group in find_heads(model, tiny.ids(), 4):  # random attention is small beside the residual
                group.consumer.weight.mul_(20)
            expected, errors = logits(model, ids), {}
            for compensate in (False, True):
                cut = copy.deepcopy(model)
                remove_heads(cut, 0.5, calibration=data, compensate=compensate)
                errors[compensate] = (logits(cut, ids) - expected).norm()
            assert errors[True] < errors[False], family

    def test_a_second_time(self, data, tmp_path):
        model = tiny.gpt2()
        remove_heads(model, 0.25, "l1")
        remove_heads(model, 0.3, "l1")
        remove_neurons(model, 0.25, calibration=data)
        remove_layers(model, 1, "l1")
        assert model.transformer.h[0].attn.c_attn.weight.shape == (32, 3 * 16)
        assert model.transformer.h[0].attn.split_size == 16
        sp.save(model, tmp_path)
        assert torch.equal(logits(sp.load(tmp_path)), logits(model))


class TestLayers:
    @pytest.mark.parametrize("criterion", ["influence", "activation", "taylor"])
    @pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
    def test_a_layer_that_does_nothing_goes_first(self, family, criterion, data):
        model = tiny.llama(layers=4) if family == "llama" else FAMILIES[family]()
        blocks = find_blocks(model)
        idle = len(blocks) - 2
        if family != "bert":
            for name, module in blocks[idle][1].named_modules():
                if name.split(".")[-1] in ("o_proj", "down_proj", "c_proj"):
                    nn.init.zeros_(module.weight)
        expected = logits(model)
        if family == "bert":  # normalised after each block, so that none does nothing
            if criterion == "taylor":
                with pytest.raises(ValueError, match="loss: BertModel gives none"):
                    remove_layers(model, 1, criterion, calibration=data)
                return
            remove_layers(model, 1, criterion, calibration=data)
        else:
            report = remove_layers(model, 1, criterion, calibration=data)
            assert report.cuts[0].removed == (idle,)
            torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
        assert len(find_blocks(model)) == len(blocks) - 1 == model.config.num_hidden_layers

    @torch.no_grad()
    def test_influence_is_one_minus_the_cosine(self, data):
        model = tiny.llama(layers=5)
        states = [model(batch, output_hidden_states=True).hidden_states for batch in data]
        # the last hidden state is behind the final norm: the last layer's output is taken before it
        last = []
        handle = model.model.norm.register_forward_pre_hook(lambda module, args: last.append(args[0]))
        for batch in data:
            model(batch)
        handle.remove()
        exact = []
        for index in range(5):
            cosines = [
                nn.functional.cosine_similarity(it[index], it[index + 1] if index < 4 else end, dim=-1)
                for it, end in zip(states, last, strict=True)
            ]
            exact.append(1 - float(torch.cat(cosines).mean()))
        report = remove_layers(model, 2, "influence", calibration=data)
        assert report.cuts[0].removed == tuple(sorted(sorted(range(5), key=lambda index: exact[index])[:2]))

    @torch.no_grad()
    def test_loss_takes_the_least_harmful_at_each_step(self, data):
        model = tiny.llama(layers=4)
        for block in model.model.layers:  # large enough that layers matter
            block.mlp.down_proj.weight.data.mul_(20)
        chosen = []
        for _ in range(2):
            losses = {}
            for index in set(range(4)) - set(chosen):
                cut = copy.deepcopy(model)
                kept = [it for number, it in enumerate(cut.model.layers) if number not in (*chosen, index)]
                cut.model.layers = nn.ModuleList(kept)
                cut.config.num_hidden_layers = len(kept)
                losses[index] = sum(float(cut(batch, labels=batch, use_cache=False).loss) for batch in data)
            chosen.append(min(losses, key=losses.get))
        report = remove_layers(model, 2, "loss", calibration=data)
        assert report.cuts[0].removed == tuple(sorted(chosen))

    @pytest.mark.parametrize("family", ["llama", "gpt2"])
    def test_the_block_before_makes_up_for_them(self, family, data):
        model = tiny.llama(layers=4) if family == "llama" else tiny.gpt2()
        for group in find_neurons(model, tiny.ids()):
            group.consumer.weight.mul_(5)
        ids, expected = data.batches[0], logits(model, data.batches[0])
        last = find_blocks(model)[-1][0]
        include = ["model.layers.1", "model.layers.2"] if family == "llama" else last
        errors, counted = {}, {}
        for compensate in (False, True):
            cut = copy.deepcopy(model)
            report = remove_layers(
                cut,
                2 if family == "llama" else 1,
                "influence",
                calibration=data,
                include=include,
                compensate=compensate,
            )
            errors[compensate] = (logits(cut, ids) - expected).norm()
            counted[compensate] = report.parameters_after
            assert report.compensated is compensate
        assert errors[True] < 0.9 * errors[False]
        assert counted[True] == counted[False]

    @torch.no_grad()
    def test_making_up_is_least_squares(self, data):
        model = tiny.llama(layers=4)
        down = model.model.layers[0].mlp.down_proj
        inputs, before, after = [], [], []
        handles = [
            down.register_forward_pre_hook(lambda module, args: inputs.append(args[0])),
            model.model.layers[1].register_forward_pre_hook(lambda module, args: before.append(args[0])),
            model.model.layers[2].register_forward_hook(lambda module, args, output: after.append(output)),
        ]
        for batch in data:
            model(batch)
        for handle in handles:
            handle.remove()
        a, d = (
            torch.cat([it.reshape(-1, it.shape[-1]) for it in part]).double()
            for part in (inputs, [end - start for start, end in zip(before, after, strict=True)])
        )
        damping = min(2 * 48 / len(a), 1) * float((a.t() @ a).diagonal().mean())
        exact = down.weight.double() + torch.linalg.solve(a.t() @ a + damping * torch.eye(48), a.t() @ d).t()
        remove_layers(model, 2, calibration=data, include=["model.layers.1", "model.layers.2"])
        found = model.model.layers[0].mlp.down_proj.weight
        torch.testing.assert_close(found.double(), exact, rtol=1e-3, atol=1e-5)

    def test_nothing_makes_up_where_a_norm_is_behind_or_nothing_before(self, data):
        assert not remove_layers(tiny.bert(), 1, calibration=data, include="encoder.layer.1").compensated
        assert not remove_layers(tiny.llama(), 1, calibration=data, include="model.layers.0").compensated

    @pytest.mark.parametrize("shortlist", [None, 3])
    def test_loss_of_blocks_that_return_more(self, shortlist):
        class Block(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = nn.Linear(8, 8)

            def forward(self, hidden):
                return hidden + torch.tanh(self.inner(hidden)), None

        class Stack(nn.Module):
            def __init__(self):
                super().__init__()
                self.blocks = nn.ModuleList(Block() for _ in range(5))

            def forward(self, hidden, skip=()):
                for index, block in enumerate(self.blocks):
                    if index not in skip:
                        hidden, _ = block(hidden)
                return hidden

        torch.manual_seed(0)
        model, inputs = Stack(), torch.randn(6, 8)
        target = model(inputs).detach()

        def loss(output, batch):
            return (output - target).square().mean()

        with torch.no_grad():
            first = min(range(5), key=lambda index: (model(inputs, (index,)) - target).square().mean())
            rest = [index for index in range(5) if index != first]
            second = min(rest, key=lambda index: (model(inputs, (first, index)) - target).square().mean())
        report = remove_layers(model, 2, "loss", calibration=[inputs], loss=loss, shortlist=shortlist)
        if shortlist is None:
            assert set(report.cuts[0].removed) == {first, second}
        assert len(model.blocks) == 3 and all("forward" not in vars(block) for block in model.blocks)

    def test_numbers_for_the_cache(self):
        model = tiny.llama(layers=4, layer_types=None)
        remove_layers(model, 2, "random", include=["model.layers.0", "model.layers.2"])
        assert [block.self_attn.layer_idx for block in model.model.layers] == [0, 1]

    def test_lists_by_layer_follow(self, data):
        from transformers import Qwen2Config, Qwen2ForCausalLM

        kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
        own = {"num_hidden_layers": 4, "num_key_value_heads": 2, "layer_types": kinds}
        config = Qwen2Config(**(tiny.SIZES | own), use_sliding_window=True, sliding_window=4)
        model = Qwen2ForCausalLM(config).eval()
        remove_layers(model, 1, "l1", include="model.layers.0")
        assert model.config.layer_types == kinds[1:]
        assert [block.self_attn.sliding_window for block in model.model.layers] == [4, None, 4]

    def test_a_layer_that_depends_on_its_number_stays(self):
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(
            vocab_size=96,
            n_positions=64,
            n_embd=32,
            n_layer=3,
            n_head=4,
            scale_attn_by_inverse_layer_idx=True,
        )
        model = GPT2LMHeadModel(config).eval()
        expected = logits(model)
        with pytest.raises(ValueError, match="must not depend on its number, scaling of"):
            remove_layers(model, 1, "l1", include="transformer.h.0")
        assert torch.equal(logits(model), expected) and model.config.n_layer == 3

    def test_plain_stack(self):
        block = [nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)) for _ in range(3)]
        model = nn.Sequential(nn.Embedding(96, 8), nn.Sequential(*block), nn.Linear(8, 4))
        nn.init.zeros_(block[1][2].weight)
        report = remove_layers(model, 1, "l1")
        assert report.cuts[0].removed == (1,) and model[1][1] is block[2]


class TestReload:
    @pytest.mark.parametrize("make", [*(FAMILIES[name] for name in TRANSFORMERS), phi3])
    @pytest.mark.parametrize("structure", ["neurons", "heads", "layers"])
    def test_round_trip(self, make, structure, data, tmp_path):
        model = make()
        report = cut(
            model,
            structure,
            0.5,
            criterion="influence" if structure == "layers" else "activation",
            calibration=data,
        )
        expected = logits(model)
        sp.save(model, tmp_path / "ours")
        loaded = sp.load(tmp_path / "ours")
        assert torch.equal(logits(loaded), expected)
        by_config = structure != "heads" or make in (tiny.llama, FAMILIES["llama tied"], phi3)
        assert report.reloads == ("from_pretrained" if by_config else "sparseprune.load")
        if by_config:
            model.save_pretrained(tmp_path / "theirs")
            theirs = type(model).from_pretrained(tmp_path / "theirs").eval()
            torch.testing.assert_close(logits(theirs), expected, rtol=1e-5, atol=1e-6)
        if model.can_generate():
            options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
            written = model.generate(tiny.ids(), **options)
            assert torch.equal(written, loaded.generate(tiny.ids(), **options))
            # through the cache the same as without it
            assert torch.equal(written, model.generate(tiny.ids(), use_cache=False, **options))

    def test_plain_torch(self, data, tmp_path):
        model = tiny.lstm_classifier()
        report = remove_neurons(model, 0.25, calibration=data)
        sp.save(model, tmp_path)
        fresh = tiny.LstmClassifier()
        with pytest.raises(ValueError, match="shape must be"):
            sp.load(tmp_path, fresh)
        apply_sizes(fresh, report.sizes)
        assert torch.equal(logits(sp.load(tmp_path, fresh)), logits(model))

    def test_then_sparse(self, data, tmp_path):
        model = tiny.gpt2()
        remove_heads(model, 0.25, calibration=data)
        sp.prune(model, "2:4")
        sp.sparsify(model, policy="always")
        sp.save(model, tmp_path)
        torch.testing.assert_close(logits(sp.load(tmp_path)), logits(model), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize(
        "sizes",
        [
            [],
            {"linears": {}},
            {"linears": {"nowhere": [1, 2]}, "attributes": {}},
            {"linears": {"hidden": [0, 4]}, "attributes": {}},
        ],
    )
    def test_damaged_sizes(self, sizes):
        with pytest.raises(ValueError, match="sizes: must be those of a LstmClassifier"):
            apply_sizes(tiny.lstm_classifier(), sizes)


class TestDispatch:
    @pytest.mark.parametrize(
        ("structure", "with_data", "without"),
        [("neurons", "activation", "l1"), ("heads", "obs", "l1"), ("layers", "influence", "l1")],
    )
    def test_auto(self, structure, with_data, without, data):
        assert cut(tiny.llama(), structure, 0.5, calibration=data).method == with_data
        report = cut(tiny.llama(), structure, 0.5)
        assert report.method == without and not report.compensated and report.calibration is None


class TestReport:
    def test_table_and_dict(self, data):
        import json

        report = remove_neurons(tiny.llama(), 1 / 3, calibration=data)
        text = str(report)
        assert (
            "33.3%" in text
            and "reloads with from_pretrained" in text
            and "model.layers.0.mlp.down_proj" in text
        )
        found = json.loads(json.dumps(report.to_dict()))
        assert found["removed_fraction"] == pytest.approx(1 / 3)
        assert (
            found["cuts"][0]["before"] - found["cuts"][0]["after"] == len(found["cuts"][0]["removed"]) == 16
        )


class TestErrors:
    @pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, float("nan"), None, True])
    def test_fraction(self, fraction):
        for remove in (remove_neurons, remove_heads):
            with pytest.raises(ValueError, match=r"fraction: must be in \(0, 1\), got"):
                remove(tiny.llama(), fraction, "l1")

    @pytest.mark.parametrize("sparsity", [None, 0, 1.0])
    def test_sparsity(self, sparsity):
        with pytest.raises(ValueError, match=r"fraction: must be in \(0, 1\) for neurons, got"):
            cut(tiny.llama(), "neurons", sparsity)

    @pytest.mark.parametrize("count", [0, 4, 1.0, True, "1", -1])
    def test_count(self, count):
        with pytest.raises(ValueError, match="count: |fraction: "):
            remove_layers(tiny.llama(layers=4), count, "l1")

    def test_messages(self, data):
        model = tiny.llama()
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        config = model.config.to_dict()
        cases = [
            (
                lambda: remove_neurons(model, 0.5, "magnitude"),
                "criterion: must be one of activation, l1, obs",
            ),
            (lambda: remove_layers(model, 1, "obs"), "criterion: must be one of influence"),
            (lambda: remove_neurons(model, 0.5), "calibration: criterion activation needs some, got None"),
            (lambda: remove_neurons(model, 0.5, "l1", compensate=True), "calibration: compensate needs some"),
            (lambda: remove_neurons(model, 0.01, "l1"), "a multiple of 8 below 48 must stay"),
            (lambda: remove_neurons(model, 0.5, "l1", multiple_of=0), "multiple_of: must be at least 1"),
            (
                lambda: remove_neurons(model, 0.5, "l1", include="nothing"),
                "include: 'nothing' matches no linear layer",
            ),
            (lambda: remove_neurons(model, 0.5, "l1", include="*.q_proj"), "has no hidden neurons to remove"),
            (lambda: remove_heads(model, 0.1, "l1"), "fraction: of 4 heads in 2 groups none can go at 0.1"),
            (lambda: remove_heads(model, 0.5, "l1", unit="key"), 'unit: must be "group" or "query"'),
            (
                lambda: remove_layers(model, 1, "l1", include="nothing"),
                "include: 'nothing' matches no block of this LlamaForCausalLM; names are such as model.layers.0",
            ),
            (lambda: remove_layers(model, 1, "l1", exclude="*"), "count: of 2 layers, 0 of which may go"),
            (
                lambda: remove_heads(model, 0.5, "l1", exclude="*.up_proj"),
                "exclude: '.*up_proj' matches no linear of att",
            ),
            (lambda: remove_neurons(model, 0.5, "l1", loss=print), "loss: is for criterion taylor, got"),
            (
                lambda: remove_layers(model, 1, "l1", loss=print),
                "loss: is for criterion taylor and loss, got",
            ),
            (lambda: remove_layers(model, 1, "l1", shortlist=1), "shortlist: is for criterion loss, got 1"),
            (
                lambda: remove_neurons(model, 0.5, "l1", sequential=True),
                "sequential: criterion l1 without comp",
            ),
            (lambda: cut(model, "heads", 0.5, seed=-1), "seed: must be at least 0"),
            (
                lambda: cut(model, "heads", 0.5, criterion="influence"),
                "criterion: must be one of auto, activation",
            ),
            (
                lambda: cut(model, "channels", 0.5),
                "structure: must be one of neurons, heads, layers, got .channels",
            ),
            (
                lambda: remove_heads(tiny.lstm_classifier(), 0.5, "l1"),
                "its config must give num_attention_heads",
            ),
            (lambda: remove_layers(tiny.lstm_classifier(), 1, "l1"), "must have one stack of blocks"),
            (lambda: remove_neurons(nn.Sequential(nn.Linear(8, 8)), 0.5, "l1"), "has no hidden neurons"),
            (
                lambda: remove_layers(model, 1, calibration=[tiny.ids(1, 65)]),
                "the model's positions end at 64",
            ),
            (lambda: remove_heads(model, 0.5, calibration=[]), "batches: must hold at least one"),
            (lambda: remove_neurons(nn.Conv2d(3, 3, 3), 0.5, "l1"), "calibration: must be given to see"),
        ]
        for call, message in cases:
            with pytest.raises(ValueError, match=message):
                call()
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
        assert model.config.to_dict() == config

    def test_bad_weights(self, data):
        model = tiny.llama()
        model.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")
        for remove in (remove_neurons, remove_layers):
            with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj.*: weights must be finite"):
                remove(model, 0.5, "l1")

    def test_an_error_in_the_middle_leaves_the_model(self, data):
        model = tiny.llama(layers=3)
        # the second block overflows, after the first has been cut
        model.model.layers[1].mlp.up_proj.weight.data.mul_(1e38)
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        config = model.config.to_dict()
        with pytest.raises(ValueError, match="must be finite, got NaN or Inf"):
            remove_neurons(model, 0.5, calibration=data)
        assert model.config.to_dict() == config
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())

    def test_a_model_whose_config_says_something_else(self):
        model = tiny.llama()
        model.config.intermediate_size = 40
        with pytest.raises(ValueError, match="must have the shapes that its config says"):
            remove_neurons(model, 0.5, "l1")
