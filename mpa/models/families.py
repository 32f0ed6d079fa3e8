"""The model families: how an image becomes tokens, how a prompt is written, and where each family is tested.

A family is added here, in one place for stages and trainer. The functions below take a loaded processor; this module imports neither torch nor transformers.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import isqrt

# The paper's limits of pixels per image, for processors that accept such limits.
MIN_PIXELS = 128 * 28 * 28
MAX_PIXELS = 512 * 28 * 28
MAX_ROWS = 6  # SmolVLM and Idefics3 have a token for each tile, <row_1_col_1> to <row_6_col_6>

# Name prefixes of the vision tower and of the merger, which joins vision and language; all else is the language model.
# The merger may lie within the tower, so it is matched first.
QWEN = {"vision": ("visual.",), "merger": ("visual.merger.", "visual.deepstack_merger_list.")}
IDEFICS = {"vision": ("vision_model.",), "merger": ("connector.",)}
LLAVA = {"vision": ("vision_tower.",), "merger": ("multi_modal_projector.", "image_newline")}


@dataclass(frozen=True)
class Family:
    """One `model_type` of transformers, and what is known of it.

    `limit` is what a user can limit: "pixels" of the resized image, "tiles" that it is cut into, or nothing: "fixed".
    `max_tiles` is the default limit of tiles, where it is not the checkpoint's own. `parts` are the name prefixes of
    vision tower and merger. `shortcuts`: the hf engine's are tested to give a plain loop's replies (a second prompt
    reuses an image's KV cache, all images reuse the system prompt's, the last layer computes only the last column).
    `packing`: samples in one row do not see each other (--packing). `both_ways`: the tokens that also see what comes
    after them, by the model's `token_type_ids`; flash-attention knows no such mask. `prompt`: the form of a prompt.
    `overflows`: some of its checkpoints give NaN in float16, as their users report.
    `not_in_vllm`: why vLLM 0.32 does not give hf's replies in the tests; "" where it does. All are tested in hf, also
    in 4 bits, and in the trainer (PL), also with LoRA.
    """

    name: str
    limit: str
    parts: dict[str, tuple[str, ...]]
    max_tiles: int | None = None
    shortcuts: bool = True
    packing: bool = True
    both_ways: str = ""
    prompt: str = "chat template"
    overflows: bool = False
    not_in_vllm: str = ""


FAMILIES = {
    # float16: huggingface/transformers#33294; the last layers of the vision tower, ggml-org/llama.cpp#17534.
    "qwen2_vl": Family("Qwen2-VL", "pixels", QWEN, overflows=True),
    "qwen2_5_vl": Family("Qwen2.5-VL", "pixels", QWEN, overflows=True),
    "qwen3_vl": Family("Qwen3-VL", "pixels", QWEN, not_in_vllm="some replies differ"),
    # Three of four layers keep a state instead of key-values.
    "qwen3_5": Family(
        "Qwen3.5", "pixels", QWEN, shortcuts=False, packing=False, not_in_vllm="its CPU build has only bfloat16 for it"
    ),
    "idefics3": Family("Idefics3", "tiles", IDEFICS),
    "smolvlm": Family("SmolVLM", "tiles", IDEFICS),
    # The paper's L-VLM and S-VLMs are InternVL2, which its authors evaluate with at most 6 tiles.
    "internvl": Family("InternVL", "tiles", LLAVA, max_tiles=6),
    "llava": Family("LLaVA", "fixed", LLAVA),
    "llava_next": Family("LLaVA-NeXT", "tiles", LLAVA),  # Granite Vision, too
    "llava_onevision": Family("LLaVA-OneVision", "tiles", LLAVA),
    # In most layers a token sees only a window. float16: huggingface/transformers#36822; vLLM refuses it.
    "gemma3": Family(
        *("Gemma 3", "fixed", LLAVA),
        shortcuts=False,
        packing=False,
        overflows=True,
        both_ways="images",
        not_in_vllm="some replies differ",
    ),
    # Its convolution layers have states of their own, and reach from one sample of a packed row into the next.
    "lfm2_vl": Family(
        "LFM2-VL", "tiles", LLAVA, shortcuts=False, packing=False, not_in_vllm="it cannot read the configuration"
    ),
    "paligemma": Family(  # float16: PaliGemma 2 has Gemma 2's language model, for which vLLM refuses it
        "PaliGemma",
        "fixed",
        LLAVA,
        shortcuts=False,
        packing=False,
        overflows=True,
        both_ways="prompts",
        prompt="image, text, line break",
        not_in_vllm="it counts another number of image tokens, and is refused",
    ),
}


def image_settings(
    processor, model_type: str | None, min_pixels: int, max_pixels: int, max_tiles: int | None = None
) -> dict:
    """Attributes of the image processor, with the values that obey these limits; what it does not know is left out.

    `max_tiles` counts tiles without the global image (thumbnail), which comes in addition where an image is cut; None
    means the family's default, else the checkpoint's own. The same names are vLLM's `mm_processor_kwargs`.

    - Qwen: the two "edges" of `size` are areas, in pixels.
    - InternVL: `max_patches`.
    - SmolVLM, Idefics3: every image is enlarged to `longest_edge` and cut into squares of `max_image_size`; a longest
      edge of k squares gives at most k * k tiles.
    - LFM2-VL: `max_tiles`.
    - LLaVA-NeXT, LLaVA-OneVision: only grids of so few tiles. The model's configuration must name the same grids:
      `match_config`. Raises ValueError if there are none.
    """
    images = processor.image_processor
    if hasattr(images, "merge_size"):
        return {"size": {"shortest_edge": min_pixels, "longest_edge": max_pixels}}
    if hasattr(images, "max_patches"):
        default = FAMILIES[model_type].max_tiles if model_type in FAMILIES else None
        own = images.max_patches
        most = max_tiles or min(own, default or own)
        cuts = {"crop_to_patches": True} if type(processor).__name__ == "InternVLProcessor" else {}  # said for vLLM
        return {"max_patches": most, "min_patches": min(images.min_patches, most), **cuts}
    if max_tiles is None:
        return {}
    if hasattr(images, "max_image_size"):
        edge = images.max_image_size["longest_edge"] * min(isqrt(max_tiles), MAX_ROWS)
        return {"size": {"longest_edge": edge - edge % 2}}  # an odd edge would be rounded up, to one more tile
    if hasattr(images, "max_tiles"):
        return {"max_tiles": max_tiles, "min_tiles": min(images.min_tiles, max_tiles)}
    if hasattr(images, "image_grid_pinpoints"):
        edge = _edge(images)
        tiles = [height // edge * (width // edge) for height, width in images.image_grid_pinpoints]
        if max_tiles < min(tiles):
            raise ValueError(f"max-tiles {max_tiles}: its processor cuts every image into {min(tiles)} tiles or more.")
        kept = [grid for grid, n in zip(images.image_grid_pinpoints, tiles, strict=True) if n <= max_tiles]
        return {"image_grid_pinpoints": kept}
    return {}


def use_original_pixels(processor, path: str) -> None:
    """Resize on PIL, to the original code's pixels, where a conversion of an original checkpoint asks for it.

    transformers selects the image processor on tensors, which differs by 1 to 2 of 255, at edges by up to 16.
    """
    if getattr(processor.image_processor, "original_backend", "") == "pil":
        from transformers import AutoImageProcessor

        processor.image_processor = AutoImageProcessor.from_pretrained(path, backend="pil")


def apply_limits(
    processor, model_type: str | None, min_pixels: int, max_pixels: int, max_tiles: int | None = None
) -> None:
    """Have the processor obey the limits; see `image_settings`."""
    settings = image_settings(processor, model_type, min_pixels, max_pixels, max_tiles)
    for name, value in settings.items():
        setattr(processor.image_processor, name, value)


def tile_limit(model_type: str | None, max_tiles: int | None) -> int | None:
    """The limit of tiles that decides a result, for its settings; None if there is none."""
    family = FAMILIES.get(model_type)
    if family is None:
        return max_tiles
    return max_tiles or family.max_tiles if family.limit == "tiles" else None


def match_config(config, processor) -> None:
    """Give a model's configuration the processor's grids of tiles (LLaVA-NeXT, LLaVA-OneVision), which it counts by."""
    grids = getattr(processor.image_processor, "image_grid_pinpoints", None)
    if grids and hasattr(config, "image_grid_pinpoints"):
        config.image_grid_pinpoints = [list(grid) for grid in grids]


LIMITED_BY = {
    "pixels": "the area of its images is limited",
    "tiles": "the tiles of its images are limited",
    "fixed": "each image has the same number of tokens",
}


def said_of_limits(model_type: str | None, min_pixels: int, max_pixels: int, max_tiles: int | None) -> str:
    """One line about limits that the user has set and that this family does not know; "" if there are none."""
    family = FAMILIES.get(model_type)
    if family is None:
        return ""
    names = []
    if family.limit != "pixels":
        names += ["--min-pixels"] * (min_pixels != MIN_PIXELS) + ["--max-pixels"] * (max_pixels != MAX_PIXELS)
    names += ["--max-tiles"] * (max_tiles is not None and family.limit != "tiles")
    has = "has" if len(names) == 1 else "have"
    said = f"{' and '.join(names)} {has} no effect for {model_type}: {LIMITED_BY[family.limit]}."
    return said if names else ""


def said_of_unknown(model_type: str | None) -> str:
    """One line about a model that is not in the table; "" for one that is."""
    if model_type in FAMILIES:
        return ""
    return (
        f"warning: model type {model_type} is not in the table of families (python -m mpa.models --families): its first reply is "
        "compared with transformers' own; that limits of pixels or tiles are obeyed, and the names of its parts are not tested."
    )


def attends_both_ways(processor) -> str:
    """`Family.both_ways` of the processor's family."""
    kinds = {"Gemma3Processor": "gemma3", "PaliGemmaProcessor": "paligemma"}
    kind = kinds.get(type(processor).__name__)
    return FAMILIES[kind].both_ways if kind in FAMILIES else ""


