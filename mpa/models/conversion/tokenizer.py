"""Fast tokenizers from the files of a checkpoint: tokenizer.json, SentencePiece, tiktoken, or vocab and merges.

No code of the checkpoint runs. transformers 5 reads a SentencePiece model through its own classes, which differ from the
slow tokenizers of these checkpoints on every string; so a BPE with the same pieces and merges is built here.
"""

import base64
import binascii
from pathlib import Path

from mpa.files.records import InputError, read_json

FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")  # or *.tiktoken
SPACE = "▁"
# Classes that put a BOS token before a text unless tokenizer_config.json says otherwise.
WITH_BOS = ("InternLM2Tokenizer", "InternLM2TokenizerFast", "LlamaTokenizer", "LlamaTokenizerFast")
# StableLM-2's tokenizer (Arcade100k) has these in its code: how text is cut into words, and the special tokens.
STABLELM_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
STABLELM_TOKENS = [
    *("<|endoftext|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<gh_stars>", "<filename>"),
    *("<issue_start>", "<issue_comment>", "<issue_closed>", "<jupyter_start>", "<jupyter_text>", "<jupyter_code>"),
    *("<jupyter_output>", "<empty_output>", "<commit_before>", "<commit_msg>", "<commit_after>", "<reponame>"),
    *("<|endofprompt|>", "<|im_start|>", "<|im_end|>", "<|pause|>", *(f"<|reg{i}|>" for i in range(8)), "<|extra0|>"),
]


def has_tokenizer(folder: Path) -> bool:
    """Whether the folder holds a tokenizer that `load` reads."""
    return any((folder / name).is_file() for name in FILES) or _tiktoken_file(folder) is not None


def load(folder: Path):
    """The fast tokenizer of a checkpoint. Raises InputError if its files cannot be read, or mean something else here."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    settings = _object(folder / "tokenizer_config.json")
    tokens = {name: _text(settings.get(f"{name}_token")) for name in ("bos", "eos", "unk", "pad")}
    special = {f"{name}_token": token for name, token in tokens.items() if token}
    try:
        if (folder / "tokenizer.json").is_file():
            tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **special)
        elif (folder / "tokenizer.model").is_file():
            tokenizer = PreTrainedTokenizerFast(tokenizer_object=_sentencepiece(folder, settings), **special)
        elif ranks := _tiktoken_file(folder):
            special = {"eos_token": STABLELM_TOKENS[0], "pad_token": STABLELM_TOKENS[0]} | special
            tokenizer = PreTrainedTokenizerFast(tokenizer_object=_tiktoken(ranks), **special)
        else:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except InputError:
        raise
    except Exception as error:  # whatever a damaged file makes a parser raise
        raise InputError(f"{folder}: its tokenizer cannot be read ({type(error).__name__}: {error}).") from None
    tokenizer.clean_up_tokenization_spaces = False
    return tokenizer


def _object(path: Path) -> dict:
    content = read_json(path) if path.is_file() else {}
    return content if isinstance(content, dict) else {}


def _text(token) -> str | None:
    """A special token's text: a string, or an object with `content`."""
    return token.get("content") if isinstance(token, dict) else token


def _added_tokens(folder: Path, settings: dict) -> dict[int, dict]:
    """The tokens beside the vocabulary, by id: of tokenizer_config.json, else of added_tokens.json."""
    if decoder := settings.get("added_tokens_decoder"):
        return {int(number): token for number, token in decoder.items()}
    added = _object(folder / "added_tokens.json")
    return {number: {"content": token, "special": True} for token, number in added.items()}


