"""The small suite's images, drawn from a random generator, with all questions that can be asked about each.

    signs     one or two boards with a word (TextVQA)
    labels    one or two price labels with a product (ST-VQA)
    chart     bars, lines or a pie by matplotlib (ChartQA)
    picture   an object in one of three art styles (OK-VQA)

Every image has 96×96 pixels. The same generator state draws the same pixels with the pinned versions of the libraries.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

import font_caladea
import font_fredoka_one
import font_manrope
import font_roboto
import font_source_serif_pro
import matplotlib
import numpy as np
from facts import COLORS, KNOWLEDGE, OBJECTS, PRODUCTS, SIGNS
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

SIZE = 96
PICTURES = Path(__file__).resolve().parent / "pictures"
STYLES = ("noto", "twemoji", "fluent-emoji-flat")
FONTS = [font_roboto.RobotoBold, font_source_serif_pro.SourceSerifProSemibold, font_fredoka_one.FredokaOne]
FONTS += [font_caladea.CaladeaBold, font_manrope.ManropeBold]


@dataclass
class Question:
    kind: str
    text: str
    answer: str


@dataclass
class Scene:
    """`facts` is what a vision tower can learn to see: {what: value}. `letters` are (character, x, y) in pixels."""

    image: Image.Image
    facts: dict[str, str]
    questions: list[Question] = field(default_factory=list)
    letters: list[tuple[str, float, float]] = field(default_factory=list)

    def ask(self, kind: str, texts: list[str], answer: str, rng: random.Random) -> None:
        self.questions.append(Question(kind, rng.choice(texts), answer))


def canvas(rng: random.Random) -> Image.Image:
    """A light background with a gradient and some faint strokes."""
    light, other = ([rng.randint(200, 255) for _ in range(3)] for _ in range(2))
    mix = np.linspace(0, 1, SIZE)[:, None, None] if rng.random() < 0.5 else np.linspace(0, 1, SIZE)[None, :, None]
    image = Image.fromarray(np.broadcast_to(mix * light + (1 - mix) * other, (SIZE, SIZE, 3)).astype(np.uint8))
    pen = ImageDraw.Draw(image)
    for _ in range(rng.randint(0, 4)):
        ends = [rng.randint(0, SIZE) for _ in range(4)]
        pen.line(ends, fill=tuple(rng.randint(170, 220) for _ in range(3)), width=rng.randint(1, 2))
    return image


@cache
def font(path: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)


def write(pen: ImageDraw.ImageDraw, text: str, x: float, y: float, path: str, size: int, color) -> list:
    """Write a text with its centre at (x, y). Returns its letters with the places of their centres."""
    face = font(path, size)
    left = x - face.getlength(text) / 2
    pen.text((left, y), text, font=face, fill=color, anchor="lm")
    ends = [face.getlength(text[:i]) for i in range(len(text) + 1)]
    return [(letter, left + (ends[i] + ends[i + 1]) / 2, y) for i, letter in enumerate(text)]


def boards(rng: random.Random, colors: list[str], texts: list[list[str]], smallest: int) -> tuple[Image.Image, list]:
    """One board for each colour, below each other, with lines of text of `smallest` to 19 pixels."""
    image, letters = canvas(rng), []
    pen = ImageDraw.Draw(image)
    heights = SIZE // len(colors)
    for i, (color, lines) in enumerate(zip(colors, texts, strict=True)):
        path, size = rng.choice(FONTS), rng.randint(smallest, 19)
        width = max(font(path, size).getlength(line) for line in lines) + rng.randint(6, 14)
        height = len(lines) * (size + 1) + rng.randint(4, 8)
        left = rng.uniform(1, SIZE - width - 1)
        top = heights * i + rng.uniform(1, max(1.5, heights - height - 1))
        box = (left, top, left + width, top + height)
        edge = tuple(c // 2 for c in COLORS[color])
        if rng.random() < 0.5:
            pen.rectangle(box, fill=COLORS[color], outline=edge, width=rng.randint(0, 2))
        else:
            pen.rounded_rectangle(box, radius=rng.randint(3, 9), fill=COLORS[color], outline=edge)
        ink = (20, 20, 20) if color == "yellow" else (255, 255, 255)
        for n, line in enumerate(lines):
            y = top + height * (n + 0.5) / len(lines)
            letters += write(pen, line, left + width / 2, y, path, size, ink)
    return image, letters


def signs(rng: random.Random, smallest: int = 15) -> Scene:
    number = rng.choice([1, 2, 2])
    colors, words = rng.sample(list(COLORS), number), rng.sample(SIGNS, number)
    image, letters = boards(rng, colors, [[word] for word in words], smallest)
    facts = {"scene": "signs"} | {f"color {i}": c for i, c in enumerate(colors)}
    scene = Scene(image, facts | {f"word {i}": w for i, w in enumerate(words)}, letters=letters)
    for color, word, place in zip(colors, words, ("upper", "lower"), strict=False):
        if number == 1:
            scene.ask("read", ["what does the sign say?", "what is written on the sign?"], word, rng)
        else:
            forms = [f"what does the {color} sign say?", f"what is written on the {color} sign?"]
            scene.ask("read", [*forms, f"what does the {place} sign say?"], word, rng)
            scene.ask("color", [f"what color is the sign that says {word}?"], color, rng)
    yes = rng.random() < 0.5
    asked = rng.choice(words if yes else [w for w in SIGNS if w not in words])
    scene.ask("yes/no", [f"is there a sign that says {asked}?"], "yes" if yes else "no", rng)
    return scene


def labels(rng: random.Random, smallest: int = 15) -> Scene:
    number = rng.choice([1, 2, 2])
    colors, products = rng.sample(list(COLORS), number), rng.sample(PRODUCTS, number)
    prices = [str(n) for n in rng.sample(range(1, 10), number)]
    texts = [[word, f"${price}"] for word, price in zip(products, prices, strict=True)]
    image, letters = boards(rng, colors, texts, smallest)
    facts = {"scene": "labels"} | {f"color {i}": c for i, c in enumerate(colors)}
    facts |= {f"word {i}": w for i, w in enumerate(products)} | {f"price {i}": p for i, p in enumerate(prices)}
    scene = Scene(image, facts, letters=letters)
    for color, word, price in zip(colors, products, prices, strict=True):
        price_of, product_of = ("price", "product") if number == 1 else ("look-up", "look-up")
        scene.ask(price_of, [f"how much does the {word} cost?", f"what is the price of the {word}?"], price, rng)
        scene.ask(product_of, [f"what costs {price} dollars?", f"which product costs {price} dollars?"], word, rng)
        if number == 2:
            scene.ask("read", [f"what is on the {color} label?", f"what does the {color} label say?"], word, rng)
            scene.ask("price", [f"what is the price on the {color} label?"], price, rng)
    return scene


def plot(rng: random.Random, draw: Callable) -> Image.Image:
    """A chart of 96×96 pixels in one of several styles; `draw` adds the data to its axes."""
    figure = Figure(figsize=(SIZE / 72, SIZE / 72), dpi=72, facecolor=rng.choice(["white", "#f4f4f4", "#fffbea"]))
    axes = figure.add_axes((0.06, 0.06, 0.9, 0.86), facecolor=rng.choice(["white", "#eef2f7", "#f7f7f7"]))
    axes.tick_params(length=0, labelbottom=False, labelleft=False)
    for side in ("top", "right", *(("left",) if rng.random() < 0.5 else ())):
        axes.spines[side].set_visible(False)
    if rng.random() < 0.5:
        axes.grid(axis="y", color="#d0d0d0", linewidth=0.6)
        axes.set_axisbelow(True)
    draw(axes)
    agg = FigureCanvasAgg(figure)
    agg.draw()
    return Image.fromarray(np.asarray(agg.buffer_rgba())[:, :, :3])


def hexes(colors: list[str]) -> list[str]:
    return [matplotlib.colors.to_hex([c / 255 for c in COLORS[color]]) for color in colors]


def bars(rng: random.Random) -> Scene:
    number = rng.choice([2, 3, 4])
    colors, values = rng.sample(list(COLORS), number), rng.sample(range(1, 10), number)

    def draw(axes):
        width = rng.uniform(0.6, 0.85)
        drawn = axes.bar(
            range(number), values, width=width, color=hexes(colors), edgecolor=rng.choice(["none", "#333"])
        )
        axes.bar_label(drawn, fontsize=13, fontweight="bold")
        axes.set_ylim(0, 11)

    facts = {"scene": "bars", "count": str(number)} | {f"bar {c}": str(v) for c, v in zip(colors, values, strict=True)}
    scene = Scene(plot(rng, draw), facts)
    order = [color for _, color in sorted(zip(values, colors, strict=True))]
    for color, value in zip(colors, values, strict=True):
        scene.ask("value", [f"what is the value of the {color} bar?"], str(value), rng)
    scene.ask("extreme", ["which color is the highest bar?", "what is the color of the highest bar?"], order[-1], rng)
    scene.ask("extreme", ["which color is the lowest bar?", "what is the color of the lowest bar?"], order[0], rng)
    scene.ask("count", ["how many bars are there?"], str(number), rng)
    one, other = rng.sample(order, 2)
    higher = "yes" if order.index(one) > order.index(other) else "no"
    scene.ask("compare", [f"is the {one} bar higher than the {other} bar?"], higher, rng)
    return scene


def lines(rng: random.Random) -> Scene:
    number = rng.choice([1, 2])
    colors, trends = rng.sample(list(COLORS), number), [rng.choice(["rising", "falling"]) for _ in range(number)]

    def draw(axes):
        for color, trend in zip(hexes(colors), trends, strict=True):
            start, steps = rng.uniform(0, 2), [rng.uniform(0.6, 2.2) for _ in range(rng.randint(3, 5))]
            values = np.cumsum([start, *steps])
            axes.plot(
                values if trend == "rising" else values[::-1], color=color, linewidth=2.5, marker="o", markersize=4
            )

    facts = {"scene": "lines", "count": str(number)} | {f"line {c}": t for c, t in zip(colors, trends, strict=True)}
    scene = Scene(plot(rng, draw), facts)
    for color, trend in zip(colors, trends, strict=True):
        scene.ask(
            "trend", [f"is the {color} line rising or falling?", f"what is the trend of the {color} line?"], trend, rng
        )
    scene.ask("count", ["how many lines are there?"], str(number), rng)
    absent = rng.choice([c for c in COLORS if c not in colors])
    asked = rng.choice([colors[0], absent])
    scene.ask("compare", [f"is there a {asked} line?"], "no" if asked == absent else "yes", rng)
    return scene


def pie(rng: random.Random) -> Scene:
    number = rng.choice([2, 3, 4])
    colors = rng.sample(list(COLORS), number)
    shares = rng.sample({2: [30, 50], 3: [18, 32, 55], 4: [12, 22, 34, 52]}[number], number)

    def draw(axes):
        hole = {"width": rng.uniform(0.45, 0.6)} if rng.random() < 0.3 else {}
        axes.pie(
            shares, colors=hexes(colors), startangle=rng.randint(0, 359), wedgeprops={"edgecolor": "white", **hole}
        )

    order = [color for _, color in sorted(zip(shares, colors, strict=True))]
    ranks = {f"slice {color}": str(number - i) for i, color in enumerate(order)}
    scene = Scene(plot(rng, draw), {"scene": "pie", "count": str(number)} | ranks)
    for what, color in (("largest", order[-1]), ("smallest", order[0])):
        forms = [f"which color has the {what} share?", f"what is the color of the {what} slice?"]
        scene.ask("extreme", forms, color, rng)
    scene.ask("count", ["how many slices are there?"], str(number), rng)
    one, other = rng.sample(order, 2)
    larger = "yes" if order.index(one) > order.index(other) else "no"
    scene.ask("compare", [f"is the {one} slice larger than the {other} slice?"], larger, rng)
    return scene


def chart(rng: random.Random) -> Scene:
    return rng.choice([bars, bars, lines, pie])(rng)


@cache
def sprite(name: str, style: str) -> Image.Image:
    return Image.open(PICTURES / f"{name}-{style}.png").convert("RGBA")


def picture(rng: random.Random) -> Scene:
    name, style, image = rng.choice(list(OBJECTS)), rng.choice(STYLES), canvas(rng)
    drawn, side = sprite(name, style), rng.randint(44, 76)
    if rng.random() < 0.5:
        drawn = drawn.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    drawn = drawn.rotate(rng.uniform(-25, 25), resample=Image.Resampling.BICUBIC).resize((side, side))
    place = (rng.randint(0, SIZE - side), rng.randint(0, SIZE - side))
    if rng.random() < 0.5:  # ground
        top = place[1] + side - rng.randint(4, 16)
        ImageDraw.Draw(image).rectangle((0, top, SIZE, SIZE), fill=tuple(rng.randint(150, 215) for _ in range(3)))
    image.paste(drawn, place, drawn)
    scene = Scene(image, {"scene": "picture", "object": name})
    for kind, answer in OBJECTS[name][1].items():
        scene.ask(kind, KNOWLEDGE[kind], answer, rng)
    return scene


def suite_labels(rng: random.Random) -> Scene:
    scene = labels(rng, smallest=17)
    scene.questions = [q for q in scene.questions if q.kind != "look-up"]
    return scene


DRAW = {"signs": signs, "labels": labels, "chart": chart, "picture": picture}
# The suite leaves out what the L-VLMs cannot do: the smallest text, and to find one of two labels by what is written on it.
SUITE = DRAW | {"signs": partial(signs, smallest=17), "labels": suite_labels}
TASK = {
    "signs": "text",
    "labels": "text",
    "chart": "chart",
    "picture": "knowledge",
}  # keys of mpa.method.prompts.TASK_PROMPTS
# What a vision tower can see: {fact: its values}; "none" where a scene has no such fact.
_WORDS, _NUMBERS = [*SIGNS, *PRODUCTS], [str(n) for n in range(1, 10)]
FACTS = {
    "scene": ["signs", "labels", "bars", "lines", "pie", "picture"],
    "count": ["1", "2", "3", "4"],
    "object": list(OBJECTS),
    **{
        f"{what} {i}": values
        for i in (0, 1)
        for what, values in {"word": _WORDS, "color": list(COLORS), "price": _NUMBERS}.items()
    },
    **{f"bar {c}": _NUMBERS for c in COLORS},
    **{f"line {c}": ["rising", "falling"] for c in COLORS},
    **{f"slice {c}": ["1", "2", "3", "4"] for c in COLORS},
}
LETTERS = "".join(sorted(set("".join(_WORDS)) | set("$123456789")))