def writes_prefix(processor) -> bool:
    """Whether the prompt has PaliGemma's form: no chat template, but the images, a question and a line break."""
    return type(processor).__name__ == "PaliGemmaProcessor" and not processor.chat_template


def tokenizer_options(processor, text: str) -> dict:
    """How a prompt is to be tokenised: without a second start token where the chat template has written one.

    As transformers' own `apply_chat_template(tokenize=True)`. Idefics3 has always been asked with two here.
    """
    bos = getattr(processor.tokenizer, "bos_token", None)
    has_one = bos and text.startswith(bos) and type(processor).__name__ != "Idefics3Processor"
    return {"add_special_tokens": False} if has_one else {}


def chat_text(processor, messages: list[dict], add_generation_prompt: bool = True) -> str:
    """A conversation in the processor's chat template; for PaliGemma its only message, as its processor takes it.

    Raises ValueError, with the turn, where the template refuses the conversation or drops a turn's text.
    """
    if writes_prefix(processor):
        (message,) = messages
        return "".join(part.get("text", processor.image_token) for part in message["content"])
    from jinja2 import TemplateError

    try:
        text = processor.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, tokenize=False)
    except (TemplateError, TypeError) as error:  # one that takes text alone
        raise ValueError(f"the model's chat template refuses the conversation ({error}); change its turns") from None
    written = "".join(text.split())
    for number, message in enumerate(messages, 1):
        for part in message["content"]:
            if part["type"] == "text" and "".join(part["text"].split()) not in written:
                raise ValueError(
                    f"turn {number} ({message['role']}): the model's chat template drops its text, "
                    f"{part['text'][:40]!r}. Put it into a question, or remove it"
                )
    return text


