"""The forms of the families' published chat templates, for text and images, in our own words."""

IN_ORDER = "{% for p in m.content %}{{ 'IMAGE' if p.type == 'image' else p.text }}{% endfor %}"
PARTS = "{% if m.content is string %}{{ m.content }}{% else %}" + IN_ORDER + "{% endif %}"
IMAGES = "{% for p in m.content if p.type == 'image' %}{{ 'IMAGE' }}{% endfor %}"
TEXTS = "{% for p in m.content if p.type == 'text' %}{{ BEFORE p.text AFTER }}{% endfor %}"
LOOP, END = "{% for m in messages %}", "{% endfor %}"


def prompted(text: str) -> str:
    return "{% if add_generation_prompt %}{{ '" + text + "' }}{% endif %}"


def texts(before: str = "", after: str = "") -> str:
    return TEXTS.replace("BEFORE", f"'{before}' +" if before else "").replace("AFTER", f"+ '{after}'" if after else "")


def chatml(image: str, start: str = "") -> str:
    turn = "{{ '<|im_start|>' + m.role + '\\n' }}" + PARTS.replace("IMAGE", image) + "{{ '<|im_end|>\\n' }}"
    return start + LOOP + turn + END + prompted("<|im_start|>assistant\\n")


def qwen2(image: str) -> str:
    """ChatML with a system message of its own where the conversation has none."""
    system = "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}"
    return "{% if messages[0].role != 'system' %}" + system + "{% endif %}" + chatml(image)


def qwen3_reasoning(image: str) -> str:
    """ChatML with an empty block of reasoning before the last answer alone, as Qwen3's; Qwen3.5's was not at hand."""
    empty = "<think>\\n\\n</think>\\n\\n"
    opened = "{% if m.role == 'assistant' and loop.last %}{{ '" + empty + "' }}{% endif %}"
    turn = "{{ '<|im_start|>' + m.role + '\\n' }}" + opened + PARTS.replace("IMAGE", image) + "{{ '<|im_end|>\\n' }}"
    return LOOP + turn + END + prompted("<|im_start|>assistant\\n" + empty)


def idefics(start: str) -> str:
    """A start token once; roles as words, with a space before text but none before an image."""
    role = "{{ m.role | capitalize }}{{ ':' if m.content[0].type == 'image' else ': ' }}"
    turn = role + IN_ORDER.replace("IMAGE", "<image>") + "{{ '<end_of_utterance>\\n' }}"
    return start + LOOP + turn + END + prompted("Assistant:")


def llava() -> str:
    """LLaVA-1.5's closes no turn: a space follows every text, the answer's too."""
    role = "{% if m.role != 'system' %}{{ m.role | upper + ': ' }}{% endif %}"
    return LOOP + role + IMAGES.replace("IMAGE", "<image>\\n") + texts(after=" ") + END + prompted("ASSISTANT:")


def llava_next() -> str:
    """That of LLaVA-1.6 on Mistral: no words for roles; an answer begins with a space."""
    asked = "{{ '[INST] ' }}" + IMAGES.replace("IMAGE", "<image>\\n") + texts() + "{{ ' [/INST]' }}"
    answered = "{{ ' ' }}" + texts() + "{{ '</s>' }}"
    return LOOP + "{% if m.role == 'user' %}" + asked + "{% else %}" + answered + "{% endif %}" + END


def llava_onevision() -> str:
    """A space after the role, and a line break before each text; the prompt for an answer has no such space."""
    turn = "{{ '<|im_start|>' + m.role + ' ' }}" + IMAGES.replace("IMAGE", "<image>") + texts(before="\\n")
    return LOOP + turn + "{{ '<|im_end|>' }}" + END + prompted("<|im_start|>assistant\\n")


def granite() -> str:
    """Granite Vision's: a fixed system message, roles as special tokens; only an answer is closed."""
    system = "{{ '<|system|>\\nA chat between a curious user and an assistant.\\n' }}"
    asked = "{{ '<|user|>\\n' }}" + IMAGES.replace("IMAGE", "<image>\\n") + texts(after="\\n")
    answered = "{{ '<|assistant|>\\n' }}" + texts() + "{{ '<|end_of_text|>\\n' }}"
    branch = "{% if m.role == 'user' %}" + asked + "{% elif m.role == 'assistant' %}" + answered + "{% endif %}"
    return system + LOOP + branch + END + prompted("<|assistant|>\\n")


def gemma() -> str:
    """Gemma 3's: begins with <bos>; the model's role is called so; a turn ends with a token that is not the tokenizer's."""
    role = "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' }}"
    parts = "{% for p in m.content %}{{ '<start_of_image>' if p.type == 'image' else p.text | trim }}{% endfor %}"
    turn = role + parts + "{{ '<end_of_turn>\\n' }}"
    return "{{ '<bos>' }}" + LOOP + turn + END + prompted("<start_of_turn>model\\n")
