"""Train files in the common formats, converted to one form: images and turns.

LLaVA       {"id", "image": path or paths, "conversations": [{"from": "human", "value": "<image>\\n…"}, {"from": "gpt", "value"}]}
ShareGPT    {"conversations": […], "images": […]}
messages    {"messages": [{"role": "user", "content": text or parts}, {"role": "assistant", …}], "images": […]}

A file is a JSON list of records, an object {"data": [...]}, or JSON Lines. An image is a path or {"path": …}. Videos,
tools and embedded images are refused: the model would be trained on such a record without seeing them.
"""

import contextlib
import json
import math
from pathlib import Path

IMAGE = "<image>"
ROLES = {"human": "user", "user": "user"}
ROLES |= dict.fromkeys(("gpt", "assistant", "model", "bard", "chatgpt", "bing"), "assistant") | {"system": "system"}
UNSUPPORTED = ("video", "videos", "audio", "audios", "tools", "objects")
TURNS = ("conversations", "messages", "conversation")


class DataError(Exception):
    """An error that the user can correct. The message names the place (flag, or file and record) and the remedy."""


def loads(text: str):
    """A JSON document. Raises ValueError for text that is none, as it is for one with NaN or infinity."""
    return json.loads(text, parse_constant=_refuse, parse_float=_finite)


def _refuse(constant: str):
    raise _NotFinite(f"{constant} is no number of JSON")


def _finite(number: str) -> float:
    value = float(number)
    return value if math.isfinite(value) else _refuse(number)


class _NotFinite(ValueError):
    """NaN, Infinity or a number like 1e999, which Python reads and JSON does not have."""


def _refuse_record(path: str, text: str, error: _NotFinite) -> None:
    """Raises DataError for the first record with NaN or infinity, if the text is a JSON list."""
    with contextlib.suppress(ValueError):
        content = json.loads(text)
        for number, record in enumerate(content if isinstance(content, list) else ()):
            try:
                json.dumps(record, allow_nan=False)
            except ValueError:
                where = f"{path}, record {number}"
                read_record(record, where, number)  # it says more of a field that it knows
                raise DataError(f"{where}: {error}. Correct it, or remove the record.") from None


