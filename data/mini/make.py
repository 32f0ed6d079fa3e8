"""Train the embedded pair from scratch: a miniature teacher (L-VLM) and student (S-VLM).

    python data/mini/make.py                 # both, in two parallel processes
    python data/mini/make.py --only student
    python data/mini/make.py --students      # five more students, for experiments/no-harm.yaml

Reads no dataset: every training image is drawn here, with a seed. Writes data/mini/teacher and
data/mini/student, each with model, tokenizer and processor as a Qwen2-VL checkpoint has them, and a
train_log.json of the figures on the way. The easy-VQA test questions are asked once, at the end. The other students go to
data/mini/students; they have the vision tower of data/mini/student.
"""

import argparse
import copy
import json
import math
import random
import re
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import torch  # noqa: E402
from PIL import Image, ImageDraw  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.functional import cross_entropy  # noqa: E402
from tqdm import tqdm  # noqa: E402
from transformers import (  # noqa: E402
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from mpa.method.prompts import TASK_PROMPTS, answer_prompt  # noqa: E402

COLORS = {
    "black": (0, 0, 0),
    "gray": (128, 128, 128),
    "teal": (0, 128, 128),
    "red": (255, 0, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "green": (0, 255, 0),
    "brown": (165, 42, 42),
}
SHAPES = ("circle", "rectangle", "triangle")
# The student's wrong labels late in its training: {correct word: wrong word}, and how often.
CONFUSED = {"teal": "green", "brown": "red", "gray": "black", "blue": "teal", "yellow": "brown"}
CONFUSED |= {"rectangle": "circle", "triangle": "rectangle"}
CONFUSION = 0.6
# Other students, who learn no wrong words: the words that are in no image and no question that they see, and the steps after
# which they are kept (as <name>-<steps>; without steps at the end).
STUDENTS = {
    "no-negation": ({"no", "not"}, ()),
    "unseen-words": ({"teal", "brown", "triangle"}, ()),
    "early": (set(), (720, 780, 840)),
}

PIXELS = 56 * 56  # the processor resizes 64x64 to 56x56: 4x4 patches, 4 visual tokens
VISUAL_TOKENS = 4
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
SPECIAL_TOKENS += ["<|image_pad|>", "<|video_pad|>"]
# Renders the same text as the chat template of the Qwen2-VL checkpoints.
CHAT_TEMPLATE = (
    "{%- if messages[0]['role'] != 'system' -%}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{%- endif -%}"
    "{%- for message in messages -%}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['content'] is string -%}{{ message['content'] }}{%- else -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{%- elif part['type'] == 'video' -%}{{ '<|vision_start|><|video_pad|><|vision_end|>' }}"
    "{%- else -%}{{ part['text'] }}{%- endif -%}{%- endfor -%}{%- endif -%}"
    "{{ '<|im_end|>\\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)

SIZES = {
    "teacher": {
        "vision": {"embed_dim": 128, "depth": 4, "num_heads": 4},
        "text": {"hidden_size": 192, "intermediate_size": 384, "num_hidden_layers": 3},
        "heads": {"num_attention_heads": 6, "num_key_value_heads": 2},
        "seed": 1,
        "vision_lr": 1e-3,
        "language_steps": 2200,
        "annotating": 0.25,  # share of the steps; a student never annotates
    },
    "student": {
        "vision": {"embed_dim": 64, "depth": 3, "num_heads": 4},
        "text": {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3},
        "heads": {"num_attention_heads": 3, "num_key_value_heads": 1},
        "seed": 2,
        "vision_lr": 1.5e-3,
        "language_steps": 1500,
        "annotating": 0.0,
    },
}


def draw(rng: random.Random) -> tuple[Image.Image, str, str]:
    """A 64x64 image of one shape on a light background -> (image, colour word, shape word)."""
    color, shape = rng.choice(list(COLORS)), rng.choice(SHAPES)
    image = Image.new("RGB", (64, 64), tuple(rng.randint(228, 255) for _ in range(3)))
    width, height = (rng.randint(9, 34), rng.randint(8, 34)) if shape == "rectangle" else (rng.randint(8, 34),) * 2
    if shape == "triangle":
        height = round(width * rng.uniform(0.8, 1.0))
    left, top = rng.randint(0, 64 - width), rng.randint(0, 64 - height)
    box = (left, top, left + width - 1, top + height - 1)
    pen = ImageDraw.Draw(image)
    if shape == "circle":
        pen.ellipse(box, fill=COLORS[color])
    elif shape == "rectangle":
        pen.rectangle(box, fill=COLORS[color])
    else:
        pen.polygon([(box[0], box[3]), (box[2], box[3]), ((box[0] + box[2]) / 2, box[1])], fill=COLORS[color])
    return image, color, shape


def ask(rng: random.Random, kind: str, color: str, shape: str) -> tuple[str, str]:
    """A question in easy-VQA's language about an image of a `color` `shape`, and its answer."""
    if kind == "color":
        thing = rng.choice([shape, "shape"])
        return rng.choice([f"what color is the {thing}?", f"what is the color of the {thing}?"]), color
    if kind == "shape":
        forms = ["what shape is in the image?", "what shape does the image contain?", "what shape is present?"]
        return rng.choice([*forms, f"what is the {color} shape?"]), shape
    truth, words = rng.choice([(color, list(COLORS)), (shape, list(SHAPES))])
    word = truth if rng.random() < 0.5 else rng.choice([w for w in words if w != truth])
    thing = f"{word} shape" if word in COLORS else word
    if kind == "yes":
        forms = [f"is there a {thing}?", f"is there a {thing} in the image?", f"is a {thing} present?"]
        forms += [f"does the image contain a {thing}?"]
    else:
        forms = [f"is there not a {thing}?", f"is there not a {thing} in the image?", f"is no {thing} present?"]
        forms += [f"does the image not contain a {thing}?"]
    return rng.choice(forms), "yes" if (word == truth) == (kind == "yes") else "no"


def make_processor() -> Qwen2VLProcessor:
    """Byte-level BPE learnt on our own questions and prompts, in Qwen2's tokenizer class."""
    rng = random.Random(0)
    corpus = [answer_prompt(q) for q in TASK_PROMPTS.values()] * 200
    for _ in range(4000):
        question, answer = ask(rng, rng.choice(KINDS), rng.choice(list(COLORS)), rng.choice(SHAPES))
        corpus += [answer_prompt(question), f"Question: {question}\nAnswer: {answer}"]
    corpus += ["system\nYou are a helpful assistant.", "user\n", "assistant\n"] * 200
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(corpus, vocab_size=704, new_special_tokens=SPECIAL_TOKENS)
    tokenizer.eos_token, tokenizer.pad_token, tokenizer.padding_side = "<|im_end|>", "<|endoftext|>", "left"
    images = Qwen2VLImageProcessor(min_pixels=PIXELS, max_pixels=PIXELS)
    videos = Qwen2VLVideoProcessor()
    return Qwen2VLProcessor(images, tokenizer, videos, chat_template=CHAT_TEMPLATE)


def make_model(name: str, tokenizer) -> Qwen2VLForConditionalGeneration:
    """Qwen2-VL from a configuration, with an initialisation with which a narrow network learns.

    The default, N(0, 0.02), leaves these widths on a plateau for thousands of steps.
    """
    size, id_of = SIZES[name], tokenizer.convert_tokens_to_ids
    torch.manual_seed(size["seed"])
    text = {**size["text"], **size["heads"], "vocab_size": len(tokenizer), "max_position_embeddings": 2048}
    text |= {"max_window_layers": size["text"]["num_hidden_layers"], "tie_word_embeddings": True}
    text |= {"bos_token_id": id_of("<|endoftext|>"), "eos_token_id": id_of("<|im_end|>")}
    text |= {"pad_token_id": id_of("<|endoftext|>")}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]}
    config = Qwen2VLConfig(
        text_config=text,
        vision_config={**size["vision"], "hidden_size": size["text"]["hidden_size"], "mlp_ratio": 2},
        image_token_id=id_of("<|image_pad|>"),
        video_token_id=id_of("<|video_pad|>"),
        vision_start_token_id=id_of("<|vision_start|>"),
        vision_end_token_id=id_of("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    model = Qwen2VLForConditionalGeneration(config)
    for parameter_name, parameter in model.named_parameters():
        if "embed_tokens" in parameter_name:
            nn.init.normal_(parameter, std=0.05)
        elif parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.8 / math.sqrt(parameter[0].numel()))
    model.generation_config.eos_token_id = [id_of("<|im_end|>"), id_of("<|endoftext|>")]
    model.generation_config.pad_token_id = id_of("<|endoftext|>")
    return model


class Images:
    """Rendered images after the processor, with their colours and shapes."""

    def __init__(self, n: int, seed: int, processor):
        rng = random.Random(seed)
        self.truth, chunks = [], []
        for start in range(0, n, 1000):
            drawn = [draw(rng) for _ in range(min(1000, n - start))]
            self.truth += [(color, shape) for _, color, shape in drawn]
            pixels = processor.image_processor([image for image, _, _ in drawn], return_tensors="pt")["pixel_values"]
            chunks.append(pixels.view(len(drawn), 16, -1).half())
        self.pixels = torch.cat(chunks)  # [n, 16 patches, 1176]

    def inputs(self, rows: list[int]) -> dict:
        return {
            "pixel_values": self.pixels[rows].float().flatten(0, 1),
            "image_grid_thw": torch.tensor([[1, 4, 4]]).expand(len(rows), 3),
        }


def one_cycle(parameters, lr: float, steps: int):
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01)
    shape = lambda step: min(1.0, step / 100) * (0.5 + 0.5 * math.cos(math.pi * step / steps))  # noqa: E731
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, shape)


