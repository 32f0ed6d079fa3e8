"""What an error of a server means to the `openai` engine: for this request, for a parameter, or for the whole run.

An error is classified by its code, its words and its status together: a 403 may be one flagged image or an account without
credit, and a refused value of a parameter is not a refused parameter. The words are those of OpenAI, Azure, Anthropic, Gemini,
vLLM, SGLang, TGI, llama.cpp, LiteLLM and servers that check requests with pydantic.
"""

import json
import re
from collections.abc import Callable, Mapping

from mpa.engines.responses import Refused, Retryable, Unsupported, decoded, retry_after
from mpa.files.records import InputError, without_secrets

# The whole account is refused, by the error's code or type …
_ACCOUNT_CODE = re.compile(
    r"\b(?:insufficient_(?:\w+_)?(?:quota|credits?|funds|balance)|exceeded_current_quota\w*|billing_\w+|account_\w+|"
    r"access_terminated|invalid_api_key|model_not_found|payment_required|budget_exceeded)\b",
    re.IGNORECASE,
)
# … or its words, which are no proof of their own: an image may be of a bill, a rate limit may advise to add a payment method.
_ACCOUNT_WORDS = re.compile(
    r"insufficient[_ ]quota|payment required|(?:insufficient|not enough|out of|no) (?:credits?|funds|balance)|"
    r"credit balance|spend(?:ing)? limit|hard[_ ]limit|budget has been exceeded|"
    r"account.{0,30}(?:deactivated|disabled|suspended|terminated)|access[_ ]terminated|"
    r"invalid[_ ]api[_ ]key|incorrect api key|api key not valid",
    re.IGNORECASE,
)
# This one request is refused, and will be refused again.
_FLAGGED = re.compile(
    r"content[_ ](?:policy|filter|management)|moderation|safety|flagged|responsible ?ai|inappropriate|disallowed|"
    r"policy[_ ]violation|invalid[_ ]image|image[_ ](?:parse|content|too)|unsupported[_ ]image",
    re.IGNORECASE,
)

# Parameters that a model may not take, the least important first, and those that have another name.
PARAMETERS = ("detail", "top_p", "seed", "logprobs", "temperature", "max_completion_tokens", "max_tokens")
LIMITS = {"max_completion_tokens": "max_tokens", "max_tokens": "max_completion_tokens"}
# A value is refused …
_VALUE = re.compile(
    r"too (?:large|long|big|high|small|low|many)|context[_ ](?:length|window|size)|out of range|exceed|invalid|not (?:a )?valid|"
    r"(?:must|should|has to|have to|needs? to|cannot|can ?not|can't|may|can) (?:only )?be|between|above|below|minimum|maximum|"
    r"(?:less|greater|more|larger|smaller|bigger|higher|lower|longer) than|at (?:least|most)|strictly|range|\bgot\b(?! an unexpected)|"
    r"unsupported_value|number_|_type\b|less_than|greater_than|cannot both",
    re.IGNORECASE,
)
# … unless any other would be, too.
_ONLY_DEFAULT = re.compile(r"only (?:the )?(?:default|temperature ?=)", re.IGNORECASE)
_NOT_TAKEN = re.compile(
    r"unsupported|not (?:supported|allowed|permitted|accepted)|does(?: not|n't) support", re.IGNORECASE
)
_UNKNOWN_CODE = re.compile(
    r"unsupported_parameter|unknown_parameter|unrecognized_parameter|extra_forbidden", re.IGNORECASE
)
_EXTRA = re.compile(r"extra_forbidden|extra (?:inputs|fields) (?:are )?not permitted|additional propert", re.IGNORECASE)
_KIND = (
    r"(?:request |keyword |query |body |input )?(?:parameter|param|argument|arg|field|key|name|propert|option|input)\w*"
)
_NOT = r"(?:not|n't|n’t|never)"
_REFUSED = r"(?:support|accept|take|allow|permit|recogni[sz]e|request|provide|implement|know|have|use)"


def _clauses(name: str) -> re.Pattern:
    """The clauses by which a message says that the parameter is not known or not supported at all, whatever its value."""
    named, no_value = rf"(?<![\w-]){name}(?![\w-])", r"""(?!['"`]?\s*(?:=|:|of|to|is)?\s*-?\d)"""
    return re.compile(
        rf"(?:unsupported|unrecogni[sz]ed|unknown|unexpected) {_KIND}[^.]{{0,60}}?{named}"
        rf"|(?:{_NOT} (?:\w+ )?{_REFUSED}\w*) (?:\w+ )?{_KIND}[^.]{{0,60}}?{named}"
        rf"|{named}{no_value}[^.;\d]{{0,60}}?(?:(?:{_NOT} (?:\w+ )?(?:{_REFUSED}\w*|available|enabled|recogni[sz]ed|valid parameter))"
        rf"|unsupported|unexpected|deprecated|no longer)"
        rf"|{_NOT} (?:\w+ ){{0,2}}{_REFUSED}\w*\b[^.;]{{0,60}}?{named}{no_value}"
        rf"|remove (?:the )?(?:parameters? )?['\"`]?{named}",
        re.IGNORECASE,
    )