def read_records(path: str) -> list:
    """The records of a train file, unchecked. Raises DataError if the file cannot be read or has none."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file. Run PI.sh first, or name the file with --data_path.") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as text ({error}). Write it again, in UTF-8.") from None
    try:
        content = loads(text)
    except (ValueError, RecursionError) as error:
        if isinstance(error, _NotFinite):
            _refuse_record(path, text, error)
        content = _json_lines(path, text, error)
    if isinstance(content, dict):
        is_record = any(name in content for name in TURNS)
        content = [content] if is_record else content.get("data")
    if not isinstance(content, list) or not content:
        raise DataError(f"{path}: contains no samples; expected a list of records.")
    return content


def _json_lines(path: str, text: str, error: Exception) -> list:
    """The records of JSON Lines. `error` says why `text` is not one JSON document."""
    lines, records = [line for line in text.split("\n") if line.strip()], []
    if not lines:
        raise DataError(f"{path}: not JSON (it is empty). Write it again.")
    for number, line in enumerate(lines):
        try:
            records.append(loads(line))
        except (ValueError, RecursionError) as line_error:
            if not isinstance(line_error, _NotFinite) and not (records and isinstance(records[0], dict)):
                reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error).split(";")[0]
                raise DataError(f"{path}: not JSON ({reason}). Write it again.") from None
            raise DataError(
                f"{path}, line {number + 1}: not JSON ({str(line_error).split(';')[0]}). Write it again."
            ) from None
    return records


def read_record(record, where: str, number: int) -> dict:
    """A record as {"id", "images": [path], "turns": [(role, text)]}; the texts have one <image> mark per image.

    `number` is the id of a record without one. A record of messages with a list of images may have no marks: its
    images then precede the first question. Raises DataError, which begins with `where`, for anything else.
    """
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected an object with id, image and conversations, found {str(record)[:60]!r}.")
    for name in UNSUPPORTED:
        if record.get(name):
            raise DataError(f"{where}: training on {name!r} is not supported; remove it, or remove the record.")
    identifier = record.get("id", record.get("question_id", number))
    if not isinstance(identifier, str | int) or isinstance(identifier, bool):
        raise DataError(f"{where}: 'id' should be text or a whole number: {str(identifier)[:60]}.")
    named = [name for name in TURNS if name in record]
    if not named:
        raise DataError(f"{where}: missing 'conversations'; expected id, image and conversations of from and value.")
    turns, images_in_parts = _turns(record[named[0]], where)
    images = [*_images(record, where), *images_in_parts]
    marks = [text.count(IMAGE) for role, text in turns if role == "user"]
    if any(IMAGE in text for role, text in turns if role != "user"):
        raise DataError(f"{where}: {IMAGE} is in a turn that is not the user's; remove it.")
    if images and not any(marks) and "image" not in record and named[0] == "messages":
        first = next(i for i, (role, _) in enumerate(turns) if role == "user")
        turns[first] = ("user", IMAGE * len(images) + turns[first][1])
    elif sum(marks) != len(images):
        raise DataError(
            f"{where}: {len(images)} images, but {sum(marks)} {IMAGE} in the human turns; expected one for each image."
        )
    return {"id": identifier, "images": images, "turns": turns}


def _turns(turns, where: str) -> tuple[list[tuple[str, str]], list[str]]:
    """[(role, text)], and the images that parts of the turns name.

    Expects an optional system turn, then alternating user and assistant turns; no answer may be empty.
    """
    if not isinstance(turns, list):
        raise DataError(f"{where}: conversations should be a list of turns, found {str(turns)[:60]!r}.")
    images = []
    texts = [_turn(turn, images, where) for turn in turns]
    has_system = bool(texts) and texts[0][0] == "system"
    roles = [role for role, _ in texts[has_system:]]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise DataError(f"{where}: conversations must alternate human and gpt, starting with human.")
    if not all(text.strip() for role, text in texts if role == "assistant"):
        raise DataError(f"{where}: an answer is empty; there is nothing to learn from it.")
    return texts, images


def _turn(turn, images: list[str], where: str) -> tuple[str, str]:
    """(role, text) of a turn; images that its parts name are appended to `images`."""
    if not isinstance(turn, dict):
        raise DataError(f"{where}: a turn should be an object with from and value, found {str(turn)[:60]!r}.")
    role, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    if role not in ROLES:
        raise DataError(f"{where}: a turn of {role!r} is not supported; known are {', '.join(ROLES)}.")
    if isinstance(text, list):
        text = _parts(text, images, where)
    if not isinstance(text, str):
        raise DataError(f"{where}: a turn's value is not text; write it as a string.")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(f"{where}: a turn has half of a surrogate pair, which is not text; write it again.") from None
    return ROLES[role], text


def _parts(parts: list, images: list[str], where: str) -> str:
    """The text of a turn's parts, with a mark per image part; images that parts name are appended to `images`."""
    text = ""
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(part, str) or kind == "text":
            content = part if isinstance(part, str) else part.get("text")
            if not isinstance(content, str):
                raise DataError(f"{where}: a part of a turn has no text: {str(part)[:60]}.")
            text += content
        elif kind in ("image", "image_url"):
            text += IMAGE
            source = next((part[name] for name in ("image", "path", "url", "image_url") if part.get(name)), None)
            if source is not None:
                url = source["url"] if isinstance(source, dict) and "url" in source else source
                images.append(_path(url, where))
        else:
            raise DataError(f"{where}: a part of type {kind!r} is not supported; known are text and image.")
    return text


def _images(record: dict, where: str) -> list[str]:
    given = [name for name in ("image", "images") if record.get(name) not in (None, [], "")]
    if len(given) > 1:
        raise DataError(f"{where}: has both 'image' and 'images'; keep one.")
    if not given:
        return []
    images = record[given[0]]
    return [_path(image, where) for image in (images if isinstance(images, list) else [images])]


def _path(image, where: str) -> str:
    if isinstance(image, dict) and isinstance(image.get("path"), str) and not image.get("bytes"):
        image = image["path"]
    if not isinstance(image, str) or not image or "\0" in image or image.startswith(("data:", "http://", "https://")):
        raise DataError(
            f"{where}: image is neither a path nor a list of paths: {str(image)[:60]!r}. Write the image to a file."
        )
    return image.removeprefix("file://")
