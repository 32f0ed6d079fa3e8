"""Train files in the common formats, converted to one form: images and turns.

LLaVA       {"id", "image": path or paths, "conversations": [{"from": "human", "value": "<image>\\n…"}, {"from": "gpt", "value"}]}
ShareGPT    {"conversations": […], "images": […]}
messages    {"messages": [{"role": "user", "content": text or parts}, {"role": "assistant", …}], "images": […]}

A file is a JSON list of records, an object {"data": [...]}, or JSON Lines. An image is a path or {"path": …}. Videos,
tools and embedded images are refused: the model would be trained on such a record without seeing them.
"""

from pathlib import Path

from mpa.files.records import InputError, read_json

IMAGE = "<image>"
ROLES = {"human": "user", "user": "user"}
ROLES |= dict.fromkeys(("gpt", "assistant", "model", "bard", "chatgpt", "bing"), "assistant") | {"system": "system"}
UNSUPPORTED = ("video", "videos", "audio", "audios", "tools", "objects")
TURNS = ("conversations", "messages", "conversation")


def read_records(path: str) -> list:
    """The records of a train file, unchecked. Raises InputError if the file cannot be read or has none."""
    if not Path(path).exists():
        raise InputError(f"{path}: no such file. Run PI.sh first, or name the file with --data_path.")
    content = read_json(path)
    if isinstance(content, dict):
        is_record = any(name in content for name in TURNS)
        content = [content] if is_record else content.get("data")
    if not isinstance(content, list) or not content:
        raise InputError(f"{path}: contains no samples; expected a list of records.")
    return content


def read_record(record, where: str, number: int) -> dict:
    """A record as {"id", "images": [path], "turns": [(role, text)]}; the texts have one <image> mark per image.

    `number` is the id of a record without one. A record of messages with a list of images may have no marks: its
    images then precede the first question. Raises InputError, which begins with `where`, for anything else.
    """
    if not isinstance(record, dict):
        raise InputError(f"{where}: expected an object with id, image and conversations, found {str(record)[:60]!r}.")
    for name in UNSUPPORTED:
        if record.get(name):
            raise InputError(f"{where}: training on {name!r} is not supported; remove it, or remove the record.")
    identifier = record.get("id", record.get("question_id", number))
    if not isinstance(identifier, str | int) or isinstance(identifier, bool):
        raise InputError(f"{where}: 'id' should be text or a whole number: {str(identifier)[:60]}.")
    named = [name for name in TURNS if name in record]
    if not named:
        raise InputError(f"{where}: missing 'conversations'; expected id, image and conversations of from and value.")
    turns, images_in_parts = _turns(record[named[0]], where)
    images = [*_images(record, where), *images_in_parts]
    marks = [text.count(IMAGE) for role, text in turns if role == "user"]
    if any(IMAGE in text for role, text in turns if role != "user"):
        raise InputError(f"{where}: {IMAGE} is in a turn that is not the user's; remove it.")
    if images and not any(marks) and "image" not in record and named[0] == "messages":
        first = next(i for i, (role, _) in enumerate(turns) if role == "user")
        turns[first] = ("user", IMAGE * len(images) + turns[first][1])
    elif sum(marks) != len(images):
        raise InputError(
            f"{where}: {len(images)} images, but {sum(marks)} {IMAGE} in the human turns; expected one for each image."
        )
    return {"id": identifier, "images": images, "turns": turns}


def _turns(turns, where: str) -> tuple[list[tuple[str, str]], list[str]]:
    """[(role, text)], and the images that parts of the turns name.

    Expects an optional system turn, then alternating user and assistant turns; no answer may be empty.
    """
    if not isinstance(turns, list):
        raise InputError(f"{where}: conversations should be a list of turns, found {str(turns)[:60]!r}.")
    images = []
    texts = [_turn(turn, images, where) for turn in turns]
    has_system = bool(texts) and texts[0][0] == "system"
    roles = [role for role, _ in texts[has_system:]]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise InputError(f"{where}: conversations must alternate human and gpt, starting with human.")
    if not all(text.strip() for role, text in texts if role == "assistant"):
        raise InputError(f"{where}: an answer is empty; there is nothing to learn from it.")
    return texts, images


def _turn(turn, images: list[str], where: str) -> tuple[str, str]:
    """(role, text) of a turn; images that its parts name are appended to `images`."""
    if not isinstance(turn, dict):
        raise InputError(f"{where}: a turn should be an object with from and value, found {str(turn)[:60]!r}.")
    role, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    if role not in ROLES:
        raise InputError(f"{where}: a turn of {role!r} is not supported; known are {', '.join(ROLES)}.")
    if isinstance(text, list):
        text = _parts(text, images, where)
    if not isinstance(text, str):
        raise InputError(f"{where}: a turn's value is not text; write it as a string.")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"{where}: a turn has half of a surrogate pair, which is not text; write it again.") from None
    return ROLES[role], text


def _parts(parts: list, images: list[str], where: str) -> str:
    """The text of a turn's parts, with a mark per image part; images that parts name are appended to `images`."""
    text = ""
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(part, str) or kind == "text":
            content = part if isinstance(part, str) else part.get("text")
            if not isinstance(content, str):
                raise InputError(f"{where}: a part of a turn has no text: {str(part)[:60]}.")
            text += content
        elif kind in ("image", "image_url"):
            text += IMAGE
            source = next((part[name] for name in ("image", "path", "url", "image_url") if part.get(name)), None)
            if source is not None:
                url = source["url"] if isinstance(source, dict) and "url" in source else source
                images.append(_path(url, where))
        else:
            raise InputError(f"{where}: a part of type {kind!r} is not supported; known are text and image.")
    return text


def _images(record: dict, where: str) -> list[str]:
    given = [name for name in ("image", "images") if record.get(name) not in (None, [], "")]
    if len(given) > 1:
        raise InputError(f"{where}: has both 'image' and 'images'; keep one.")
    if not given:
        return []
    images = record[given[0]]
    return [_path(image, where) for image in (images if isinstance(images, list) else [images])]


def _path(image, where: str) -> str:
    if isinstance(image, dict) and isinstance(image.get("path"), str) and not image.get("bytes"):
        image = image["path"]
    if not isinstance(image, str) or not image or "\0" in image or image.startswith(("data:", "http://", "https://")):
        raise InputError(
            f"{where}: image is neither a path nor a list of paths: {str(image)[:60]!r}. Write the image to a file."
        )
    return image.removeprefix("file://")
