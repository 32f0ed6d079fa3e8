"""From requests to what the model takes: images opened, prompts in the chat template, the model's processor."""

from typing import NamedTuple

from PIL import Image

from mpa.answers.replies import opened_reasoning
from mpa.engines import MARK_IN_IT, Request
from mpa.engines.memory import OUT_OF_MEMORY
from mpa.files.image_files import ImageError, open_image
from mpa.files.records import InputError
from mpa.method.prompts import holds_mark
from mpa.models import families, loading
from mpa.models.device_memory import is_out_of_memory

PLAIN_QUESTION = "What is it?"
CACHED_PROMPTS = 1000


class PreparedBatch(NamedTuple):
    """The usable requests of a batch, the processor's output for them, and error replies for the others.

    `inputs` are numpy arrays, which travel through a pipe: shared memory is scarce in containers.
    """

    requests: list[Request]
    inputs: dict
    errors: list[dict]


def asked(prompt: str) -> list[dict]:
    """The conversation that asks a prompt about an image."""
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]


class Preprocessor:
    """The processor of one model. `pixels` are its limits (min, max); `max_tiles`: see `families.image_settings`.

    `marks` are the prompt format's own tokens. `reasoning_tag` is the tag with which the chat template opens a
    reasoning block, or "". Raises InputError where the processor fails on a plain image.
    """

    def __init__(self, model_path: str, pixels: tuple[int, int], trust_remote_code: bool, max_tiles: int | None = None):
        self.model_path, self.pixels, self.max_tiles = model_path, pixels, max_tiles
        self.processor = loading.load_processor(model_path, *pixels, trust_remote_code, max_tiles)
        self.tokenizer = self.processor.tokenizer
        self.marks = loading.processor_marks(self.processor)
        self.chat_texts: dict[str, str] = {}  # a cache: many requests have the same prompt
        self.check()
        self.reasoning_tag = opened_reasoning(self.chat_text("?"))

    def prepare(self, batch: list[Request]) -> PreparedBatch:
        """Open the images and run the processor. A request that cannot be used gets an error of its own."""
        images, errors = {}, []  # by row

        def refuse(row: int, why: str, permanent: bool = True) -> None:
            errors.append({"key": batch[row].key, "error": why, "permanent": permanent})

        for row, request in enumerate(batch):
            if holds_mark(request.prompt, self.marks):
                refuse(row, MARK_IN_IT)
                continue
            try:
                images[row] = open_image(request.image_path)
            except ImageError as error:
                refuse(row, f"image: {error}")
            except MemoryError:
                refuse(row, OUT_OF_MEMORY, permanent=False)

        def processed(rows: list[int]) -> PreparedBatch:
            inputs = self.process([images[row] for row in rows], [batch[row].prompt for row in rows])
            return PreparedBatch([batch[row] for row in rows], inputs, errors)

        try:
            return processed(list(images))
        except Exception:  # one image may be the cause: an extreme shape, for example
            usable = []
            for row in images:
                try:
                    processed([row])
                    usable.append(row)
                except Exception as error:
                    if isinstance(error, MemoryError | RuntimeError) and is_out_of_memory(error):
                        refuse(row, OUT_OF_MEMORY, permanent=False)
                    else:
                        refuse(row, f"{self.part_at_fault(images[row])}: the processor refuses it ({error})")
        try:
            return processed(usable)
        except MemoryError:  # each fits alone
            for row in usable[1:]:
                refuse(row, OUT_OF_MEMORY, permanent=False)
            return processed(usable[:1])

    def process(self, images: list, prompts: list[str]) -> dict:
        """The processor's output for these images and prompts, as numpy arrays."""
        if not images:
            return {}
        texts = [self.chat_text(prompt) for prompt in prompts]
        options = families.tokenizer_options(self.processor, texts[0])
        inputs = self.processor(text=texts, images=[[i] for i in images], padding=True, return_tensors="pt", **options)
        return {
            name: tensor.numpy() for name, tensor in inputs.items() if name != "labels"
        }  # PaliGemma's, for training

    def chat_text(self, prompt: str) -> str:
        """The prompt after an image, in the model's chat template."""
        if prompt not in self.chat_texts:
            if len(self.chat_texts) >= CACHED_PROMPTS:
                self.chat_texts.clear()
            self.chat_texts[prompt] = families.chat_text(self.processor, asked(prompt))
        return self.chat_texts[prompt]

    def check(self) -> None:
        """Raise InputError where the processor fails on a plain image and question: then no request is at fault."""
        try:
            families.check_template(self.processor, asked(PLAIN_QUESTION))
            self.process([Image.new("RGB", (64, 64))], [PLAIN_QUESTION])
        except Exception as error:
            raise InputError(f"{self.model_path}: its processor fails on a plain image: {error}") from None

    def part_at_fault(self, image: Image.Image) -> str:
        """Which part of a request the processor refuses: "image" or "question"."""
        self.check()
        try:
            self.process([image], [PLAIN_QUESTION])
            return "question"
        except Exception:
            return "image"