def form(messages: list[dict]) -> tuple:
    """A conversation without its texts: the roles, and the kinds of their parts."""
    return tuple((message["role"], *(part["type"] for part in message["content"])) for message in messages)


def check_template(processor, messages: list[dict]) -> None:
    """Raise ValueError, with the turn, where the chat template drops a turn of conversations of this `form`.

    With numbers for texts: a short text may be found elsewhere in the prompt.
    """
    if not writes_prefix(processor):
        numbered = []
        for i, (role, *kinds) in enumerate(form(messages)):
            texts = ({"text": f"7{i:03}0{j:03}7"} if kind == "text" else {} for j, kind in enumerate(kinds))
            numbered.append({"role": role, "content": [{"type": k} | t for k, t in zip(kinds, texts, strict=True)]})
        chat_text(processor, numbered, add_generation_prompt=messages[-1]["role"] == "user")


def image_token_id(processor) -> int | None:
    """The id of the token that stands for an image's features. Gemma 3's processor has another one in its place."""
    ids = getattr(processor, "image_token_ids", None) or [getattr(processor, "image_token_id", None)]
    return ids[0]


def visual_tokens(processor, width: int, height: int) -> int | None:
    """The number of image tokens that the processor makes of an image of this size; None if it cannot be told.

    Raises ValueError for a shape that the processor refuses.
    """
    try:
        return _visual_tokens(processor, width, height)
    except (AttributeError, KeyError, TypeError):  # of a model type outside the table
        return None


