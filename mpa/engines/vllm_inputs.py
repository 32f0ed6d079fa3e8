"""From requests to vLLM's inputs: their length, how vLLM renders them, and whether it sees the processor's tokens."""

import contextlib
from collections.abc import Sequence
from functools import cached_property

from PIL import Image

from mpa.engines import MARK_IN_IT, Request
from mpa.engines.preprocessing import PLAIN_QUESTION, Preprocessor
from mpa.engines.vllm_model import VLLMModel, reason, too_long
from mpa.files.records import InputError
from mpa.method.prompts import ANSWER_SUFFIX, holds_mark
from mpa.models import families, loading

VERIFIED_IMAGES = 4  # whose visual tokens are counted
LENGTH_STEP = 1024  # `needed_length` is rounded up to a multiple


class VLLMInputs:
    """Makes vLLM's inputs, with the limits and the chat template of the model's own processor."""

    def __init__(self, preprocessor: Preprocessor, model: VLLMModel):
        self.preprocessor, self.model = preprocessor, model
        self.verified: set[tuple[int, int]] = set()  # sizes of images

    @cached_property
    def _adds_bos(self) -> bool:
        """Whether the tokenizer, which vLLM calls, puts a start token before a text."""
        tokenizer = self.preprocessor.tokenizer
        return tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]

    def processor_settings(self) -> dict | None:
        """The limits as vLLM passes them to the processor; None where it takes none."""
        made = self.preprocessor
        kind = loading.model_type(made.model_path)
        return families.image_settings(made.processor, kind, *made.pixels, made.max_tiles) or None

    def needed_length(self, requests: Sequence[Request]) -> int:
        """Tokens of the longest request or follow-up: image, prompt and reply.

        The image counts with the most visual tokens of some extreme shapes, so that no image is opened for it. Rounded
        up, which costs no memory (all requests share vLLM's) and often saves loading the model again for the
        next call's prompts. At most what the model is made for.
        """
        if not requests:
            return LENGTH_STEP
        reply = max(r.max_new_tokens for r in requests)
        prompts = {r.prompt.encode("utf-8", "replace").decode() for r in requests} | {ANSWER_SUFFIX}
        token_ids = self.preprocessor.tokenizer(list(prompts)).input_ids
        counts = dict(zip(prompts, map(len, token_ids), strict=True))
        prompt = max(counts.values())
        if any(r.follow_up for r in requests):  # its question is a part of the reply
            prompt = max(prompt, reply + counts[ANSWER_SUFFIX])
        needed = self._max_visual_tokens() + prompt + reply + 8  # joined texts may split into other tokens
        rounded = -(-needed // LENGTH_STEP) * LENGTH_STEP
        return min(rounded, self.model.max_positions() or rounded)

    def _max_visual_tokens(self) -> int:
        edge, most = max(2000, int(self.preprocessor.pixels[1] ** 0.5) + 28), 0
        for size in ((edge, edge), (edge, edge * 3 // 4), (edge, edge // 4), (2, 380), (380, 2)):
            with contextlib.suppress(Exception):  # a shape that this processor refuses
                most = max(most, len(self._token_ids("", Image.new("RGB", size))))
        return most

    def _token_ids(self, prompt: str, image) -> list[int]:
        """By the model's own processor."""
        processor = self.preprocessor.processor
        return processor(text=[self.preprocessor.chat_text(prompt)], images=[image]).input_ids[0]

    def _render(self, prompt: str, image) -> dict:
        """What vLLM makes of prompt and image: the token ids, the image's patches."""
        text = self.preprocessor.chat_text(prompt)
        if families.tokenizer_options(self.preprocessor.processor, text) and self._adds_bos:
            text = text.removeprefix(self.preprocessor.tokenizer.bos_token)  # which would be there twice (Gemma 3)
        inputs = {"prompt": text, "multi_modal_data": {"image": image}}
        return self.model.engine.renderer.render_cmpl([inputs])[0]

    def prepare(self, request: Request, image) -> tuple[dict | None, str]:
        """(vLLM's input, ""), or (None, why the request cannot be sent)."""
        if holds_mark(request.prompt, self.preprocessor.marks):
            return None, MARK_IN_IT
        try:
            inputs = self._render(request.prompt, image)
        except Exception as error:
            if why := too_long(error):
                return None, why
            return None, f"{self._part_at_fault(image)}: the processor refuses it ({reason(error)})"
        length = len(inputs["prompt_token_ids"])
        if length >= self.model.length:
            # vLLM believes that it was sent what it has rendered, and would leave the image out of a shorter prompt.
            for digest in inputs.get("mm_hashes", {}).get("image", ()):
                self.model.engine.renderer.mm_processor_cache.invalidate(digest)
            return None, f"prompt: {length} tokens with the image are too long for --max-model-len {self.model.length}"
        if len(self.verified) < VERIFIED_IMAGES and image.size not in self.verified:
            self.verified.add(image.size)
            self._verify(request, image, inputs["prompt_token_ids"])
        return inputs, ""

    def _part_at_fault(self, image) -> str:
        """Which part of a request is refused. Raises InputError where a plain image and question are refused, too."""
        self.preprocessor.check()
        try:
            self._render(PLAIN_QUESTION, Image.new("RGB", (64, 64)))
        except Exception as error:
            raise InputError(f"{self.preprocessor.model_path}: its processor fails on a plain image: {error}") from None
        try:
            self._render(PLAIN_QUESTION, image)
            return "question"
        except Exception:
            return "image"

    def _verify(self, request: Request, image, rendered: list[int]) -> None:
        """Raise InputError where vLLM gives the image another number of visual tokens than the processor."""
        image_token = families.image_token_id(self.preprocessor.processor)
        counts = [
            sum(image_token is None or token == image_token for token in tokens)
            for tokens in (self._token_ids(request.prompt, image), rendered)
        ]
        if counts[0] != counts[1]:
            least, most = self.preprocessor.pixels
            tiles = f" --max-tiles {self.preprocessor.max_tiles}" if self.preprocessor.max_tiles else ""
            raise InputError(
                f"{self.preprocessor.model_path}: vLLM makes {counts[1]} visual tokens of {request.image_path}, "
                f"its processor {counts[0]} with --min-pixels {least} --max-pixels {most}{tiles}. Use --engine hf."
            )
