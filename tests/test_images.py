"""Vision-language models: packed rows with images, loss masks, what rows may look like, and runs of the scripts."""

import base64
import functools
import io
import json
import os
import shutil
from pathlib import Path
from types import MethodType

import conftest
import datasets
import numpy as np
import pyarrow.parquet
import pytest
import torch
import transformers as hf
from conftest import ASSETS, assert_same_run, read_rows, run_well, train, weights, write_rows
from PIL import Image

import common
import dpo
import grpo
import sft
from common import SFT_FEATURES, UserError, collate, encode_sft, load_tokenizer

MODEL = f"{ASSETS}/vlm"
PICTURES = f"{ASSETS}/pictures.parquet"
HELD_OUT = f"{ASSETS}/pictures_eval.parquet"
PAIRS = common.encode_preference, common.PREFERENCE_FEATURES
PROMPTS = common.encode_prompt, common.PROMPT_FEATURES
TEXT = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT |= {"num_key_value_heads": 2, "max_position_embeddings": 2048, "head_dim": 16, "pad_token_id": 0}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
SIGLIP = {"model_type": "siglip_vision_model", "vision_use_head": False, **VISION}
SIGLIP |= {"image_size": 56, "patch_size": 14}
# Chat templates, where IMAGE stands for what a model's template writes for an image: PLAIN, and with answers MARKED.
BODY = "{% for part in message.content %}{{ part.text if part.type == 'text' else 'IMAGE' }}{% endfor %}<|im_end|>"
OPEN = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
PLAIN = "{% for message in messages %}<|im_start|>{{ message.role }}\n" + BODY + "\n{% endfor %}" + OPEN
ANSWER = "{% generation %}" + BODY + "{% endgeneration %}"
MARKED = PLAIN.replace(BODY, f"{{% if message.role == 'assistant' %}}{ANSWER}{{% else %}}{BODY}{{% endif %}}")


def tokens(image, *names, **special):
    """The embedded tokenizer with more control tokens, and `image` for an image; a text config; the tokens' ids."""
    tokenizer = hf.AutoTokenizer.from_pretrained(ASSETS / "model", extra_special_tokens=special)
    tokenizer.add_special_tokens({"additional_special_tokens": [*names]})
    tokenizer.chat_template = PLAIN.replace("IMAGE", image)
    text = {**TEXT, "vocab_size": len(tokenizer)}
    return tokenizer, text, tokenizer.convert_tokens_to_ids([*special.values(), *names])