def _visual_tokens(processor, width: int, height: int) -> int | None:
    images = processor.image_processor
    if hasattr(images, "merge_size"):
        return images.get_number_of_image_patches(height, width, {}) // images.merge_size**2
    if hasattr(images, "max_image_size"):
        tiles, _, _ = images.get_number_of_image_patches(height, width, {})
        return max(1, tiles) * processor.image_seq_len
    if hasattr(images, "max_patches"):
        (tiles,) = processor._get_num_multimodal_tokens(image_sizes=[(height, width)])["num_image_patches"]
        return tiles * processor.image_seq_length
    if hasattr(images, "max_tiles"):
        return _lfm2_tokens(images, width, height)
    if hasattr(images, "image_grid_pinpoints"):
        edge = _edge(images)
        features = processor._get_number_of_features(height, width, edge, edge)
        return features - (processor.vision_feature_select_strategy == "default")
    if hasattr(processor, "_get_num_multimodal_tokens"):
        return processor._get_num_multimodal_tokens(image_sizes=[(height, width)])["num_image_tokens"][0]
    return None


def _edge(images) -> int:
    """The edge of a square tile (LLaVA-NeXT, LLaVA-OneVision), in pixels."""
    crop = getattr(images, "crop_size", None)
    size = crop if crop and crop.get("height") else images.size
    return size["height"] if size.get("height") else size["shortest_edge"]


def _lfm2_tokens(images, width: int, height: int) -> int:
    """LFM2-VL's: those of the resized image, and of its tiles where it is large."""
    patch, factor = images.encoder_patch_size, images.downsample_factor
    limits = {"encoder_patch_size": patch, "downsample_factor": factor, "max_image_tokens": images.max_image_tokens}
    wide, high = images.smart_resize(height, width, min_image_tokens=images.min_image_tokens, **limits)
    whole = -(-(wide // patch) // factor) * -(-(high // patch) // factor)
    is_large = images._is_image_too_large(height, width, max_pixels_tolerance=images.max_pixels_tolerance, **limits)
    splits = images.do_image_splitting and not images.min_tiles == images.max_tiles == 1
    if not (is_large and splits):
        return whole
    *_, tiles = images._get_grid_layout(height, width, images.min_tiles, images.max_tiles, images.tile_size)
    if tiles == 1:
        return whole
    if whole * factor**2 > images.max_num_patches:  # the processor cannot stack it with its tiles
        raise ValueError(f"an image of {width} x {height} pixels is too long for it")
    return tiles * (-(-(images.tile_size // patch) // factor)) ** 2 + (whole if images.use_thumbnail else 0)


def table(version: str) -> Iterable[str]:
    """The lines of the table of families. `version` is that of transformers."""
    head = (
        "model type",
        "family",
        "images limited by",
        "prompt",
        "shortcuts",
        "packing",
        "hf",
        "4-bit",
        "PL",
        "LoRA",
        "vllm",
    )
    rows = [head]
    for model_type, family in FAMILIES.items():
        default = f", {family.max_tiles} by default" if family.max_tiles else ""
        limit = "nothing" if family.limit == "fixed" else family.limit
        has = (family.shortcuts, family.packing, True, True, True, True)
        vllm = f"- {family.not_in_vllm}" if family.not_in_vllm else "yes"
        rows.append(
            (model_type, family.name, limit + default, family.prompt, *("yes" if it else "-" for it in has), vllm)
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    yield f"Families tested with transformers {version} in hf and in the trainer (PL), and with vLLM 0.32 against hf."
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
    yield "openai sends the image itself to any model behind a server. Other model types are tried, with a warning."