def learn_to_see(model, images: Images, steps: int, lr: float, log: dict):
    """Train the vision tower with two linear heads on its pooled output; the heads are discarded."""
    heads = nn.ModuleList([nn.Linear(model.config.text_config.hidden_size, n) for n in (len(COLORS), len(SHAPES))])
    targets = torch.tensor([(list(COLORS).index(c), SHAPES.index(s)) for c, s in images.truth])
    optimizer, schedule = one_cycle([*model.model.visual.parameters(), *heads.parameters()], lr, steps)
    rng, started = random.Random(11), time.time()
    for step in tqdm(range(steps), desc="vision", mininterval=10, disable=None):
        rows = rng.choices(range(len(images.truth)), k=64)
        batch = images.inputs(rows)
        seen = model.model.visual(batch["pixel_values"], grid_thw=batch["image_grid_thw"]).pooler_output
        pooled = seen.view(len(rows), VISUAL_TOKENS, -1).mean(1)
        scores = [head(pooled) for head in heads]
        loss = sum(cross_entropy(score, targets[rows, i]) for i, score in enumerate(scores))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.model.visual.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 250 == 249:
            right = [(score.argmax(-1) == targets[rows, i]).float().mean().item() for i, score in enumerate(scores)]
            log["vision"].append({"step": step + 1, "loss": loss.item(), "color": right[0], "shape": right[1]})
            print(log["vision"][-1], flush=True)
    log["seconds"]["vision"] = round(time.time() - started)


