"""Make the embedded tokenizer, models and data: python tests/assets/make_assets.py (about ten minutes on 2 cores).

The task is the addition of two numbers from 10 to 99, as a chat. 500 problems are held out, by seed; neither model has
seen them. The student, `model/`, is trained on the others for a number of steps at which it answers about half of the
held-out problems, so that every script has something to teach; `teacher/` until it answers nearly all. Both are trained
by sft.py itself.

`vlm/` is a LLaVA around the student. Its problems have the two numbers in a picture, one above the other. First its vision
tower learns to give for each digit what resembles that digit's embedding. Then sft.py trains the whole model, again for a
number of steps only.

Everything is seeded. The tokenizer's merges come from the docstrings of this Python's standard library, so that another
Python version can give other ones.
"""

import io
import json
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow
import pyarrow.parquet
import torch
from stdlib_conversations import docstrings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    CLIPImageProcessorPil,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

HERE = Path(__file__).resolve().parent
TEMPLATE = """{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
QUESTION = "What is {}+{}?"
VOCABULARY = 512
VLM_TEMPLATE = TEMPLATE.replace(
    "{{ message.content }}",
    "{% for part in message.content %}{{ part.text if part.type == 'text' else '<image>' }}{% endfor %}",
)
# The digits 0 to 9: of each, 7 rows of 5 pixels, a bit a pixel and two hexadecimal digits a row.
GLYPHS = [
    "0E11131519110E",
    "040C040404040E",
    "0E11010204081F",
    "1F02040201110E",
    "02060A121F0202",
    "1F101E0101110E",
    "0608101E11110E",
    "1F010204080808",
    "0E11110E11110E",
    "0E11110F01020C",
]
CELL = 16  # pixels of a digit, and of a patch of the vision tower


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


def draw(a, b, rng):
    """A PNG of 32 x 32 pixels with two numbers, one above the other, dark on light or light on dark."""
    dark, light = range(90), range(166, 256)
    back, ink = (rng.choice(shades) for shades in rng.sample([dark, light], 2))
    pixels = np.full((2 * CELL, 2 * CELL), back, np.uint8)
    for place, digit in enumerate(f"{a}{b}"):
        rows = bytes.fromhex(GLYPHS[int(digit)])
        bits = np.array([[row >> (4 - column) & 1 for column in range(5)] for row in rows])
        bits = bits.repeat(2, 0).repeat(2, 1)  # 14 x 10 pixels, anywhere in their cell
        down, across = divmod(place, 2)
        top = CELL * down + rng.randrange(3)
        left = CELL * across + rng.randrange(7)
        pixels[top : top + 14, left : left + 10][bits == 1] = ink
    PIL.Image.fromarray(pixels).quantize(2).save(file := io.BytesIO(), "PNG", optimize=True, bits=1)
    return file.getvalue()


def make_pictures():
    for name, pairs in zip(("", "_eval"), make_problems(), strict=True):
        rng, rows = random.Random(2), []
        for a, b in pairs[:6000]:
            answer = {column: str(a + b) for column in ("completion", "chosen", "answer")}
            row = {"image": draw(a, b, rng), "prompt": "What is <image>?", **answer}
            rows.append({**row, "rejected": wrong_answer(a, b, rng)})
        table, path = pyarrow.Table.from_pylist(rows), HERE / f"pictures{name}.parquet"
        pyarrow.parquet.write_table(table, path, compression="zstd", use_dictionary=False)


def make_vlm(scratch):
    """Write vlm-start/: the student, and a CLIP of 117,000 parameters. CLIP and projector are trained to give for each
    patch, which shows one digit, what is close to that digit's embedding in the student."""
    tokenizer = AutoTokenizer.from_pretrained(HERE / "model")
    text = Qwen3ForCausalLM.from_pretrained(HERE / "model")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    text.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    vision = {"model_type": "clip_vision_model", "hidden_size": 64, "intermediate_size": 256}
    vision |= {"num_hidden_layers": 2, "num_attention_heads": 4, "projection_dim": 64}
    vision |= {"image_size": 2 * CELL, "patch_size": CELL}
    text.config.name_or_path = ""
    options = {"vision_config": vision, "text_config": text.config.to_dict(), "image_seq_length": 4}
    options |= {"image_token_id": tokenizer.convert_tokens_to_ids("<image>"), "vision_feature_layer": -1}
    torch.manual_seed(2)
    model = LlavaForConditionalGeneration(LlavaConfig(**options, tie_word_embeddings=True))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.model.language_model.load_state_dict(text.model.state_dict())
    size = {"height": 2 * CELL, "width": 2 * CELL}
    images = CLIPImageProcessorPil(size=size, crop_size=size, do_center_crop=False)
    options = {
        "patch_size": CELL,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
    }
    processor = LlavaProcessor(images, tokenizer, chat_template=VLM_TEMPLATE, **options)
    processor.save_pretrained(scratch / "vlm-start")

    new = [weight for name, weight in model.named_parameters() if "language_model" not in name]
    optimizer, rng = torch.optim.AdamW(new, 2e-3), random.Random(3)
    ids = tokenizer.convert_tokens_to_ids([*"0123456789"])
    embeddings = model.get_input_embeddings().weight.detach()[ids]
    for step in range(400):
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / 400)
        pairs = [(rng.randrange(10, 100), rng.randrange(10, 100)) for _ in range(64)]
        pictures = [PIL.Image.open(io.BytesIO(draw(*pair, rng))).convert("RGB") for pair in pairs]
        digits = torch.tensor([[int(digit) for digit in f"{a}{b}"] for a, b in pairs]).flatten()
        pixels = images(pictures, return_tensors="pt")["pixel_values"]
        features = model.model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output
        found = torch.cat([*features])  # a row for each digit
        loss = (found - embeddings[digits]).square().mean() / embeddings.square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    right = (torch.cdist(found, embeddings).argmin(1) == digits).float().mean()
    count = sum(weight.numel() for weight in model.parameters())
    print(f"vlm: {count:,} parameters, {right:.1%} of digits are nearest to their own embedding")
    model.save_pretrained(scratch / "vlm-start")


def make_model(folder, hidden, layers, seed):
    tokenizer = make_tokenizer()
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
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train(name, scratch, flags):
    command = [sys.executable, HERE.parents[1] / "sft.py", "--model", scratch / f"{name}-start"]
    command += ["--output-dir", scratch / name, "--wandb", "disabled", "--eval-every", "25", *flags.split()]
    subprocess.run([str(part) for part in command], check=True)
    shutil.rmtree(HERE / name, ignore_errors=True)
    shutil.copytree(scratch / name / "final", HERE / name)


def main():
    make_data()
    make_pictures()
    sums = f"--eval-dataset {HERE / 'messages_eval.jsonl'} --learning-rate 2e-3 --warmup-steps 50"
    pictures = [f"{HERE / f'pictures{name}.parquet'}" for name in ("", "_eval")]
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        make_model(scratch / "model-start", 128, 4, 0)
        train("model", scratch, f"{sums} --max-steps 210 --lr-schedule constant")
        make_model(scratch / "teacher-start", 160, 4, 1)
        train("teacher", scratch, f"{sums} --epochs 24 --lr-schedule linear")
        make_vlm(scratch)
        data = f"--dataset {pictures[0]} --eval-dataset {pictures[1]}"
        train("vlm", scratch, f"{data} --max-steps 14 --learning-rate 2e-3 --warmup-steps 10")


if __name__ == "__main__":
    main()
