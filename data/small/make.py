"""Train the small suite's four models from scratch: two L-VLMs and two S-VLMs of two families.

    python data/small/make.py                    # all, two at a time
    python data/small/make.py --only qwen-small

Every training image is drawn, with seeds apart from the suite's. Writes data/small/<model>, as a checkpoint of that family is,
with a train_log.json of the figures on the way. A call that was stopped goes on after its last finished part.
"""

import argparse
import json
import math
import random
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from architectures import MODELS, PATCHES, VISUAL_TOKENS, make_model, make_processor, make_tokenizer  # noqa: E402
from fast_cpu import speed_up  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from scenes import FACTS, LETTERS, SUITE, TASK  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.functional import cross_entropy  # noqa: E402
from tqdm import tqdm  # noqa: E402
from training_images import GRID, Images  # noqa: E402

from mpa.method.prompts import TASK_PROMPTS, answer_prompt  # noqa: E402

BUILD = HERE / ".build"
# Qwen2-VL's patches come in groups of 2×2, which become one visual token: their places in reading order.
GROUPED = torch.arange(PATCHES).view(GRID // 2, 2, GRID // 2, 2).permute(0, 2, 1, 3).flatten()


class Learner:
    """A model with its processor, and its way from pixels to visual tokens."""

    def __init__(self, name: str):
        self.name, self.family = name, MODELS[name]["family"]
        self.processor = make_processor(self.family, BUILD / "tokenizer")
        self.model = make_model(name, self.processor.tokenizer)
        speed_up(self.model)
        images = self.processor.image_processor
        self.mean, self.std = (torch.tensor(values) for values in (images.image_mean, images.image_std))

    def inputs(self, pixels: torch.Tensor) -> dict:
        """What the image processor makes of images [n, 96, 96, 3] of its own size."""
        n = len(pixels)
        values = ((pixels.float() / 255 - self.mean) / self.std).permute(0, 3, 1, 2)
        if self.family == "internvl":
            return {"pixel_values": values}
        edge = values.shape[-1] // GRID
        cut = values.view(n, 3, GRID // 2, 2, edge, GRID // 2, 2, edge).permute(0, 2, 5, 3, 6, 1, 4, 7)
        doubled = cut.unsqueeze(6).expand(*cut.shape[:6], 2, edge, edge)  # two equal frames
        return {
            "pixel_values": doubled.reshape(n * PATCHES, -1),
            "image_grid_thw": torch.tensor([[1, GRID, GRID]]).expand(n, 3),
        }

    def see(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The vision tower's patches [n, 144, width] in reading order, and the visual tokens [n, 36, width]."""
        inputs, n = self.inputs(pixels), len(pixels)
        if self.family == "qwen":
            seen = self.model.model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
            patches = seen.last_hidden_state.view(n, PATCHES, -1)[:, GROUPED.argsort()]
            return patches, seen.pooler_output.view(n, VISUAL_TOKENS, -1)
        how = {"vision_feature_layer": -1, "vision_feature_select_strategy": "default"}
        seen = self.model.model.get_image_features(inputs["pixel_values"], **how)
        return seen.last_hidden_state[:, 1:], seen.pooler_output

    @property
    def vision(self) -> list[nn.Parameter]:
        return [
            p for name, p in self.model.named_parameters() if "language_model" not in name and "lm_head" not in name
        ]

    @property
    def language(self) -> list[nn.Parameter]:
        seeing = {id(p) for p in self.vision}
        return [p for p in self.model.parameters() if id(p) not in seeing]


class Eyes(nn.Module):
    """Heads that read facts from visual tokens and letters from patches. They are discarded."""

    def __init__(self, seen: int, width: int):
        super().__init__()
        self.values = max(map(len, FACTS.values())) + 1
        self.query = nn.Parameter(torch.randn(len(FACTS), width) / math.sqrt(width))
        self.key = nn.Linear(width, width)
        self.facts = nn.Parameter(torch.randn(len(FACTS), width, self.values) / math.sqrt(width))
        self.letters = nn.Linear(seen, len(LETTERS) + 1)
        known = torch.tensor([[i <= len(values) for i in range(self.values)] for values in FACTS.values()])
        self.register_buffer("impossible", torch.zeros(known.shape).masked_fill(~known, -1e4))

    def forward(self, patches, tokens):
        weight = torch.einsum("ntw,fw->nft", self.key(tokens), self.query).softmax(-1)
        read = torch.einsum("nft,ntw->nfw", weight, tokens)
        return torch.einsum("nfw,fwv->nfv", read, self.facts) + self.impossible, self.letters(patches)


def one_cycle(parameters, lr: float, steps: int):
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01, fused=True)
    shape = lambda step: min(1.0, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * step / steps))  # noqa: E731
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, shape)