def qwen3_vl():
    """Positions in time, height and width."""
    names = "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"
    tokenizer, text, ids = tokens("<|vision_start|><|image_pad|><|vision_end|>", *names)
    keys = "vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id"
    size = {"shortest_edge": 32 * 32, "longest_edge": 32 * 32 * 64}
    images = hf.Qwen2VLImageProcessorPil(size=size, patch_size=16, merge_size=2)
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    vision = {"depth": 3, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64}
    vision |= {"patch_size": 16, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
    options = {**dict(zip(keys, ids, strict=True)), "vision_config": vision, "tie_word_embeddings": True}
    config = hf.Qwen3VLConfig(text_config={**text, "rope_parameters": rope}, **options)
    processor = {"processor_class": "Qwen3VLProcessor"}
    return hf.Qwen3VLForConditionalGeneration(config), tokenizer, images, processor


def idefics3():
    """Pictures cut into tiles, with tokens for rows and columns."""
    names = ["<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>"]
    names += [f"<row_{i}_col_{j}>" for i in range(1, 5) for j in range(1, 5)]
    tokenizer, text, ids = tokens("<image>", *names)
    sizes = {"size": {"longest_edge": 128}, "max_image_size": {"longest_edge": 64}}
    images = hf.Idefics3ImageProcessorPil(**sizes, do_image_splitting=True)
    options = {"text_config": {"model_type": "llama", **text, "tie_word_embeddings": True}, "pad_token_id": 0}
    options |= {"vision_config": {**VISION, "image_size": 64, "patch_size": 16}, "image_token_id": ids[0]}
    config = hf.Idefics3Config(**options, scale_factor=2, tie_word_embeddings=True)
    processor = {"processor_class": "Idefics3Processor", "image_seq_len": 4}
    return hf.Idefics3ForConditionalGeneration(config), tokenizer, images, processor


def llava_onevision():
    """Tiles of several sizes, one after the other, and weights that nothing uses."""
    tokenizer, text, ids = tokens("<image>", "<image>", "<video>")
    pins, size = [[56, 56], [56, 112], [112, 56], [112, 112]], {"height": 56, "width": 56}
    images = hf.LlavaOnevisionImageProcessorPil(size=size, image_grid_pinpoints=pins)
    options = {"vision_config": SIGLIP, "text_config": {"model_type": "qwen2", **text}}
    options |= {"video_token_id": ids[1], "image_token_id": ids[0], "image_grid_pinpoints": pins}
    config = hf.LlavaOnevisionConfig(
        **options, tie_word_embeddings=True, vision_feature_select_strategy="full"
    )
    processor = {"processor_class": "LlavaOnevisionProcessor", "num_image_tokens": 16}
    processor |= {"vision_feature_select_strategy": "full"}
    return hf.LlavaOnevisionForConditionalGeneration(config), tokenizer, images, processor


def gemma3():
    """The tokens of a picture see each other."""
    names = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<soft_token>"}
    tokenizer, text, ids = tokens("<start_of_image>", **names)
    images = hf.Gemma3ImageProcessorPil(size={"height": 56, "width": 56})
    text |= {"query_pre_attn_scalar": 16, "sliding_window": 32}
    options = {"text_config": text, "vision_config": SIGLIP, "boi_token_id": ids[0], "image_token_id": ids[2]}
    config = hf.Gemma3Config(**options, mm_tokens_per_image=4, tie_word_embeddings=True)
    processor = {"processor_class": "Gemma3Processor", "image_seq_length": 4}
    return hf.Gemma3ForConditionalGeneration(config), tokenizer, images, processor


KINDS = (qwen3_vl, idefics3, llava_onevision)


@functools.cache
def saved(kind, folder):
    """The directory of a tiny random model, with the files that the hub has for such models."""
    torch.manual_seed(0)
    model, tokenizer, images, processor = kind()
    for weight in (weight for weight in model.parameters() if weight.ndim > 1):
        torch.nn.init.normal_(weight, std=0.15)
    for part in (model, tokenizer, images):
        part.save_pretrained(folder / kind.__name__)
    (folder / kind.__name__ / "processor_config.json").write_text(json.dumps(processor))
    return str(folder / kind.__name__)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


def png(width, height, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


def parts(*content):
    """Texts, and None for an image, as parts of a message."""
    return [{"type": "image"} if part is None else {"type": "text", "text": part} for part in content]


def asks(*content):
    return {"role": "user", "content": parts(*content)}


def says(text):
    return {"role": "assistant", "content": text}


def some_rows(folder, seed=0):
    """Conversations with 1, 0, 2 and 1 pictures of several sizes, one in a later turn."""
    chats = [[asks(None, "What is it?"), says("A dog.")], [asks("Hello"), says("Hi!")]]
    chats += [[asks(None, " or ", None, "?"), says("The first.")]]
    chats += [[asks("Look:"), says("At what?"), asks(None, "this"), says("I see noise.")]]
    rows = [{"messages": chat, "images": []} for chat in chats]
    for number, (row, width, height) in enumerate([(0, 60, 90), (2, 130, 70), (2, 28, 28), (3, 56, 56)]):
        (folder / f"{seed}-{number}.png").write_bytes(png(width, height, (seed, number)))
        rows[row]["images"].append(f"{seed}-{number}.png")
    return rows


def encoded(tokenizer, folder, rows, encode=encode_sft, features=SFT_FEATURES, **options):
    """The rows as prepare_data gives them, of a file of JSON lines in `folder`."""
    options = {"tokenizer": tokenizer, "vocab_size": 10**6, "max_length": 4096, **options}
    rows = [write_rows(folder / "rows.jsonl", rows)]
    return common.prepare_data(rows, functools.partial(encode, **options), features, 10**6)


def loaded(path):
    return hf.AutoModelForImageTextToText.from_pretrained(path, attn_implementation="sdpa")


def ready(model, tokenizer):
    """A model for packed rows, with sft.py's token_stats and a Vision."""
    common.register_attention()
    model.set_attn_implementation({"": "varlen", "text_config": "varlen", "vision_config": "sdpa"})
    model.token_stats = MethodType(sft.token_stats, model)
    model.vision = common.Vision(tokenizer, model.base_model)
    return model.eval()


def own_inputs(tokenizer, messages, images, folder, **options):
    """What transformers' processor makes of a row: arguments for the model."""
    is_text = [isinstance(message["content"], str) for message in messages]
    pairs = zip(messages, is_text, strict=True)
    messages = [{**m, "content": parts(m["content"])} if is_plain else m for m, is_plain in pairs]
    text = [tokenizer.apply_chat_template(messages, tokenize=False, **options)]
    pictures = [[Image.open(folder / name) for name in images]] if images else None
    return tokenizer.processor(text=text, images=pictures, add_special_tokens=False, return_tensors="pt")


# ---- Packed rows, masks, and what is never shared ----


@pytest.mark.parametrize("kind", [*KINDS, None])
@torch.no_grad()
def test_packed_equals_alone_and_the_models_own_forward(kind, folder, tmp_path):
    """Ids are the processor's, log-probs those of model(**processor(...)). Another picture changes only its own row."""
    path = saved(kind, folder) if kind else MODEL
    tokenizer, model, own = load_tokenizer(path, has_images=True), loaded(path), []
    rows, others = some_rows(tmp_path), some_rows(tmp_path, seed=1)
    documents = sft.documents(encoded(tokenizer, tmp_path, rows), [0, 1, 2, 3])
    documents = [(np.array(ids), np.arange(len(ids)) > 0, images) for ids, _, images in documents]
    for row, (ids, *_) in zip(rows, documents, strict=True):
        inputs = own_inputs(tokenizer, row["messages"], row["images"], tmp_path)
        assert inputs["input_ids"][0].tolist() == ids.tolist()
        logps_TV = model(**inputs, use_cache=False).logits[0, :-1].log_softmax(-1)
        own.append(logps_TV.gather(1, inputs["input_ids"][0, 1:, None]).squeeze(1))
    model = ready(model, tokenizer)

    def log_probs(*documents):
        return model.token_stats(collate(documents, vision=model.vision))[0]

    packed = log_probs(*documents).split([*map(len, own)])
    for expected, together, document in zip(own, packed, documents, strict=True):
        assert torch.allclose(together, expected, atol=2e-5)
        assert torch.allclose(log_probs(document), expected, atol=2e-5)
    ((_, _, images),) = sft.documents(encoded(tokenizer, tmp_path, others), [0])
    changed = log_probs((*documents[0][:2], images), *documents[1:]).split([*map(len, own)])
    assert (changed[0] - packed[0]).abs().max() > 0.1
    assert all(torch.equal(a, b) for a, b in zip(changed[1:], packed[1:], strict=True))


@pytest.mark.parametrize("template", [PLAIN, MARKED])
@pytest.mark.parametrize("kind", KINDS)
def test_exactly_the_answers_are_trained(kind, template, folder, tmp_path):
    tokenizer, rows = load_tokenizer(saved(kind, folder), has_images=True), some_rows(tmp_path)
    image = "<|vision_start|><|image_pad|><|vision_end|>" if kind is qwen3_vl else "<image>"
    tokenizer.chat_template = template.replace("IMAGE", image)
    for row, found in zip(rows, encoded(tokenizer, tmp_path, rows), strict=True):
        trained = [token for token, bit in zip(found["input_ids"], found["loss_mask"], strict=True) if bit]
        answers = [f"{message['content']}<|im_end|>" for message in row["messages"][1::2]]
        assert tokenizer.decode(trained) == "".join(answers)
        assert len(found["files"]) == len(found["images"]) == len(row["images"])


@torch.no_grad()
def test_other_pictures_are_never_shared(tmp_path):
    """Pairs of one prompt and two pictures have the same ids. Each reads its own picture, and each picture once."""
    tokenizer = load_tokenizer(MODEL, has_images=True)
    model, rows = ready(loaded(MODEL), tokenizer), []
    for number in (1, 2):
        (tmp_path / f"{number}.png").write_bytes(png(32, 32, number))
        rows.append({"image": f"{number}.png", "prompt": "<image>?", "chosen": "42", "rejected": "43"})
    data = encoded(tokenizer, tmp_path, rows, *PAIRS)
    assert data["input_ids"][0] == data["input_ids"][1]
    assert data["keys"][0] != data["keys"][1]
    documents = dpo.pair_documents(data, np.arange(2))
    batch = collate(documents, share_prompts=True, vision=model.vision)
    assert len(batch.inputs["pixel_values"]) == 2
    assert batch.inputs["input_ids"].shape[1] == sum(data["packed_length"])
    shared = model.token_stats(batch)[0].view(4, -1)
    for logps, document in zip(shared, documents, strict=True):
        alone = model.token_stats(collate([document], vision=model.vision))[0]
        assert torch.allclose(logps, alone, atol=1e-5)
    assert (shared[0] - shared[2]).abs().max() > 0.01


@pytest.mark.parametrize("kind", [qwen3_vl, llava_onevision, None])
def test_greedy_samples_are_those_of_generate(kind, folder, tmp_path):
    """With 1, 0, 2 and 1 pictures; the samples of a prompt share them."""
    path = saved(kind, folder) if kind else MODEL
    tokenizer, model, expected = load_tokenizer(path, has_images=True), loaded(path), []
    rows = [{"prompt": row["messages"][:-1], "images": row["images"]} for row in some_rows(tmp_path)]
    data = encoded(tokenizer, tmp_path, rows, *PROMPTS)
    for row in rows:
        inputs = own_inputs(tokenizer, row["prompt"], row["images"], tmp_path, add_generation_prompt=True)
        (output,) = model.generate(**inputs, max_new_tokens=12, do_sample=False, eos_token_id=None)
        expected.append(output[inputs["input_ids"].shape[1] :].tolist())
    engine = common.HFEngine(loaded(path))
    engine.vision = common.Vision(tokenizer, engine.model.base_model)
    keys, images = [(0, index) for index in range(len(rows))], data["images"]
    for most in (engine.CACHE_TOKENS, (1, 1)):  # together, and each prompt alone
        engine.CACHE_TOKENS = most
        groups = engine.generate(data["input_ids"], keys, 2, 12, 0, [], images=images)
        assert [[sample.ids for sample in group] for group in groups] == [[ids, ids] for ids in expected]


def test_gemma3_is_refused(folder, tmp_path):
    """In Gemma 3 a picture's tokens see those after them; in packed rows they cannot."""
    flags = {"dataset": (write_rows(tmp_path / "rows.jsonl", some_rows(tmp_path)),), "batch_size": 4}
    message = r"gemma3: log-probs of text with an image are 0\.\d+ off its own; use rows without images"
    with pytest.raises(UserError, match=message):
        train(sft, tmp_path / "run", model=saved(gemma3, folder), **flags)


# ---- Rows ----


def test_forms_of_rows(tmp_path):
    """Paths, data URLs and bytes; parts, <image> and nothing; messages, ShareGPT and prompts: the same tokens."""
    tokenizer, data, answer = load_tokenizer(MODEL, has_images=True), png(32, 32, 0), says("12")
    (tmp_path / "a.png").write_bytes(data)
    url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    asked, plain = {"role": "user", "content": "<image>What is it?"}, parts("What is it?")
    kinds = [{"type": "image_url", "image_url": {"url": url}}, {"type": "image", "image": "a.png"}]
    kinds += [{"type": "image", "path": f"file://{tmp_path}/a.png"}]
    rows = [{"messages": [{"role": "user", "content": [kind, *plain]}, answer]} for kind in kinds]
    rows += [
        {"messages": [asks(None, "What is it?"), answer], "images": ["a.png"]},
        {"messages": [asked, answer], "image": str(tmp_path / "a.png")},
        {"messages": [asks("What is it?"), answer], "images": [url]},
        {"conversations": [{"from": "human", "value": asked["content"]}, {"from": "gpt", "value": "12"}], "image": url},
        {"prompt": "What is it?", "completion": "12", "images": ["a.png"]},
        {"prompt": "<image>What is it?", "completion": "12", "image": {"path": "a.png"}},
    ]  # fmt: skip
    found = [*encoded(tokenizer, tmp_path, rows)]
    for value in (data, {"bytes": data, "path": None}, Image.open(tmp_path / "a.png")):
        table = {"messages": [[{"role": "user", "content": "What is it?"}, answer]], "images": [[value]]}
        stored = datasets.Dataset.from_dict(table)
        if not isinstance(value, bytes):
            stored = stored.cast_column("images", datasets.List(datasets.Image()))
        stored.to_parquet(tmp_path / "rows.parquet")
        encode = functools.partial(encode_sft, tokenizer=tokenizer, vocab_size=600)
        found += common.prepare_data([str(tmp_path / "rows.parquet")], encode, SFT_FEATURES, 99)
    assert len(found) == 12
    forms = {repr((row["input_ids"], row["loss_mask"], row["images"][0]["digest"])) for row in found}
    assert len(forms) == 1


def test_the_cache_tells_directories_apart_and_later_turns_have_no_image(tmp_path, monkeypatch):
    """Two directories with equal rows, named alike, and other pictures; a completion of several turns."""
    tokenizer, digests = load_tokenizer(MODEL, has_images=True), set()
    completion = [says("12"), {"role": "user", "content": "Sure?"}, says("12")]
    prompt = [{"role": "user", "content": "It is \\ufdd0"}]
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(png(32, 32, name.encode()[0]))
        monkeypatch.chdir(tmp_path / name)
        (row,) = encoded(tokenizer, Path(), [{"prompt": "What?", "completion": completion, "image": "a.png"}])
        digests.add(row["images"][0]["digest"])
    assert len(digests) == 2
    (row,) = encoded(tokenizer, Path(), [{"prompt": prompt, "image": "a.png"}], *PROMPTS)
    assert json.loads(row["prompt"])[0]["content"] == "<image>It is \\ufdd0"


def test_pixels_are_limited_and_photographs_turned(folder, tmp_path):
    """--max-image-pixels lowers the tokens, and the orientation of a photograph counts."""
    photograph = Image.new("RGB", (64, 128))
    photograph.getexif()[0x0112] = 6  # orientation: viewers turn it by 90 degrees
    photograph.save(tmp_path / "a.jpg", exif=photograph.getexif())
    row, path = {"messages": [asks(None), says("a")], "image": "a.jpg"}, saved(qwen3_vl, folder)
    rows = [encoded(load_tokenizer(path, None, True, most), tmp_path, [row])[0] for most in (None, 4096)]
    assert [row["images"][0]["size"] for row in rows] == [[128, 64], [90, 45]]
    assert rows[0]["length"] - rows[1]["length"] == 8 - 3


BAD = {  # a row -> the message
    "a place without an image": ({"messages": [asks(None, None), says("a")], "images": ["a.png"]}, "1 images have 2 places"),
    "an image without a place": ({"messages": [asks(None), says("a")], "images": ["a.png", "a.png"]}, "2 images have 1 places"),
    "another number of <image>": ({"prompt": "<image> <image>", "completion": "a", "image": "a.png"}, "1 images have 2 places"),
    "no user": ({"messages": [{"role": "system", "content": "a"}, says("b")], "image": "a.png"}, "1 images have 0 places"),
    "text": ({"text": "a", "image": "a.png"}, "1 images have 0 places"),
    "corrupt": ({"messages": [asks(None), says("a")], "images": ["corrupt.png"]}, r"image 1 \(.*/corrupt.png\) cannot be read: cannot identify"),
    "truncated": ({"messages": [asks(None), says("a")], "images": ["short.png"]}, r"image 1 \(.*/short.png\) cannot be read: .*(trunc|broken|incomplete)"),
    "missing": ({"messages": [asks(None, None), says("a")], "images": ["a.png", "none.png"]}, r"image 2 \(.*/none.png\) cannot be read: .*No such file"),
    "a URL": ({"messages": [asks(None), says("a")], "images": ["https://a.b/c.png"]}, "cannot be read: URLs are not fetched; download the image"),
    "a number": ({"messages": [asks(None), says("a")], "images": [3]}, r"image 1 \(3\) cannot be read"),
    "a video": ({"messages": [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}, says("a")]}, "is no text, image or image_url"),
    "an image in an answer": ({"messages": [asks("a"), {**asks(None), "role": "assistant"}]}, "an answer has an image; models write text alone"),
    "a place in a row without images": ({"messages": [asks("a <image>"), says("a")]}, "the row says <image>, but has no image"),
    "both columns": ({"messages": [asks(None), says("a")], "images": ["a.png"], "image": "b.png"}, "2 images have 1 places"),
    "an image in a side": ({"chosen": [asks("a"), says("b"), asks(None), says("c")], "rejected": [asks("a"), says("c"), asks(None), says("c")], "image": "a.png"}, "an image must be in the prompt"),
    "sides with other images": (
        {name: [{"role": "user", "content": [{"type": "image", "path": f"{file}.png"}]}, says(file)] for name, file in (("chosen", "a"), ("rejected", "b"))},
        "its columns show different images; put all in `prompt`"),
}  # fmt: skip


@pytest.fixture
def files(tmp_path):
    data = png(32, 32, 0)
    files = {"a": data, "b": png(32, 32, 1), "corrupt": b"no picture", "short": data[: len(data) // 2]}
    for name, content in files.items():
        (tmp_path / f"{name}.png").write_bytes(content)
    return tmp_path


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_are_named(name, files):
    (row, message), how = BAD[name], (encode_sft, SFT_FEATURES)
    good = {"prompt": "a", "completion": "b", "chosen": "a", "rejected": "b", "image": "a.png"}
    if "chosen" in row:
        how = PAIRS
    with pytest.raises(UserError, match=f"(?s)1 of 2 rows cannot be used:\n  row 2 of .*{message}"):
        encoded(load_tokenizer(MODEL, has_images=True), files, [good, row], *how)


def test_an_image_beyond_the_longest_row_drops_it(files, capsys):
    """It is never cut."""
    rows = [{"messages": [asks(*images), says("a")]} for images in ([None] * 3, ["a"])]
    rows[0]["images"] = ["a.png"] * 3
    assert len(encoded(load_tokenizer(MODEL, has_images=True), files, rows, max_length=20)) == 1
    assert "dropped: 1 longer than 20 tokens" in capsys.readouterr().out


def test_files_are_opened_again_when_they_have_changed(files):
    """What was tokenized before is used again only while its images are the same; what was wrong may be mended."""
    tokenizer, row = (
        load_tokenizer(MODEL, has_images=True),
        {"messages": [asks(None), says("a")], "images": ["a.png"]},
    )
    digests = []
    for seed in (0, 0, 5):
        (files / "a.png").write_bytes(png(32, 32, seed))
        os.utime(files / "a.png", (seed, seed))
        digests.append(encoded(tokenizer, files, [row])[0]["images"][0]["digest"])
    assert digests[0] == digests[1] != digests[2]
    (files / "a.png").unlink()
    with pytest.raises(UserError, match=r"row 1 of .*a\.png\) cannot be read"):
        encoded(tokenizer, files, [row])
    (files / "a.png").write_bytes(png(32, 32, 0))
    assert encoded(tokenizer, files, [row])[0]["images"][0]["digest"] == digests[0]


def test_a_template_that_wants_strings_gets_them(files):
    """A vision-language model trains on text with any chat template; one without a place for images refuses them."""
    tokenizer = load_tokenizer(MODEL, has_images=True)
    tokenizer.chat_template = hf.AutoTokenizer.from_pretrained(ASSETS / "model").chat_template
    row = {"messages": [{"role": "user", "content": "Hi"}, says("Oh")]}
    (found,) = encoded(tokenizer, files, [row])
    text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nOh<|im_end|>\n"
    assert tokenizer.decode(found["input_ids"]) == text
    with pytest.raises(UserError, match="the chat template must show each image once; use another"):
        encoded(tokenizer, files, [{**row, "image": "a.png"}])


NONE = "images need a vision-language model in sft.py, dpo.py or GRPO, and --engine hf; remove them"
REFUSALS = {  # a script, its flags, and the message
    "a model of text": ("sft", {"model": str(ASSETS / "model")}, NONE),
    "the reward model": ("reward_model", {}, NONE),
    "distillation": ("gkd", {}, NONE),
    "vLLM": ("grpo", {"model": MODEL, "engine": "vllm"}, NONE),
    "asynchronous vLLM": ("async_grpo", {"model": MODEL, "engine": "vllm"}, NONE),
    "an environment": ("grpo", {"model": MODEL, "environment": f"{ASSETS}/calculator.py:Calculator"}, "with --environment, `prompt` must be messages, without images"),
    "all tokens": ("sft", {"model": MODEL, "loss_on": "all"}, "--loss-on all does not apply to this row; use auto or"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_who_takes_no_images(name, files):
    script, flags, message = REFUSALS[name]
    row = {"prompt": [asks(None)], "image": "a.png", "chosen": "1", "rejected": "2"}
    row |= {"completion": "1", "answer": "1"}
    with pytest.raises(UserError, match=f"row 1 of .*{message}"):
        train(__import__(script), files / "run", dataset=(write_rows(files / "rows.jsonl", [row]),), **flags)


def test_without_pillow(tmp_path, monkeypatch):
    """transformers names torchvision, too, which would not help."""

    def from_pretrained(*_, **__):
        raise ImportError("Missing optional dependencies: torchvision, Pillow")

    monkeypatch.setattr(hf.AutoProcessor, "from_pretrained", from_pretrained)
    monkeypatch.setattr(hf.utils, "is_vision_available", lambda: False)
    with pytest.raises(UserError, match=r"row 1 of .*pictures_eval.parquet: pip install pillow\n"):
        train(sft, tmp_path / "run", model=MODEL, dataset=(HELD_OUT,))


# ---- Runs ----


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """24 rows for all scripts, two in three with pictures."""
    folder, rows = tmp_path_factory.mktemp("mixed"), []
    for number, row in enumerate(pyarrow.parquet.read_table(PICTURES).slice(0, 24).to_pylist()):
        (folder / f"{number}.png").write_bytes(row.pop("image"))
        row |= {"image": f"{number}.png"} if number % 3 else {"prompt": "What is 12+34?"}
        rows.append({**row, "prompt": [{"role": "user", "content": row["prompt"]}]})
    return (write_rows(folder / "rows.jsonl", rows),)


@pytest.mark.parametrize("script", [sft, dpo, grpo])
def test_two_ranks_train_as_one(tmp_path, mixed, script):
    """In the second of three steps one rank has a picture and the other has none."""
    (tmp_path / "rows").mkdir()
    shutil.copytree(Path(mixed[0]).parent, tmp_path / "rows", dirs_exist_ok=True)
    rows, order = read_rows(mixed[0]), sft.epoch_order(6, 0, 0).tolist()
    chosen = dict(zip(order, [1, 2, 4, 3, 5, 7], strict=True))  # rows 0, 3, 6, ... have no picture
    dataset = (write_rows(tmp_path / "rows" / "rows.jsonl", [rows[chosen[place]] for place in range(6)]),)
    flags = {"model": MODEL, "dataset": dataset, "batch_size": 2, "max_steps": 3}
    flags |= {"max_grad_norm": 0.1} if script is not grpo else {"num_generations": 2, "batch_size": 4}
    conftest.assert_two_ranks_train_as_one(script, tmp_path, 2e-3, **flags)


def test_evaluation_reference_and_old_log_probs_see_the_pictures(tmp_path, mixed):
    """Before the first step, evaluation has the loss of that step, and a reference that of the policy."""
    flags = {"model": MODEL, "dataset": mixed, "max_steps": 1, "learning_rate": 1e-9}
    before, step, _ = train(sft, tmp_path / "sft", eval_dataset=mixed, batch_size=24, **flags)
    assert before["eval/loss"] == pytest.approx(step["loss"], rel=1e-5)
    flags |= {"num_generations": 4, "beta": 0.1, "steps_per_generation": 2, "max_steps": 2, "save_every": 1}
    for row in train(grpo, tmp_path / "grpo", **flags):
        assert abs(row["kl"]) < 1e-6
        assert row["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=1e-4)


def assert_resumes_exactly(script, folder, **flags):
    """A run that goes on from the checkpoint before its last equals one that did not stop."""
    train(script, folder / "straight", save_every=flags["max_steps"] // 2, **flags)
    shutil.copytree(folder / "straight", folder / "stopped")
    shutil.rmtree(folder / "stopped" / "final")
    shutil.rmtree(max((folder / "stopped").glob("checkpoint-*")))
    train(script, folder / "stopped", save_every=flags["max_steps"] // 2, resume=True, **flags)
    assert_same_run(folder / "stopped", folder / "straight")


def test_a_generation_batch_of_bytes_is_resumed(tmp_path):
    """Checkpoints hold no images: they come from the rows again."""
    flags = {"model": MODEL, "dataset": (HELD_OUT,), "num_generations": 4, "batch_size": 16}
    assert_resumes_exactly(grpo, tmp_path, num_iterations=2, max_steps=2, **flags)


@pytest.mark.parametrize("kind", [qwen3_vl, llava_onevision])
def test_resume_is_exact_though_layers_are_unused(tmp_path, mixed, folder, kind):
    assert_resumes_exactly(sft, tmp_path, model=saved(kind, folder), dataset=mixed, max_steps=4)


def test_lora_adapts_the_text_alone(tmp_path, mixed, folder):
    """In bfloat16. The vision tower stays as it is, unless --lora-targets names its layers."""
    path, changed = saved(qwen3_vl, folder), {}
    flags = {"dataset": mixed, "lora_rank": 4, "dtype": "bfloat16", "gradient_checkpointing": True}
    before = loaded(path).to(torch.bfloat16).state_dict()
    for name, targets in (("text", ()), ("vision", ("qkv",))):
        train(sft, tmp_path / name, model=path, lora_targets=targets, **flags)
        after = weights(tmp_path / name)
        changed[name] = [each for each in after if not torch.equal(before[each], after[each])]
    assert len(changed["text"]) == 14
    assert all("language_model" in name for name in changed["text"])
    assert len(changed["vision"]) == 3
    assert all("visual" in name for name in changed["vision"])


def test_dpo_steps_equal_trls(tmp_path):
    """Loss, rewards and gradient norm of a pair with a picture, over three steps; ours reads the picture once."""
    import trl

    (tmp_path / "a.png").write_bytes(png(32, 32, 0))
    tokenizer = load_tokenizer(MODEL, has_images=True)
    model = str(shutil.copytree(MODEL, tmp_path / "model"))
    template = tokenizer.chat_template.replace("<|im_end|>\n", "<|im_end|>")  # TRL trains the line break, too
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    turns = {"prompt": [asks(None, "What is it?")], "chosen": [says("42")], "rejected": [says("17")]}
    theirs = {**turns, "images": [Image.open(tmp_path / "a.png")]}
    for name, text in (("chosen", "42"), ("rejected", "17")):
        theirs[name] = [{"role": "assistant", "content": parts(text)}]
    config = trl.DPOConfig(
        output_dir=str(tmp_path / "trl"), use_cpu=True, bf16=False, report_to="none", save_strategy="no", logging_steps=1,
        per_device_train_batch_size=1, num_train_epochs=3, learning_rate=1e-3, lr_scheduler_type="constant",
        gradient_checkpointing=False, max_length=None, model_init_kwargs={"dtype": "float32"},
    )  # fmt: skip
    trainer = trl.DPOTrainer(model, args=config, train_dataset=datasets.Dataset.from_list([theirs]))
    trainer.train()
    expected = [row for row in trainer.state.log_history if "loss" in row]
    dataset = (write_rows(tmp_path / "rows.jsonl", [{**turns, "images": ["a.png"]}]),)
    flags = {"dataset": dataset, "batch_size": 1, "lr_schedule": "constant", "warmup_steps": 0}
    flags |= {"model": model, "learning_rate": 1e-3}
    found = train(dpo, tmp_path / "ours", **flags)
    assert len(found) == len(expected) == 3
    for ours, theirs in zip(found, expected, strict=True):
        for name in ("loss", "grad_norm", "rewards/chosen", "rewards/rejected", "logps/chosen"):
            assert ours[name] == pytest.approx(float(theirs[name]), rel=1e-3, abs=2e-4), (name, ours, theirs)
    again = train(dpo, tmp_path / "again", precompute_ref_log_probs=True, **flags)
    conftest.assert_same_curve(again, found)


def test_a_micro_batch_holds_its_own_pictures(tmp_path, mixed, monkeypatch):
    """However large the step, pixels are made micro-batch by micro-batch, within --micro-batch-tokens."""
    counts, inputs = [], common.Vision.inputs

    def note(self, documents, *rest):
        result = inputs(self, documents, *rest)
        counts.append((len(result["pixel_values"]), sum(len(ids) for ids, *_ in documents)))
        return result

    monkeypatch.setattr(common.Vision, "inputs", note)
    flags = {"dataset": mixed, "batch_size": 24, "micro_batch_tokens": 64, "max_steps": 2}
    train(sft, tmp_path / "run", model=MODEL, **flags)
    pictures, sizes = map(max, zip(*counts, strict=True))
    assert len(counts) > 16
    assert pictures == 3
    assert sizes <= 64 + 25, "the document with the black picture may be added"


def test_a_sample_with_an_image_token_fails(tmp_path, mixed, monkeypatch):
    """No pixels belong to the token. The sample is counted as failed, and leaves the loss."""
    draw, token = common.draw, load_tokenizer(MODEL, has_images=True).processor.image_token_id

    def often(logits_SV, temperature, uniform_S):
        token_S, logp_S = draw(logits_SV, temperature, uniform_S)
        return torch.where(uniform_S < 0.1, token, token_S), logp_S

    monkeypatch.setattr(common, "draw", often)
    flags = {"num_generations": 4, "learning_rate": 1e-9, "max_steps": 1}
    (row,) = train(grpo, tmp_path / "run", model=MODEL, dataset=mixed, **flags)
    assert 0 < row["failed_rewards"] < 8


def test_final_answers_about_a_picture(tmp_path, mixed):
    """With transformers alone: its processor, chat template and generate."""
    train(sft, tmp_path / "run", model=MODEL, dataset=mixed, learning_rate=1e-9)
    final, row = tmp_path / "run" / "final", pyarrow.parquet.read_table(HELD_OUT).slice(0, 1).to_pylist()[0]
    processor, answers = hf.AutoProcessor.from_pretrained(final), []
    picture = {"type": "image", "image": Image.open(io.BytesIO(row["image"])).convert("RGB")}
    chat = [{"role": "user", "content": [*parts("What is "), picture, *parts("?")]}]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template(chat, **options)
    for path in (final, MODEL):
        (output,) = loaded(path).generate(**inputs, max_new_tokens=8, do_sample=False)
        answers.append(processor.decode(output[inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    assert answers[0] == answers[1]
    assert answers[0].isdecimal()


@pytest.mark.learn
@pytest.mark.parametrize(("script", "name"), [("sft.py", "eval/exact_match"), ("grpo.py", "eval/reward")])
def test_runs_learn_to_read_pictures(tmp_path, script, name):
    """Sums of numbers in pictures that the model has not seen: below 30 % before."""
    flags = "--model", MODEL, "--dataset", PICTURES, "--eval-dataset", HELD_OUT
    flags += ("--max-steps", 100) if script == "grpo.py" else ()
    rows = run_well(script, tmp_path / "run", *flags, timeout=900)
    values = [row[name] for row in rows if name in row]
    assert values[0] < 0.3
    assert values[-1] > (0.9 if script == "sft.py" else 0.5)