_CLAUSES = {name: _clauses(name) for name in PARAMETERS}


def classify_error(status: int, headers: Mapping, text: str, sent: dict, redact: Callable) -> Exception:
    """Unsupported, InputError (ends the run), Refused or Retryable. `sent` are the parameters of the request."""
    message, code, param = _said(text, redact)
    says = without_secrets(f"{status}: {message}")[:500]
    flagged = _FLAGGED.search(f"{code} {message}")
    about_parameters = status in (400, 403, 422, 501) and (param in sent or not flagged)
    if about_parameters and (found := _refused_parameter(message, code, param, sent)):
        name, only_value = found
        return Refused(says) if only_value and name in LIMITS else Unsupported(says, name, only_value)
    account = _ACCOUNT_WORDS.search(f"{code} {message}")
    if status in (401, 402, 407) or (status < 500 and _ACCOUNT_CODE.search(code)) or (status in (403, 429) and account):
        return InputError(says)
    if status in (408, 409, 425, 429) or status >= 500:
        return Retryable(says, retry_after(headers), rate_limit=status == 429)
    if flagged:
        return Refused(says)
    if status in (404, 405, 410) or account:
        return Refused(says, permanent=False, doubtful=True)
    # A model that thinks may have used up the limit, which is billed.
    return Refused(says, permanent=status != 403, billed="output limit was reached" in message)


def _said(text: str, redact: Callable) -> tuple[str, str, str]:
    """(message, code and type, param) of an error's body, whatever its shape."""
    try:
        body = decoded(text, redact)
    except ValueError:
        return " ".join(redact(text).split())[:300] or "no message", "", ""
    body = body[0] if isinstance(body, list) and body else body
    if isinstance(body, dict) and isinstance(body.get("error"), dict | str):
        body = body["error"] if isinstance(body["error"], dict) else {**body, "message": body["error"]}
    if not isinstance(body, dict):
        body = {"message": body}
    message = next((body[name] for name in ("message", "detail", "msg", "title") if body.get(name)), body)
    message = message["detail"] if isinstance(message, dict) and message.get("detail") else message
    message = message if isinstance(message, str) else json.dumps(message, ensure_ascii=False)
    code = " ".join(str(body.get(name) or "") for name in ("code", "type", "status", "error_type"))
    return " ".join(message.split()), code, str(body.get("param") or "")


def _refused_parameter(message: str, code: str, param: str, sent: dict) -> tuple[str, bool] | None:
    """(the parameter that the error names, of those that were sent, whether only its value is refused); None for none."""
    only_default = _ONLY_DEFAULT.search(message)
    value = (_VALUE.search(message) or _VALUE.search(code)) and not only_default
    named = [name for name in PARAMETERS if name in sent and _names(name, message, param)]
    for name in named:
        said = only_default or _EXTRA.search(message) or _CLAUSES[name].search(message)
        if (said and not (value and name in LIMITS)) or (param == name and _UNKNOWN_CODE.search(code)):
            return name, False
    named.sort(key=lambda name: name not in LIMITS)  # first a limit, which is never left out
    return (named[0], True) if named and (value or _NOT_TAKEN.search(message)) else None


def _names(name: str, message: str, param: str) -> bool:
    """Does the error name the parameter? "detail" is also a word."""
    word, quoted = rf"(?<![\w-]){name}(?![\w-])", r"""['"`.]""" if name == "detail" else ""
    return bool(re.search(word, param) or re.search(quoted + word, message, re.IGNORECASE))


def causes(error: BaseException) -> list[BaseException]:
    """The exception, what caused it, and so on."""
    found = [error]
    while error := (getattr(error, "exceptions", None) or [error.__cause__ or error.__context__])[0]:
        found.append(error)
    return found


def may_have_arrived(error: Exception) -> bool:
    """Whether a request may have reached the server, and be billed, before its connection failed."""
    names = [type(cause).__name__ for cause in causes(error)[1:]]
    return not any(name.startswith("Connect") and name != "ConnectionResetError" for name in names)
