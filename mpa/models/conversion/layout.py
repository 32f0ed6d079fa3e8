"""What a conversion needs to know of a checkpoint, and what the layouts share."""

from collections.abc import Callable
from dataclasses import dataclass, field

from mpa.files.records import InputError
from mpa.models.conversion.checkpoint import Checkpoint


@dataclass(frozen=True)
class Layout:
    """An original checkpoint in native terms.

    `config` is the native configuration but for the ids of tokens. `sources` are the checkpoints that hold the tensors,
    each with the renaming of a stored tensor. `processor(tokenizer, chat_template)` makes the native processor.
    """

    config: dict
    sources: list[tuple[Checkpoint, Callable]]
    image_token: str
    image_token_id: int | None  # where the user gave it, for a checkpoint without a tokenizer
    end_of_turn: str | None  # the token that ends a reply; None: the tokenizer's own end token
    chat_template: Callable[[str], str]  # of the token that ends a reply
    processor: Callable
    named_tokens: dict[str, str] = field(default_factory=dict)  # tokens that the processor asks its tokenizer for
    video_token: str | None = None  # an unused token that the processor wants, too
    end_token_id: int | None = None  # of the original configuration; used without a tokenizer
    notes: tuple[str, ...] = ()  # for the user


def refuse(checkpoint: Checkpoint, name: str, value, why: str):
    """Raise InputError for a setting that cannot be represented natively."""
    raise InputError(f"{checkpoint.folder / 'config.json'}: {name} is {value!r}; {why}. It cannot be converted.")


def layers_as_stored(checkpoint: Checkpoint, part: dict, pattern: str) -> int:
    """The number of stored layers. Raises InputError if the configuration says another."""
    stored, said = checkpoint.count(pattern), part["num_hidden_layers"]
    if stored != said:
        raise InputError(
            f"{checkpoint.folder}: config.json says {said} layers, the weights hold {stored} ({pattern}). "
            "Download the checkpoint again."
        )
    return stored


def text_config(original: dict, model_type: str, layers: int) -> dict:
    """The fields that all text models share."""
    fields = (
        *("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"),
        *("hidden_act", "max_position_embeddings", "rms_norm_eps", "attention_bias", "attention_dropout"),
        *("resid_pdrop", "embd_pdrop", "initializer_range", "tie_word_embeddings", "head_dim", "mlp_bias"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "qk_layernorm", "layer_norm_eps"),
        *("use_qkv_bias", "use_parallel_residual"),
    )
    kept = {name: original[name] for name in fields if original.get(name) is not None}
    return {"tie_word_embeddings": False, **kept, "model_type": model_type, "num_hidden_layers": layers}


def refuse_other_attention(checkpoint: Checkpoint, part: str, text: dict, scalings: tuple[str, ...]) -> None:
    """Raise InputError for an attention that the native text model would not compute as the original does.

    `scalings` are the kinds of `rope_scaling` that the original class knows.
    """
    if text.get("use_sliding_window"):
        refuse(checkpoint, f"{part}use_sliding_window", text["use_sliding_window"], "sliding windows are not known")
    if text.get("rope_scaling") and _scaling(text) not in scalings:
        known = f"known are {', '.join(scalings)}" if scalings else "the original class does not use it"
        refuse(checkpoint, f"{part}rope_scaling", text["rope_scaling"], known)


def _scaling(text: dict) -> str:
    scaling = text.get("rope_scaling") or {}
    return scaling.get("rope_type") or scaling.get("type") or "default"


def rope(text: dict) -> dict:
    """The native `rope_parameters` of a text model's configuration."""
    scaling = {
        name: value for name, value in (text.get("rope_scaling") or {}).items() if name not in ("type", "rope_type")
    }
    kind = _scaling(text)
    parameters = {"rope_type": "longrope" if kind == "su" else kind, "rope_theta": text.get("rope_theta", 10000.0)}
    if parameters["rope_type"] == "longrope":
        parameters["original_max_position_embeddings"] = text.get("original_max_position_embeddings", 4096)
    return parameters | scaling