def descend(loss, parameters, optimizer, schedule) -> None:
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    schedule.step()


def learn_to_see(learner: Learner, images: Images, steps: int, log: list) -> None:
    """Train the vision tower for a cycle of the learning rate, with new heads that name what is in the image."""
    size = MODELS[learner.name]
    eyes = Eyes(size["vision"][0], size["text"][0])
    parameters = [*learner.vision, *eyes.parameters()]
    optimizer, schedule = one_cycle(parameters, 1e-3, steps)
    rng, started = random.Random(11), time.time()
    for step in tqdm(range(steps), desc="vision", mininterval=10, disable=None):
        rows = sorted(rng.sample(range(len(images.scenes)), k=64))
        with torch.autocast("cpu", torch.bfloat16):
            facts, letters = eyes(*learner.see(torch.from_numpy(images.pixels[rows])))
        target = images.facts[rows]
        each = cross_entropy(facts.float().flatten(0, 1), target.flatten(), reduction="none").view(target.shape)
        weight = torch.where(target > 0, 1.0, 0.1)
        loss = (each * weight).sum() / weight.sum()
        loss = loss + cross_entropy(letters.float().flatten(0, 1), images.letters[rows].flatten())
        descend(loss, parameters, optimizer, schedule)
        if step % 250 == 249 or step == steps - 1:
            there = target > 0
            right = (facts.argmax(-1) == target) & there
            share = {name: right[:, i].sum() / there[:, i].sum() for i, name in enumerate(FACTS) if there[:, i].any()}
            shown = {name: round(share[name].item(), 2) for name in ("word 0", "price 0", "object") if name in share}
            entry = {"step": step + 1, "loss": round(loss.item(), 4), "seconds": round(time.time() - started)}
            log.append({**entry, "all": round((right.sum() / there.sum()).item(), 3), **shown})
            print(learner.name, log[-1], flush=True)


@torch.no_grad()
def visual_tokens(learner: Learner, images: Images) -> torch.Tensor:
    """What a finished vision tower sees in all images [n, 36, width], in float16."""
    seen = []
    for start in tqdm(range(0, len(images.scenes), 250), desc="see", mininterval=10, disable=None):
        with torch.autocast("cpu", torch.bfloat16):
            seen.append(learner.see(torch.from_numpy(images.pixels[start : start + 250]))[1].half())
    return torch.cat(seen)


YES_NO = ("yes/no", "compare", "flies")
LENGTH = 144  # tokens of a packed sequence; one length, so that the language model is compiled once
IMAGE_TOKENS = {"qwen": "<|image_pad|>", "internvl": "<IMG_CONTEXT>"}


@cache
def prompt_ids(processor, prompt: str) -> list[int]:
    """The token ids of a prompt with an image, as the processor makes them."""
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}
    text = processor.apply_chat_template([message], add_generation_prompt=True)
    text = text.replace("<|image_pad|>", "<|image_pad|>" * VISUAL_TOKENS)
    text = text.replace("<IMG_CONTEXT>", "<img>" + "<IMG_CONTEXT>" * VISUAL_TOKENS + "</img>")
    return processor.tokenizer(text).input_ids


@cache
def reply_ids(processor, reply: str) -> list[int]:
    return processor.tokenizer(reply + "<|im_end|>").input_ids


def lessons(scene: dict, annotate: bool, early: bool, rng: random.Random) -> list[tuple[str, str]]:
    """Prompts about a scene and their replies. Yes/no questions stay at chance if they come before the words are learnt."""
    questions = [q for q in scene["questions"] if not (early and q[0] in YES_NO)]
    if annotate:
        _, question, answer = rng.choice(questions)
        return [(TASK_PROMPTS[TASK[scene["name"]]], f"Question: {question}\nAnswer: {answer}")]
    return [(answer_prompt(question), answer) for _, question, answer in rng.sample(questions, min(3, len(questions)))]


