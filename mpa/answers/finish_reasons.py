"""Why a reply ended: the words of all servers and engines in one table, for all stages.

Words are compared without case, dashes and underscores: endTurn, END_TURN.
"""

import re

_STOP = """
stop, stopped, eos, eos_token, eos_token_id, eos_found, eog, end, end_turn, end_of_turn, end_of_text, end_of_sequence, end_of_message,
im_end, stop_sequence, stop_sequences, stop_token, stop_tokens, stop_token_id, stop_token_ids, stop_str, stop_string, stop_word, word,
stop_criteria, stop_reason, matched_stop, complete, completed, finish, finished, done, success, ok, normal, unspecified, null, none
"""
_LENGTH = """
length, max_tokens, max_token, max_length, max_len, max_new_tokens, max_output_tokens, max_completion_tokens, maximum_tokens, limit,
length_limit, token_limit, output_limit, limit_reached, token_limit_reached, max_tokens_reached, max_tokens_exceeded, num_predict,
n_predict, max_context, model_length, context_length, context_length_exceeded, context_window_exceeded,
model_context_window_exceeded, error_limit, truncated, incomplete, not_finished, unfinished
"""
_FILTER = """
content_filter, content_filtered, content_policy, content_policy_violation, filtered, filter, safety, image_safety,
recitation, image_recitation, blocklist, blocked, prohibited_content, image_prohibited_content, spii, refusal, sensitive, moderation,
guardrail, guardrails, guardrail_intervened, guardrails_intervened, model_armor, error_toxic, language
"""
_TOOL = """
tool_calls, tool_call, tool_use, function_call, function_calls, malformed_function_call, unexpected_tool_call,
too_many_tool_calls, pause_turn
"""
# The server broke the reply off: asked again, it may reply.
_ERROR = """
error, abort, aborted, cancel, canceled, cancelled, user_cancel, insufficient_system_resource, network_error, internal_error, timeout,
time_limit, max_time, interrupted, preempted, overloaded, load, unload
"""
_APART = re.compile(r"[\W_]+")
_TABLE = {
    _APART.sub("", word): kind
    for kind, words in {
        "stop": _STOP,
        "length": _LENGTH,
        "content_filter": _FILTER,
        "tool_calls": _TOOL,
        "error": _ERROR,
    }.items()
    for word in words.split(",")
}
_CUT = {
    "length": "cut off at the token limit",
    "content_filter": "stopped by the content filter",
    "tool_calls": "ended by a call of a tool",
    "error": "broken off by the server",
}


def canonical(reason) -> str:
    """ "stop", "length", "content_filter", "tool_calls" or "error"; an unknown word as it is. No reason is "stop".

    >>> canonical("MAX_TOKENS"), canonical("endTurn"), canonical("FinishReason.SAFETY"), canonical(None), canonical("tired")
    ('length', 'stop', 'content_filter', 'stop', 'tired')
    """
    reason = reason.get("type") if isinstance(reason, dict) else reason
    if reason is None:
        return "stop"
    said = reason if isinstance(reason, str) else repr(reason)
    word = _APART.sub("", said.rpartition(".")[2]).lower()
    return (
        _TABLE.get(word.removeprefix("finish").removeprefix("reason"), _TABLE.get(word, said[:60]))
        if said.strip()
        else "stop"
    )


def is_known(reason) -> bool:
    return canonical(reason) in _TABLE.values()


def why_cut(reason) -> str | None:
    """Why a reply with this finish reason is incomplete, or may be; None where it is complete."""
    kind = canonical(reason)
    return None if kind == "stop" else _CUT.get(kind, f"ended for a reason that is not known, {kind!r}")
