import importlib.util
import json

import pytest
import torch
from helpers import tiny

from sparseprune.measure import tasks
from sparseprune.measure.tasks import zero_shot


def task_folder(path):
    """Two-choice questions; the answer to each is the choice that the model finds likelier or not by turns."""
    questions = [
        {"question": f"the cat sat on the w{index}", "choices": ["mat", "dog"], "label": index % 2}
        for index in range(6)
    ]
    (path / "data.jsonl").write_text("\n".join(json.dumps(it) for it in questions))
    (path / "choice.yaml").write_text(
        f"task: tiny_choice\ndataset_path: json\n"
        f"dataset_kwargs:\n  data_files:\n    test: {path / 'data.jsonl'}\n"
        "output_type: multiple_choice\ntest_split: test\n"
        "doc_to_text: '{{question}}'\ndoc_to_choice: choices\ndoc_to_target: label\n"
        "metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
        "metadata:\n  version: 1.0\n"
    )
    return path


def likelier(model, tokenizer, text, choices):
    scores = []
    for choice in choices:
        ids = torch.tensor([tokenizer(f"{text} {choice}", add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            scores.append(float(model(input_ids=ids).logits[0, -2].log_softmax(-1)[ids[0, -1]]))
    return scores.index(max(scores))


if importlib.util.find_spec("lm_eval") is not None:

    @pytest.mark.filterwarnings("ignore")  # the harness's own
    def test_accuracy_is_that_of_the_likelier_choice(tmp_path, monkeypatch):
        from test_cli import tiny_llama, tiny_tokenizer

        monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
        model, tokenizer = tiny_llama(), tiny_tokenizer()
        folder = task_folder(tmp_path)
        result = zero_shot(model, tokenizer, "tiny_choice", folder=folder, limit=5)
        right = [
            likelier(model, tokenizer, f"the cat sat on the w{index}", ["mat", "dog"]) == index % 2
            for index in range(5)
        ]
        (score,) = result.scores
        assert (score.task, score.metric, score.samples) == ("tiny_choice", "acc", 5)
        assert score.value == pytest.approx(sum(right) / 5)
        assert "0 shots, first 5 of each, float32" in str(result)
        assert json.loads(json.dumps(result.to_dict()))["scores"][0]["value"] == score.value
        with pytest.raises(ValueError, match="tasks: 'no_such_task' is not a task of lm-eval"):
            zero_shot(model, tokenizer, ["no_such_task"])


def test_without_the_harness(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "lm_eval" else found(name, *rest)
    )
    with pytest.raises(ImportError, match=r"pip install 'sparseprune\[eval\]'"):
        zero_shot(tiny.llama(), tiny.WordTokenizer(), "hellaswag")


def test_the_harness_s_results_are_read():
    values = {
        "alias": "arc", "sample_len": 7, "acc,none": 0.5, "acc_stderr,none": 0.1, "acc_norm,none": 0.25,
        "acc_norm_stderr,none": "N/A", "exact_match,strict-match": 1.0, "exact_match_stderr,strict-match": 0.0,
    }  # fmt: skip
    scores = tasks._scores("arc", values, {"original": 9, "effective": 7})
    assert [(it.metric, it.value, it.standard_error, it.samples) for it in scores] == [
        ("acc", 0.5, 0.1, 7), ("acc_norm", 0.25, None, 7), ("exact_match (strict-match)", 1.0, 0.0, 7),
    ]  # fmt: skip
    text = str(tasks.TaskScores(tuple(scores), "protocol"))
    assert "acc_norm" in text
    assert "protocol" in text


def test_errors():
    model, tokenizer = tiny.llama(), tiny.WordTokenizer()
    for arguments, message in [
        ({"tasks": []}, "tasks: must name at least one task"),
        ({"tasks": "a", "shots": -1}, "shots: must be at least 0, got -1"),
        ({"tasks": "a", "limit": 0}, "limit: must be at least 1, got 0"),
        ({"tasks": "a", "batch_size": 0}, "batch_size: must be at least 1, got 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            zero_shot(model, tokenizer, **arguments)
    with pytest.raises(ValueError, match="tokenizer: must be given"):
        zero_shot(model, None, "a")