class Packed:
    """Several prompts about each image in one sequence: what they have in common, up to the image, stands there once.

    A prompt attends to the common part and to itself, at the positions that it has alone.
    """

    def __init__(self, processor, family: str, rows: list[list[tuple[str, str]]]):
        prompts = [[(prompt_ids(processor, p), reply_ids(processor, r)) for p, r in row] for row in rows]
        start = prompts[0][0][0].index(processor.tokenizer.convert_tokens_to_ids(IMAGE_TOKENS[family]))
        common = start + VISUAL_TOKENS + 1  # the token that ends the image
        self.ids = torch.full((len(rows), LENGTH), processor.tokenizer.pad_token_id)
        self.labels, self.part = torch.full_like(self.ids, -100), torch.full_like(self.ids, -1)
        self.place, self.image = torch.zeros_like(self.ids), slice(start, start + VISUAL_TOKENS)
        for i, row in enumerate(prompts):
            self.ids[i, :common], self.part[i, :common] = torch.tensor(row[0][0][:common]), 0
            self.place[i, :common] = torch.arange(common)
            end = common
            for n, (prompt, reply) in enumerate(row, 1):
                own = prompt[common:] + reply
                span = slice(end, end + len(own))
                self.ids[i, span], self.part[i, span] = torch.tensor(own), n
                self.place[i, span] = common + torch.arange(len(own))
                self.labels[i, end + len(own) - len(reply) : end + len(own)] = torch.tensor(reply)
                end += len(own)

    def mask(self) -> torch.Tensor:
        """What is added to the attention's scores [rows, 1, length, length]."""
        part = self.part
        seen = (part[:, None, :] == part[:, :, None]) | (part[:, None, :] == 0)
        seen &= torch.ones(part.shape[1], part.shape[1], dtype=torch.bool).tril()
        return torch.zeros(seen.shape).masked_fill(~seen, -1e4)[:, None]

    def positions(self, family: str) -> torch.Tensor:
        """InternVL: the place in the prompt. Qwen2-VL: time, row and column, which an image shares [3, rows, length]."""
        if family == "internvl":
            return self.place
        edge, first = GRID // 2, self.image.start
        place = self.place - (VISUAL_TOKENS - edge) * (self.place >= first + VISUAL_TOKENS)
        three = place.expand(3, *place.shape).clone()
        number = torch.arange(VISUAL_TOKENS)
        three[:, :, self.image] = first + torch.stack([0 * number, number // edge, number % edge])[:, None]
        return three


def language_loss(learner: Learner, packed: Packed, tokens: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy over the replies, given the visual tokens [rows, 36, width]."""
    core = learner.model.model
    embedded = core.get_input_embeddings()(packed.ids).clone()
    embedded[:, packed.image] = tokens
    hidden = core.language_model(
        inputs_embeds=embedded,
        attention_mask=packed.mask(),
        position_ids=packed.positions(learner.family),
        use_cache=False,
    ).last_hidden_state
    wanted = packed.labels[:, 1:] != -100
    return cross_entropy(learner.model.lm_head(hidden[:, :-1][wanted]).float(), packed.labels[:, 1:][wanted])


def learn_to_speak(learner: Learner, images: Images, size: dict, log: list) -> None:
    """Train the language model on what the finished vision tower sees."""
    seen, steps, parameters = visual_tokens(learner, images), size["language_steps"], learner.language
    optimizer, schedule = one_cycle(parameters, 1e-3, steps)
    core, library_way = learner.model.model, learner.model.model.language_model
    core.language_model = torch.compile(library_way, dynamic=False)
    rng, started = random.Random(22), time.time()
    for step in tqdm(range(steps), desc="language", mininterval=10, disable=None):
        rows, early = rng.sample(range(len(images.scenes)), k=64), step < 0.2 * steps
        told = [lessons(images.scenes[row], rng.random() < size["annotating"], early, rng) for row in rows]
        with torch.autocast("cpu", torch.bfloat16):
            loss = language_loss(learner, Packed(learner.processor, learner.family, told), seen[rows].float())
        descend(loss, parameters, optimizer, schedule)
        if step % 100 == 99:
            log.append({"step": step + 1, "loss": round(loss.item(), 4), "seconds": round(time.time() - started)})
            print(learner.name, log[-1], flush=True)
    core.language_model = library_way


def learn_together(learner: Learner, images: Images, size: dict, log: list) -> None:
    """Train both parts of an L-VLM at once, at a lower learning rate."""
    steps, parameters = size["joint_steps"], list(learner.model.parameters())
    optimizer, schedule = one_cycle(parameters, 4e-4, steps)
    core, library_way = learner.model.model, learner.model.model.language_model
    core.language_model = torch.compile(library_way, dynamic=False)
    rng, started = random.Random(33), time.time()
    for step in tqdm(range(steps), desc="together", mininterval=10, disable=None):
        rows = sorted(rng.sample(range(len(images.scenes)), k=64))
        told = [lessons(images.scenes[row], rng.random() < size["annotating"], False, rng) for row in rows]
        with torch.autocast("cpu", torch.bfloat16):
            tokens = learner.see(torch.from_numpy(images.pixels[rows]))[1]
            loss = language_loss(learner, Packed(learner.processor, learner.family, told), tokens.float())
        descend(loss, parameters, optimizer, schedule)
        if step % 100 == 99:
            log.append({"step": step + 1, "loss": round(loss.item(), 4), "seconds": round(time.time() - started)})
            print(learner.name, log[-1], flush=True)
    core.language_model = library_way


@torch.no_grad()
def exam(learner: Learner, n: int) -> dict:
    """Accuracy on `n` new drawings of each kind as the suite has them, one random question each, by kind of question."""
    learner.model.eval()
    right = {}
    for name in SUITE:
        scenes = [SUITE[name](random.Random(20_000_000 + i)) for i in range(n)]
        rng = random.Random(0)
        asked = [rng.choice(scene.questions) for scene in scenes]
        prompts = [prompt_ids(learner.processor, answer_prompt(question.text)) for question in asked]
        order = sorted(range(n), key=lambda i: len(prompts[i]))
        for start in range(0, n, 100):
            rows = order[start : start + 100]
            ids = {"input_ids": [prompts[i] for i in rows]}
            batch = learner.processor.tokenizer.pad(ids, padding_side="left", return_tensors="pt")
            pixels = torch.stack([torch.from_numpy(np.asarray(scenes[i].image)) for i in rows])
            inputs = {**batch, **learner.inputs(pixels)}
            if learner.family == "qwen":
                image = learner.processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")
                inputs["mm_token_type_ids"] = (inputs["input_ids"] == image).long()
            out = learner.model.generate(**inputs, max_new_tokens=8, do_sample=False)
            replies = learner.processor.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
            for i, reply in zip(rows, replies, strict=True):
                for key in (name, f"{name}, {asked[i].kind}"):
                    right.setdefault(key, []).append(reply.strip() == asked[i].answer)
    return {key: {"accuracy": round(sum(v) / len(v), 3), "n": len(v)} for key, v in sorted(right.items())}


def part(learner: Learner, name: str, learn, log: dict) -> None:
    """Learn a part, or take it from a call that was stopped."""
    file = BUILD / f"{learner.name}-{name}.safetensors"
    if file.exists():
        learner.model.load_state_dict(load_file(file), strict=False)
        log[name] = json.loads(file.with_suffix(".json").read_text())
        return
    log[name] = []
    learn(log[name])
    state = {key: value.contiguous() for key, value in learner.model.state_dict().items() if key != "lm_head.weight"}
    save_file(state, file)
    file.with_suffix(".json").write_text(json.dumps(log[name]))


def make(name: str, args) -> None:
    torch.set_num_threads(1)
    size, learner = MODELS[name], Learner(name)
    images = Images(args.images, BUILD)
    log = {"parameters": sum(p.numel() for p in learner.model.parameters())}
    for cycle, steps in enumerate(size["vision_steps"], 1):
        part(learner, f"vision-{cycle}", lambda log, n=steps: learn_to_see(learner, images, n, log), log)
    part(learner, "language", lambda log: learn_to_speak(learner, images, size, log), log)
    if size["joint_steps"]:
        part(learner, "together", lambda log: learn_together(learner, images, size, log), log)
    log["new drawings"] = exam(learner, 500)
    print(name, json.dumps(log["new drawings"]), flush=True)
    learner.model.half().save_pretrained(HERE / name)
    learner.processor.save_pretrained(HERE / name)
    (HERE / name / "train_log.json").write_text(json.dumps(log, indent=1) + "\n")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=MODELS, help="make one of the four (default: all)")
    parser.add_argument("--images", type=int, default=60_000, help="drawings to learn from")
    args = parser.parse_args(argv)
    if not (BUILD / "tokenizer").exists():
        make_tokenizer(BUILD / "tokenizer")
    if args.only:
        return make(args.only, args)
    Images(args.images, BUILD)
    rest = sys.argv[1:] if argv is None else argv
    for pair in ("large", "small"):
        makers = [subprocess.Popen([sys.executable, __file__, "--only", n, *rest]) for n in MODELS if n.endswith(pair)]
        if code := max(maker.wait() for maker in makers):
            return code


if __name__ == "__main__":
    sys.exit(main())
