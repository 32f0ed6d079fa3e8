"""Chat templates that write the original prompts, character for character."""

# A message's text; an image is the image token and a line break, where the processor puts the image's tokens.
CONTENT = (
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{{ IMAGE if part.type == 'image' else part.text }}{% endfor %}{% endif %}"
)


def chat_template(system: str, before: str, behind: str, end: str, image_token: str) -> str:
    """InternVL's form: before + role + behind + content + end. The original's system message stands where none is given."""
    before, behind, end, system = (_quoted(text) for text in (before, behind, end, system))
    content = CONTENT.replace("IMAGE", _quoted(image_token + "\n"))
    turn = "{{ " + before + " + message.role + " + behind + " }}" + content + "{{ " + end + " }}"
    return (
        "{% if messages[0].role != 'system' %}{{ "
        f"{before} + 'system' + {behind} + {system} + {end}"
        " }}{% endif %}{% for message in messages %}" + turn + "{% endfor %}"
        "{% if add_generation_prompt %}{{ " + before + " + 'assistant' + " + behind + " }}{% endif %}"
    )


def dialogue_template(system: str, end: str, image_token: str) -> str:
    """LLaVA's form: system, "USER: … ASSISTANT: …" and the end token, without a space before the next turn."""
    content = CONTENT.replace("IMAGE", _quoted(image_token + "\n"))
    return (
        "{% if messages[0].role != 'system' %}{{ " + _quoted(system + " ") + " }}{% endif %}"
        "{% for message in messages %}"
        "{% if message.role == 'system' %}" + content + "{{ ' ' }}"
        "{% elif message.role == 'user' %}{{ 'USER: ' }}" + content + "{{ ' ' }}"
        "{% else %}{{ 'ASSISTANT: ' }}" + content + "{{ " + _quoted(end) + " }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    )


def _quoted(text: str) -> str:
    """A text as a Jinja string."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"