def _sentencepiece(folder: Path, settings: dict):
    """A `tokenizers` BPE equal to the slow tokenizer over tokenizer.model."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers.convert_slow_tokenizer import import_protobuf

    proto = import_protobuf().ModelProto()
    proto.ParseFromString((folder / "tokenizer.model").read_bytes())
    if proto.trainer_spec.model_type != 2 or proto.normalizer_spec.remove_extra_whitespaces:
        raise InputError(f"{folder / 'tokenizer.model'}: only BPE models that keep all spaces can be converted.")
    vocabulary = {piece.piece: number for number, piece in enumerate(proto.pieces)}
    added = _added_tokens(folder, settings)
    added |= {
        n: {"content": p.piece, "special": True} for n, p in enumerate(proto.pieces) if p.type == 3 and n not in added
    }
    merges = _merges(vocabulary)
    vocabulary |= {token["content"]: number for number, token in added.items()}
    tokenizer = Tokenizer(
        models.BPE(
            vocabulary,
            merges,
            unk_token=proto.trainer_spec.unk_piece,
            fuse_unk=True,
            byte_fallback=proto.trainer_spec.byte_fallback,
        )
    )
    prefixed = proto.normalizer_spec.add_dummy_prefix and settings.get("add_prefix_space", True)
    # Without `legacy`, Llama's slow tokenizer puts the prefix before the text only, not behind each special token.
    at_start_only = "Llama" in settings.get("tokenizer_class", "") and not settings.get("legacy", True)
    steps = []
    if proto.normalizer_spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(proto.normalizer_spec.precompiled_charsmap))
    if prefixed and not at_start_only:
        steps.append(normalizers.Prepend(SPACE))
    if prefixed and at_start_only:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="first", split=False)
    else:
        steps.append(normalizers.Replace(Regex(" "), SPACE))
    tokenizer.normalizer = normalizers.Sequence(steps)
    first_space = [decoders.Strip(" ", 1, 0)] if prefixed else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *first_space]
    )
    for _, token in sorted(added.items()):
        flags = {name: bool(token.get(name)) for name in ("lstrip", "rstrip", "single_word")}
        mark = AddedToken(token["content"], normalized=False, special=bool(token.get("special")), **flags)
        (tokenizer.add_special_tokens if mark.special else tokenizer.add_tokens)([mark])
    _add_ends(tokenizer, settings)
    return tokenizer


def _merges(vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """All pairs of pieces that make a piece, in the order in which SentencePiece merges: by the id of the result."""
    found = [
        (number, piece[:cut], piece[cut:])
        for piece, number in vocabulary.items()
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    found.sort(key=lambda merge: (merge[0], vocabulary[merge[1]], vocabulary[merge[2]]))
    return [(left, right) for _, left, right in found]


def _add_ends(tokenizer, settings: dict) -> None:
    """Put BOS before, and EOS behind, each text, where the slow tokenizer does."""
    from tokenizers import processors

    bos, eos = (_text(settings.get(name)) for name in ("bos_token", "eos_token"))
    first = bos if settings.get("add_bos_token", settings.get("tokenizer_class") in WITH_BOS) else None
    last = eos if settings.get("add_eos_token", False) else None
    if ends := [token for token in (first, last) if token]:
        single = [*([first] if first else []), "$A", *([last] if last else [])]
        pair = [*single, *(f"{token}:1" for token in ([first] if first else [])), "$B:1"]
        pair += [f"{last}:1"] if last else []
        tokenizer.post_processor = processors.TemplateProcessing(
            single=" ".join(single),
            pair=" ".join(pair),
            special_tokens=[(end, tokenizer.token_to_id(end)) for end in ends],
        )


def _tiktoken_file(folder: Path) -> Path | None:
    return next(iter(sorted(folder.glob("*.tiktoken"))), None)


def _tiktoken(path: Path):
    """StableLM-2's tokenizer from its ranks; transformers finds the merges."""
    from tokenizers import AddedToken, normalizers
    from transformers.convert_slow_tokenizer import TikTokenConverter

    class Ranks(TikTokenConverter):
        load_tiktoken_bpe = staticmethod(_ranks)

        def extract_vocab_merges_from_model(self, tiktoken_url):
            vocabulary, merges = super().extract_vocab_merges_from_model(tiktoken_url)
            first = max(vocabulary.values()) + 2  # the original leaves one id free
            return vocabulary | {token: first + n for n, token in enumerate(STABLELM_TOKENS)}, merges

    tokenizer = Ranks(str(path), STABLELM_WORDS).converted()
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in STABLELM_TOKENS])
    return tokenizer


def _ranks(path: str) -> dict[bytes, int]:
    """Ranks by token. Raises InputError for a line that is not a base64 token and a number."""
    ranks = {}
    for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise InputError(f"{path}: line {number} is no token and its rank.") from None
    return ranks
