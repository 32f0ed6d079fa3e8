"""Types of command line arguments, for argparse: they raise its error for a value out of range."""

import argparse
import json
import re

# Fields of a request to a server that bound what it costs: --request-json may not hold them, at any depth.
_LIMITS = """
max_tokens max_completion_tokens max_new_tokens max_output_tokens max_length max_total_tokens max_gen_len max_tokens_to_sample
n_predict num_predict n best_of num_return_sequences num_generations num_beams candidate_count prediction
""".split()
# Fields that the stages set, or that choose another model or form of reply.
_OURS = """
model models fallbacks messages prompt input image images temperature top_p seed logprobs stream stream_options detail image_detail
tools functions modalities audio background web_search_options
""".split()
_SECRET = re.compile(r"api[_-]?key|authori[sz]ation|password|secret|credentials?|headers", re.IGNORECASE)


def number(least, most=None, kind=int, above: bool = False):
    """An argparse type: an int (or `kind`) from `least`, which `above` leaves out, to `most`."""

    def read(text: str):
        value = kind(text)
        if not (value > least or (value == least and not above)) or (most is not None and value > most):
            limit = f"{'more than' if above else 'at least'} {least}" + (
                f" and at most {most}" if most is not None else ""
            )
            raise argparse.ArgumentTypeError(f"must be {limit}")
        return value

    read.__name__ = kind.__name__  # for argparse's "invalid int value"
    return read


def path_map(text: str) -> tuple[str, str]:
    old, equals, new = text.partition("=")
    if not (old and equals and new):
        raise argparse.ArgumentTypeError("expected OLD=NEW, as in /workspace/data=/mnt/data")
    return old, new


def request_json(text: str) -> dict:
    """Further fields of each request to a server: a JSON object that bounds nothing and chooses no model. It is stored in files."""
    try:
        fields = json.loads(text, parse_constant=_no_number)
        json.dumps(fields).encode()
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"not JSON: {str(error)[:80]}") from None
    if not isinstance(fields, dict):
        raise argparse.ArgumentTypeError('must be a JSON object, such as \'{"reasoning_effort": "none"}\'')
    _check_fields(fields, outermost=True)
    return fields


def _no_number(name: str):
    raise ValueError(f"{name} is no JSON number")


def _check_fields(value, outermost: bool = False) -> None:
    """Raises ArgumentTypeError for a field that may not be set, here or further in."""
    for name, part in value.items() if isinstance(value, dict) else ():
        known = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower().replace("-", "_").strip()
        if known in _LIMITS:
            raise argparse.ArgumentTypeError(f"may not set {name!r}: the budget depends on it; use --max-new-tokens")
        if outermost and known in _OURS:
            raise argparse.ArgumentTypeError(f"may not set {name!r}: the stages set it")
        if _SECRET.search(name):
            raise argparse.ArgumentTypeError(
                f"may not set {name!r}: it is stored in files; a key belongs in $OPENAI_API_KEY"
            )
        _check_fields(part, outermost=outermost and known == "extra_body")
    for part in value if isinstance(value, list) else ():
        _check_fields(part)
