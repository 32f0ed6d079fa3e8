"""Train files in the forms that people have them in, read into one: images and turns.

LLaVA       {"id", "image": path or paths, "conversations": [{"from": "human", "value": "<image>\\n…"}, {"from": "gpt", "value"}]}
ShareGPT    {"conversations": […], "images": […]}
messages    {"messages": [{"role": "user", "content": text or parts}, {"role": "assistant", …}], "images": […]}

As a JSON list, as {"data": [...]}, or as JSON Lines. An image may be a path or {"path": …}. What else there is, videos, tools,
images within the file, is refused by name: it would be trained on without being seen.
"""

import json
from pathlib import Path

IMAGE = "<image>"
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bard": "assistant",
}
ROLES |= {"chatgpt": "assistant", "bing": "assistant", "system": "system"}
NOT_READ = ("video", "videos", "audio", "audios", "tools", "objects")
TURNS = ("conversations", "messages", "conversation")


class DataError(Exception):
    """Something in the train JSON that the user can mend: names file, record and remedy."""


def read_records(path: str) -> list:
    """The records of a file, a list or a line each. Raises DataError where there are none."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file. Run PI.sh first, or name the file with --data_path.") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as text ({error}). Write it again, in UTF-8.") from None
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        content = _lines(path, text, error)
    if isinstance(content, dict):
        one = any(name in content for name in TURNS)
        content = [content] if one else content.get("data")
    if not isinstance(content, list) or not content:
        raise DataError(f"{path}: no samples in it; expected a list of records, and there is nothing to train on.")
    return content


def _lines(path: str, text: str, error: Exception) -> list:
    """JSON Lines; `error` is what is wrong with the text as one document."""
    lines, found = [line for line in text.split("\n") if line.strip()], []
    if not lines:
        raise DataError(f"{path}: not JSON (it is empty). Write it again.")
    for number, line in enumerate(lines):
        try:
            found.append(json.loads(line))
        except (ValueError, RecursionError) as of_line:
            if not found or not isinstance(found[0], dict):
                says = "it is nested too deeply" if isinstance(error, RecursionError) else str(error).split(";")[0]
                raise DataError(f"{path}: not JSON ({says}). Write it again.") from None
            raise DataError(
                f"{path}, line {number + 1}: not JSON ({str(of_line).split(';')[0]}). Write it again."
            ) from None
    return found


def read_record(record, where: str, number: int) -> dict:
    """{"id", "images": [path], "turns": [(role, text)]} of a record; the marks <image> in the texts are as many as images.

    A record with images and no mark has them in front of its first question, where its form is that of messages with
    a list of images; in the LLaVA form, marks say where. Raises DataError, which names `where`, for what cannot be read.
    """
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected an object with id, image and conversations, found {str(record)[:60]!r}.")
    for name in NOT_READ:
        if record.get(name):
            raise DataError(f"{where}: {name!r} cannot be trained on here; take it out, or leave the record out.")
    number_or_name = record.get("id", record.get("question_id", number))
    if not isinstance(number_or_name, str | int) or isinstance(number_or_name, bool):
        raise DataError(f"{where}: 'id' should be text or a whole number: {str(number_or_name)[:60]}.")
    named = [name for name in TURNS if name in record]
    if not named:
        raise DataError(f"{where}: missing 'conversations'; expected id, image and conversations of from and value.")
    turns, inside = _turns(record[named[0]], where)
    images = [*_images(record, where), *inside]
    marks = [text.count(IMAGE) for role, text in turns if role == "user"]
    if any(IMAGE in text for role, text in turns if role != "user"):
        raise DataError(f"{where}: {IMAGE} stands in a turn that is not the user's; take it out.")
    if images and not any(marks) and "image" not in record and named[0] == "messages":
        first = next(i for i, (role, _) in enumerate(turns) if role == "user")
        turns[first] = ("user", IMAGE * len(images) + turns[first][1])
    elif sum(marks) != len(images):
        raise DataError(
            f"{where}: {len(images)} images, and {sum(marks)} {IMAGE} in the human turns; expected one for each."
        )
    return {"id": number_or_name, "images": images, "turns": turns}


def _turns(found, where: str) -> tuple[list[tuple[str, str]], list[str]]:
    """[(role, text)] alternating from the user on, after a system turn if there is one, and the images named in parts."""
    if not isinstance(found, list):
        raise DataError(f"{where}: conversations should be a list of turns, found {str(found)[:60]!r}.")
    turns, images = [], []
    for turn in found:
        if not isinstance(turn, dict):
            raise DataError(f"{where}: a turn should be an object with from and value, found {str(turn)[:60]!r}.")
        who, said = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        if who not in ROLES:
            raise DataError(f"{where}: a turn of {who!r} cannot be trained on; known are {', '.join(ROLES)}.")
        if isinstance(said, list):
            said = _parts(said, images, where)
        if not isinstance(said, str):
            raise DataError(f"{where}: a turn's value is not text; write it as a string.")
        try:
            said.encode()
        except UnicodeEncodeError:
            raise DataError(
                f"{where}: a turn has half of a surrogate pair in it, which is no text; write it again."
            ) from None
        turns.append((ROLES[who], said))
    system = turns[:1] if turns and turns[0][0] == "system" else []
    rest = [role for role, _ in turns[len(system) :]]
    if not rest or rest != ["user", "assistant"] * (len(rest) // 2):
        raise DataError(f"{where}: conversations must alternate human and gpt, starting with human.")
    if not all(text.strip() for role, text in turns if role == "assistant"):
        raise DataError(f"{where}: an answer is empty; there is nothing to learn from it.")
    return turns, images


def _parts(parts: list, images: list[str], where: str) -> str:
    """A turn's parts as text with marks; images that are named in them are added to `images`."""
    text = ""
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(part, str) or kind == "text":
            said = part if isinstance(part, str) else part.get("text")
            if not isinstance(said, str):
                raise DataError(f"{where}: a part of a turn has no text: {str(part)[:60]}.")
            text += said
        elif kind in ("image", "image_url"):
            text += IMAGE
            source = next((part[name] for name in ("image", "path", "url", "image_url") if part.get(name)), None)
            if source is not None:
                images.append(
                    _path(source.get("url") if isinstance(source, dict) and "url" in source else source, where)
                )
        else:
            raise DataError(f"{where}: a part of type {kind!r} cannot be trained on; known are text and image.")
    return text


def _images(record: dict, where: str) -> list[str]:
    given = [name for name in ("image", "images") if record.get(name) not in (None, [], "")]
    if len(given) > 1:
        raise DataError(f"{where}: has both 'image' and 'images'; keep one.")
    if not given:
        return []
    found = record[given[0]]
    return [_path(one, where) for one in (found if isinstance(found, list) else [found])]


def _path(image, where: str) -> str:
    if isinstance(image, dict) and isinstance(image.get("path"), str) and not image.get("bytes"):
        image = image["path"]
    if not isinstance(image, str) or not image or "\0" in image or image.startswith(("data:", "http://", "https://")):
        raise DataError(
            f"{where}: image is neither a path nor a list of paths: {str(image)[:60]!r}. Write the image to a file."
        )
    return image.removeprefix("file://")
