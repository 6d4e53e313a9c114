"""Make the embedded tokenizer, models and data: python tests/assets/make_assets.py (about ten minutes on 2 cores).

The task is the addition of two numbers from 10 to 99, as a chat. 500 problems are held out, by seed; neither model has
seen them. The student, `model/`, is trained on the others for a number of steps at which it answers about half of the
held-out problems, so that every script has something to teach; `teacher/` until it answers nearly all. Both are trained
by sft.py itself.

Everything is seeded. The tokenizer's merges come from the docstrings of this Python's standard library, so that another
Python version can give other ones.
"""

import json
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from stdlib_conversations import docstrings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

HERE = Path(__file__).resolve().parent
TEMPLATE = """{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
QUESTION = "What is {}+{}?"
VOCABULARY = 512


def make_tokenizer():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    roles = ["system\n", "user\n", "assistant\n", QUESTION.format(12, 34)]
    tokenizer.train_from_iterator([text for _, text in docstrings()] + roles * 2000, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=2048
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_problems():
    """All problems -> 7600 to train on, 500 held out."""
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    random.Random(0).shuffle(pairs)
    return pairs[500:], pairs[:500]


def chat(a, b):
    return [{"role": "user", "content": QUESTION.format(a, b)}, {"role": "assistant", "content": str(a + b)}]


def wrong_answer(a, b, rng):
    """A mistake like those that a half-trained model makes: a digit off, or a carry lost."""
    return str(a + b + rng.choice([-10, 10, -1, 1, -2, 2, -100 if a + b > 109 else 20]))


def any_other_answer(a, b, rng):
    """Another sum of two numbers from 10 to 99: what a model that has learnt nothing but the form would say."""
    answer = rng.choice([total for total in range(20, 199) if total != a + b])
    return [{"role": "assistant", "content": str(answer)}]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_data():
    for name, pairs in zip(("", "_eval"), make_problems(), strict=True):
        rng = random.Random(1)
        write(HERE / f"messages{name}.jsonl", [{"messages": chat(a, b)} for a, b in pairs])
        write(
            HERE / f"prompt_completion{name}.jsonl",
            [{"prompt": QUESTION.format(a, b) + " ", "completion": str(a + b)} for a, b in pairs[:2000]],
        )
        write(
            HERE / f"preferences{name}.jsonl",
            [
                {
                    "prompt": chat(a, b)[:1],
                    "chosen": chat(a, b)[1:],
                    "rejected": [{"role": "assistant", "content": wrong_answer(a, b, rng)}],
                }
                for a, b in pairs[:4000]
            ],
        )
        write(
            HERE / f"comparisons{name}.jsonl",
            [
                {"prompt": chat(a, b)[:1], "chosen": chat(a, b)[1:], "rejected": any_other_answer(a, b, rng)}
                for a, b in pairs
            ],
        )
        write(
            HERE / f"prompts{name}.jsonl",
            [{"prompt": chat(a, b)[:1], "answer": str(a + b)} for a, b in pairs],
        )


def make_model(tokenizer, hidden, layers, seed):
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden // 4,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(config)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    return model


def train(tokenizer, model, name, scratch, flags):
    start = scratch / f"{name}-start"
    model.save_pretrained(start)
    tokenizer.save_pretrained(start)
    command = [sys.executable, HERE.parents[1] / "sft.py", "--model", start, "--output-dir", scratch / name]
    command += [
        "--eval-dataset",
        HERE / "messages_eval.jsonl",
        "--wandb",
        "disabled",
        "--eval-every",
        "25",
        *flags.split(),
    ]
    subprocess.run([str(part) for part in command], check=True)
    shutil.rmtree(HERE / name, ignore_errors=True)
    shutil.copytree(scratch / name / "final", HERE / name)


def main():
    tokenizer = make_tokenizer()
    make_data()
    with tempfile.TemporaryDirectory() as scratch:
        train(tokenizer, make_model(tokenizer, 128, 4, 0), "model", Path(scratch),
              "--max-steps 210 --learning-rate 2e-3 --warmup-steps 50 --lr-schedule constant")  # fmt: skip
        train(tokenizer, make_model(tokenizer, 160, 4, 1), "teacher", Path(scratch),
              "--epochs 24 --learning-rate 2e-3 --warmup-steps 50 --lr-schedule linear")  # fmt: skip


if __name__ == "__main__":
    main()