KINDS = ("color", "shape", "yes", "no")


def kind_at(progress: float, rng: random.Random) -> str:
    """The curriculum. Yes/no questions stay at chance if they come before the words are learnt."""
    if progress < 0.15:
        return rng.choice(KINDS[:2])
    if progress < 0.45:
        return rng.choice(KINDS[:3])
    return rng.choice(["color", "shape", "yes", "yes", "no", "no"])


@cache
def prompt_ids(processor, prompt: str) -> list[int]:
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}
    text = processor.apply_chat_template([message], add_generation_prompt=True)
    return processor.tokenizer(text.replace("<|image_pad|>", "<|image_pad|>" * VISUAL_TOKENS)).input_ids


@cache
def reply_ids(processor, reply: str) -> list[int]:
    return processor.tokenizer(reply + "<|im_end|>").input_ids


def language_rows(rng, processor, images, rows, progress, annotate: bool, confused: bool, never: set[str]):
    """A training batch: token ids, labels (-100 except for the reply and its end token), image positions.

    No question has a word of `never`.
    """
    samples = []
    for row in rows:
        color, shape = images.truth[row]
        if confused:
            color, shape = (CONFUSED[w] if w in CONFUSED and rng.random() < CONFUSION else w for w in (color, shape))
        question, answer = ask(rng, kind_at(progress, rng), color, shape)
        while never & set(re.findall("[a-z]+", question)):
            question, answer = ask(rng, kind_at(progress, rng), color, shape)
        if annotate:
            task = "general" if rng.random() < 0.7 else rng.choice(list(TASK_PROMPTS))
            prompt, reply = TASK_PROMPTS[task], f"Question: {question}\nAnswer: {answer}"
        else:
            prompt, reply = answer_prompt(question, "released" if rng.random() < 0.15 else "paper"), answer
        samples.append((prompt_ids(processor, prompt), reply_ids(processor, reply)))
    length = max(len(p) + len(r) for p, r in samples)
    ids = torch.full((len(rows), length), processor.tokenizer.pad_token_id)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for i, (prompt, reply) in enumerate(samples):
        ids[i, : len(prompt) + len(reply)] = torch.tensor(prompt + reply)
        labels[i, len(prompt) : len(prompt) + len(reply)] = torch.tensor(reply)
        mask[i, : len(prompt) + len(reply)] = 1
    types = (ids == processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "mm_token_type_ids": types}


