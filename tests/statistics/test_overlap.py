import json

import pytest
import torch
from helpers import tiny
from safetensors import safe_open
from safetensors.torch import save_file

from sparseprune.calibration import CalibrationData, windows
from sparseprune.io.checkpoint import CheckpointError, load, save
from sparseprune.measure.evaluate import perplexity
from sparseprune.pruning import prune
from sparseprune.recovery import TokenStream, recover
from sparseprune.statistics.overlap import SHINGLE, Fingerprint, overlap, recall, remember


def text(tokens, seed, vocabulary=96):
    return torch.randint(vocabulary, (tokens,), generator=torch.Generator().manual_seed(seed))


def naive(calibration, evaluation):
    """Share of the runs of `evaluation` that are in `calibration`, compared token by token."""

    def runs(ids):
        return {tuple(ids[i : i + SHINGLE].tolist()) for i in range(len(ids) - SHINGLE + 1)}

    seen, read = runs(calibration), runs(evaluation)
    return len(seen & read) / len(read)


def test_texts_apart_do_not_overlap_and_equal_ones_do():
    assert not overlap(text(20_000, 0), text(20_000, 1))
    found = overlap(text(20_000, 0), text(20_000, 0))
    assert found.share == 1
    assert found.compared == pytest.approx(20_000 / 16, rel=0.1)


@pytest.mark.parametrize("vocabulary", [3, 96, 50_000])
@pytest.mark.parametrize("shared", [1000, 9000])
def test_the_share_is_that_of_a_comparison_token_by_token(vocabulary, shared):
    calibration, evaluation = text(30_000, 0, vocabulary), text(10_000, 1, vocabulary)
    evaluation[500 : 500 + shared] = calibration[7000 : 7000 + shared]
    found = overlap(calibration, evaluation)
    assert found.share == pytest.approx(naive(calibration, evaluation), abs=0.03)


def test_order_matters():
    ids = text(5000, 0)
    assert not overlap(ids, ids.flip(0))


def test_one_shared_paragraph_is_found_in_a_large_text():
    calibration = text(400_000, 0)
    evaluation = text(8000, 1)
    evaluation[1000:2000] = calibration[222_000:223_000]
    found = overlap(calibration, evaluation)
    assert found
    assert found.share == pytest.approx(1 / 8, abs=0.05)


def test_a_fingerprint_stays_small_and_joins():
    first, second = text(200_000, 0), text(300_000, 1)
    joined = Fingerprint.of([first]).joined(Fingerprint.of([second]))
    assert len(joined.hashes) <= 4096
    together = Fingerprint.of([first, second])
    assert joined.limit == together.limit
    assert joined.hashes.tolist() == together.hashes.tolist()
    assert len(joined.to_json()) < 50_000
    back = Fingerprint.from_json(joined.to_json())
    assert (back.limit, back.hashes.tolist()) == (joined.limit, joined.hashes.tolist())


def test_windows_are_separate_and_batches_of_any_kind_count():
    ids = text(4000, 0)
    pieces = ids.reshape(-1, 100)
    data = CalibrationData([pieces[:20], {"input_ids": pieces[20:30]}, (pieces[30:],), torch.randn(2, 3)])
    assert overlap(data, ids).share == pytest.approx(69 / 100, abs=0.1)  # 31 of 100 runs cross a border


def test_text_in_words():
    words = " ".join(f"word{index % 977} w{index % 31}" for index in range(3000))
    assert overlap(words, words, tiny.WordTokenizer()).share == 1
    with pytest.raises(ValueError, match="tokenizer: must be given"):
        overlap(words, words)


class TestModels:
    def test_perplexity_warns(self):
        model, ids = tiny.llama(), text(3000, 0)
        clean = perplexity(model, None, ids, window=64)
        assert clean.warning is None
        remember(model, windows(ids, None, length=64, count=20))
        result = perplexity(model, None, ids, window=64)
        assert result.value == clean.value
        assert "WARNING: the model was calibrated on" in str(result)
        assert result.to_dict()["warning"] in str(result)
        assert perplexity(model, None, text(3000, 1), window=64).warning is None

    def test_pruning_leaves_the_note(self):
        model, ids = tiny.llama(), text(3000, 0)
        prune(model, "2:4", "wanda", calibration=windows(ids, None, length=64, count=20))
        assert perplexity(model, None, ids, window=64).warning

    @pytest.mark.parametrize("as_stream", [True, False])
    def test_recovery_leaves_the_note(self, as_stream):
        model, ids = tiny.llama(), text(3000, 0)
        recover(
            model,
            TokenStream(ids, length=64) if as_stream else windows(ids, None, length=64, count=20),
            steps=1,
        )
        assert perplexity(model, None, ids, window=64).warning

    def test_what_is_not_read_is_not_held_against_it(self):
        model, ids = tiny.llama(), text(3000, 0)
        remember(model, [ids[None, 1500:]])
        assert perplexity(model, None, ids, window=64, max_windows=20).warning is None
        assert perplexity(model, None, ids, window=64, max_windows=30).warning is not None

    def test_several_texts_add_up(self):
        model = tiny.llama()
        remember(model, [text(2000, 0)[None]])
        remember(model, [text(2000, 1)[None]])
        assert perplexity(model, None, text(2000, 0), window=64).warning
        assert perplexity(model, None, text(2000, 1), window=64).warning

    def test_a_saved_model_remembers(self, tmp_path):
        model, ids = tiny.llama(), text(2000, 0)
        save(model, tmp_path / "before")
        assert recall(load(tmp_path / "before")) is None
        remember(model, [ids[None]])
        save(model, tmp_path / "after")
        assert perplexity(load(tmp_path / "after"), None, ids, window=64).warning
        assert perplexity(load(tmp_path / "after", tiny.llama()), None, ids, window=64).warning

    def test_a_damaged_note(self, tmp_path):
        model = tiny.llama()
        remember(model, [text(2000, 0)[None]])
        path = save(model, tmp_path / "model") / "model.safetensors"
        with safe_open(path, "pt") as file:
            tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
        note = json.loads(metadata["calibration"])
        for damaged in ("{", json.dumps({**note, "hashes": "!"}), json.dumps({**note, "shingle": 9}), "{}"):
            save_file(tensors, path, {**metadata, "calibration": damaged})
            with pytest.raises(
                CheckpointError, match="calibration: must be a fingerprint of runs of 32 tokens"
            ):
                load(tmp_path / "model")
