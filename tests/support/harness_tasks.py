"""Two tasks of the EleutherAI harness on files of their own: answers to choose from, and answers to write."""

import json
import random
from pathlib import Path

import yaml

WORDS = ("list", "dict", "return", "class", "import", "value", "self", "index", "name", "open", "read", "write", "line")


def write_tasks(folder: Path, documents: int = 12, *, seed: int = 0, choices: int = 4, words: int = 12) -> Path:
    """Write the tasks `choose` and `write` with their documents, and return the folder of the task files.

    Choices have one to four words, and contexts of different lengths come twice with other choices.

    Args:
        folder: Where to write.
        documents: Documents of each task.
        seed: Draws them.
        choices: Choices of each question.
        words: Words of a question, half of them at least.
    """
    draw = random.Random(seed)
    rows = []
    for _ in range(documents):
        question = " ".join(draw.choices(WORDS, k=draw.randrange(words // 2, words + 1)))
        offered = [" " + " ".join(draw.choices(WORDS, k=draw.randrange(1, 5))) for _ in range(choices)]
        rows.append({"question": f"def {question}", "choices": offered, "answer": draw.randrange(choices)})
    tasks = folder / "tasks"
    tasks.mkdir(parents=True)
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "metadata": {"version": 1.0},
    }
    choose = common | {
        "task": "choose",
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    write = common | {
        "task": "write",
        "output_type": "generate_until",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {
            "until": ["\n\n", "return"],
            "max_gen_toks": 12,
            "repetition_penalty": 1.3,
            "top_k": None,
            "num_beams": 1,
        },
        "metric_list": [{"metric": "exact_match"}],
    }
    rolling = common | {
        "task": "rolling",
        "output_type": "loglikelihood_rolling",
        "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    }
    for task in (choose, write, rolling):
        (tasks / f"{task['task']}.yaml").write_text(yaml.safe_dump(task))
    return tasks