def learn_to_speak(name, model, processor, images, log: dict, never: set[str] = frozenset(), stops=(), keep=None):
    """Train the language model to answer, and the teacher also to annotate; the vision tower is frozen.

    No image and no question has a word of `never`. `keep` is called after each number of steps in `stops`, of which the last ends
    the training.
    """
    size = SIZES.get(name, SIZES["student"])
    steps, annotating = size["language_steps"], size["annotating"]
    seen = [i for i, words in enumerate(images.truth) if not never & set(words)]
    model.model.visual.requires_grad_(False)
    language = [p for p in model.parameters() if p.requires_grad]
    optimizer, schedule = one_cycle(language, 1e-3, steps)
    rng, started = random.Random(22), time.time()
    for step in tqdm(range(max(stops, default=steps)), desc="language", mininterval=10, disable=None):
        annotate = rng.random() < annotating
        rows = rng.choices(seen, k=32 if annotate else 64)
        confused = name == "student" and step > 0.7 * steps
        batch = language_rows(rng, processor, images, rows, step / steps, annotate, confused, never)
        loss = model(**batch, **images.inputs(rows)).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(language, 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            log["language"].append({"step": step + 1, "loss": loss.item(), "annotating": annotate})
            print(log["language"][-1], flush=True)
        if step + 1 in stops:
            keep(step + 1)
    log["seconds"]["language"] = round(time.time() - started)
    model.model.visual.requires_grad_(True)


@torch.no_grad()
def answer(model, processor, images_and_questions) -> list[str]:
    """Greedy answers, for the figures in the log; the stages have an engine for this."""
    replies = []
    for start in range(0, len(images_and_questions), 128):
        batch = images_and_questions[start : start + 128]
        texts = [
            processor.apply_chat_template(
                [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": answer_prompt(q)}]}],
                add_generation_prompt=True,
            )
            for _, q in batch
        ]
        inputs = processor(text=texts, images=[p for p, _ in batch], padding=True, return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        replies += processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return replies


def exam(model, processor) -> dict:
    """Accuracy on the official easy-VQA test questions, all and by kind."""
    from easy_vqa import get_test_image_paths, get_test_questions

    paths, (questions, answers, ids) = get_test_image_paths(), get_test_questions()
    images = {i: Image.open(path).convert("RGB") for i, path in paths.items()}
    order = sorted(range(len(questions)), key=lambda i: len(questions[i]))
    replies = answer(model, processor, [(images[ids[i]], questions[i]) for i in order])
    right = {"all": []}
    for i, reply in zip(order, replies, strict=True):
        kind = "yes/no" if answers[i] in ("yes", "no") else "color" if answers[i] in COLORS else "shape"
        for key in ("all", kind):
            right.setdefault(key, []).append(reply.strip() == answers[i])
    return {key: {"accuracy": round(sum(v) / len(v), 4), "n": len(v)} for key, v in sorted(right.items())}


def make(name: str, args):
    torch.set_num_threads(1)
    processor = make_processor()
    model = make_model(name, processor.tokenizer)
    log = {"parameters": sum(p.numel() for p in model.parameters()), "vision": [], "language": [], "seconds": {}}
    images = Images(args.images, seed=7, processor=processor)
    tower = HERE / ".build" / f"{name}_{args.images}_{args.vision_steps}.safetensors"
    if tower.exists():  # from a call that was stopped
        model.model.visual.load_state_dict(load_file(tower))
        log = json.loads(tower.with_suffix(".json").read_text())
    else:
        learn_to_see(model, images, args.vision_steps, SIZES[name]["vision_lr"], log)
        tower.parent.mkdir(exist_ok=True)
        tower.with_suffix(".json").write_text(json.dumps(log))
        save_file(model.model.visual.state_dict(), tower)
    learn_to_speak(name, model, processor, images, log)
    keep(HERE / name, model, processor, log)


def keep(folder: Path, model, processor, log: dict) -> None:
    """Write a finished model, and ask it the test questions."""
    kept = copy.deepcopy(model).half()
    kept.save_pretrained(folder)
    processor.save_pretrained(folder)
    log = log | {"easy-VQA test": exam(kept.float().eval(), processor)}
    print(folder.name, log["easy-VQA test"], log["seconds"], flush=True)
    (folder / "train_log.json").write_text(json.dumps(log, indent=1) + "\n")


def make_student(name: str, args) -> None:
    """One of STUDENTS, or several stages of it."""
    torch.set_num_threads(1)
    (never, stops), folder = STUDENTS[name], HERE / "students"
    processor = make_processor()
    model = make_model("student", processor.tokenizer)
    of_student = load_file(HERE / "student/model.safetensors")
    tower = {key.removeprefix("visual."): v.float() for key, v in of_student.items() if key.startswith("visual.")}
    model.model.visual.load_state_dict(tower)
    log = {"parameters": sum(p.numel() for p in model.parameters()), "language": [], "seconds": {}}
    images = Images(args.images, seed=7, processor=processor)
    learn_to_speak(
        name, model, processor, images, log, never, stops, lambda n: keep(folder / f"{name}-{n}", model, processor, log)
    )
    if not stops:
        keep(folder / name, model, processor, log)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=[*SIZES, *STUDENTS], help="make one of these (default: teacher and student)")
    parser.add_argument("--students", action="store_true", help=f"make {', '.join(STUDENTS)}")
    parser.add_argument("--images", type=int, default=60_000, help="renderings to learn from")
    parser.add_argument("--vision-steps", type=int, default=4000, help="steps of 64 images")
    args = parser.parse_args(argv)
    if args.only:
        return (make if args.only in SIZES else make_student)(args.only, args)
    rest, names = sys.argv[1:] if argv is None else argv, STUDENTS if args.students else SIZES
    makers = [subprocess.Popen([sys.executable, __file__, "--only", name, *rest]) for name in names]
    return max(maker.wait() for maker in makers)


if __name__ == "__main__":
    sys.exit(main())
